"""Learning rates against the golden schedules, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden, golden_json

from protoclip_jax.training.schedule import ScheduleSettings, learning_rates

CASES = golden_json("lr_schedule")
TWO_GROUPS = {key: case for key, case in CASES.items() if "visual_steps" in case}
ONE_GROUP = {key: case for key, case in CASES.items() if "visual_steps" not in case}
CRASHES = {key: case for key, case in TWO_GROUPS.items() if case["raises"]}
RUNS = {key: case for key, case in TWO_GROUPS.items() if not case["raises"]}


def settings_of(case: dict, *, parity: bool) -> ScheduleSettings:
    return ScheduleSettings(
        total_steps=case["total_steps"],
        warmup_steps=case["warmup"],
        image_steps=case["visual_steps"],
        text_start_step=case["text_start_step"],
        text_end_step=case["text_end_step"],
        lr=case["lr"],
        lr_text=case["lr_text_resolved"],
        parity=parity,
    )


def plain(total=100, warmup=10, image=100, start=0, end=100) -> ScheduleSettings:
    return ScheduleSettings(total, warmup, image, start, end, lr=1e-3, lr_text=2e-3)


def table(settings: ScheduleSettings) -> dict:
    return learning_rates(settings)(np.arange(settings.total_steps))


def traced(settings: ScheduleSettings) -> dict:
    return jax.jit(jax.vmap(learning_rates(settings)))(
        jnp.arange(settings.total_steps, dtype=jnp.int32)
    )


def assert_rates(actual, expected, base: float, tolerance: float):
    worst = np.max(np.abs(np.asarray(actual, np.float64) - expected))
    assert worst <= tolerance * base, f"off by {worst / base:.3e} of the base rate"


@pytest.mark.core
@pytest.mark.parametrize("key", RUNS)
def test_golden_parity(key):
    settings = settings_of(RUNS[key], parity=True)
    expected = golden("lr_schedule", f"{key}/")
    base = {"image": settings.lr, "text": settings.lr}
    names = {"image": "lr_visual", "text": "lr_rest"}
    narrow = traced(settings)
    with jax.enable_x64(True):
        wide = traced(settings)
    for group, name in names.items():
        assert len(expected[name]) == settings.total_steps
        assert_rates(table(settings)[group], expected[name], base[group], 1e-9)
        assert wide[group].dtype == jnp.float64
        assert_rates(wide[group], expected[name], base[group], 1e-9)
        assert narrow[group].dtype == jnp.float32
        assert_rates(narrow[group], expected[name], base[group], 1e-6)


@pytest.mark.core
@pytest.mark.parametrize("key", CRASHES)
def test_golden_division_by_zero_is_refused(key):
    for parity in (True, False):
        with pytest.raises(ValueError, match=r"warm-up of \d+ steps"):
            learning_rates(settings_of(CRASHES[key], parity=parity))


@pytest.mark.core
@pytest.mark.parametrize("key", ONE_GROUP)
def test_golden_plain_cosine(key):
    case = ONE_GROUP[key]
    total = case["total_steps"]
    settings = ScheduleSettings(
        total, case["warmup"], total, 0, total, lr=case["lr"], lr_text=case["lr"]
    )
    expected = golden("lr_schedule", f"{key}/")["lr"]
    for rates in table(settings).values():
        assert_rates(rates, expected, case["lr"], 1e-9)


@pytest.mark.parametrize("key", RUNS)
def test_default_differs_from_the_reference_only_where_it_should(key):
    """The lock beats the warm-up, the text rate does not rise again, the rest is equal."""
    case = RUNS[key]
    settings = settings_of(case, parity=False)
    if case["visual_steps"] < 0 or 0 < case["visual_steps"] <= case["warmup"]:
        with pytest.raises(ValueError, match="image tower is locked"):
            learning_rates(settings)
        return
    expected = golden("lr_schedule", f"{key}/")
    steps = np.arange(settings.total_steps)
    image = np.where(steps < settings.image_steps, expected["lr_visual"], 0)
    text = np.where(steps < settings.text_end_step, expected["lr_rest"], 0)
    assert_rates(table(settings)["image"], image, settings.lr, 1e-9)
    assert_rates(table(settings)["text"], text, settings.lr, 1e-9)
    assert_rates(traced(settings)["text"], text, settings.lr, 1e-6)


def test_tower_locked_from_the_first_step_never_moves():
    rates = table(plain(image=0))
    np.testing.assert_array_equal(rates["image"], 0)
    assert rates["text"][0] > 0


def test_peak_start_and_end():
    rates = table(plain(start=20, end=80, image=60))
    np.testing.assert_allclose(rates["image"][[0, 9, 10]], [1e-4, 1e-3, 1e-3], rtol=1e-12)
    np.testing.assert_array_equal(rates["image"][60:], 0)
    np.testing.assert_array_equal(rates["text"][:20], 0)
    np.testing.assert_allclose(rates["text"][[20, 29, 30]], [2e-4, 2e-3, 2e-3], rtol=1e-12)
    np.testing.assert_array_equal(rates["text"][80:], 0)
    assert np.all(rates["text"][20:80] > 0)


@pytest.mark.parametrize("step", [37, np.int64(37), np.array(37), jnp.int32(37)])
def test_one_step_in_every_form(step):
    rates = learning_rates(plain())
    value = rates(step)["image"]
    np.testing.assert_allclose(value, table(plain())["image"][37], rtol=1e-6)
    if not isinstance(step, jax.Array):
        assert np.asarray(value).dtype == np.float64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (plain(warmup=-1), r"warm-up is -1 steps"),
        (plain(warmup=100), r"leaves nothing of the run's 100"),
        (plain(warmup=150), r"leaves nothing of the run's 100"),
        (plain(warmup=40, image=40), r"not shorter than the 40 steps before the image tower"),
        (plain(warmup=40, image=30), r"not shorter than the 30 steps before the image tower"),
        (plain(image=-10), r"locked after -10 steps"),
        (plain(image=101), r"locked after 101 steps"),
        (plain(warmup=20, start=80), r"not shorter than the 20 steps in which text"),
        (plain(start=50, end=50), r"from step 50 to 50"),
        (plain(start=-5), r"from step -5 to 100"),
        (plain(end=120), r"from step 0 to 120"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        learning_rates(settings)
    assert "\n" not in str(error.value)


def test_parity_refuses_a_zero_text_span_only_where_it_is_reached():
    reached = dataclasses.replace(plain(warmup=20, start=10, end=30), parity=True)
    with pytest.raises(ValueError, match="equals the text steps"):
        learning_rates(reached)
    unreached = dataclasses.replace(plain(warmup=20, start=80), parity=True)
    assert np.all(np.isfinite(table(unreached)["text"]))
