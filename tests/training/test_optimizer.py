"""AdamW against torch's golden run and float64, its groups, freezing and the clamp."""

import dataclasses
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from golden_files import assert_close_to_max, golden, golden_json
from jax.sharding import PartitionSpec
from tiny_run import small_config

from protoclip_jax.interop.torch_names import torch_name
from protoclip_jax.models import clip
from protoclip_jax.models.presets import ProjectionConfig, preset
from protoclip_jax.training import optimizer, step
from protoclip_jax.training.optimizer import GROUPS, OptimizerSettings
from protoclip_jax.training.phases import phase_of

ADAMW = golden_json("adamw")
REAL_MODELS = golden_json("optimizer_groups")


def nested(flat: dict) -> dict:
    """{"a.b": x} as {"a": {"b": x}}."""
    tree = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return tree


def flat(tree: dict) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(key.key for key in path): leaf for path, leaf in leaves}


def reference_group(name: str, ndim: int) -> str:
    """The reference's name for the group of a parameter."""
    tower = "visual" if optimizer.group_of(name) == "image" else "rest"
    return f"{tower}_{'decay' if optimizer.decays(name, ndim) else 'nodecay'}"


@pytest.fixture
def params():
    rng = np.random.default_rng(3)
    shapes = {
        "visual.conv1.weight": (3, 3, 2, 4),
        "visual.bn1.bias": (4,),
        "text_projection": (5, 4),
        "ln_final.weight": (5,),
        "logit_scale": (),
        "image_projection_head.0.weight": (4, 3),
        "text_projection_head.0.bias": (3,),
        "logit_scale_proto": (),
    }
    return nested({n: jnp.float32(rng.uniform(0.5, 1.5, size=s)) for n, s in shapes.items()})


def grads_like(params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.float32(rng.normal(size=p.shape)), params)


LRS = {"image": 1e-2, "text": 3e-3}
SETTINGS = OptimizerSettings(clip_norm=1.0)
update = jax.jit(optimizer.update, static_argnames=("settings", "trained"))


@pytest.mark.core
@pytest.mark.parametrize("model", REAL_MODELS)
def test_golden_groups_of_real_models(model):
    groups, shapes = REAL_MODELS[model]["groups"], REAL_MODELS[model]["shapes"]
    expected = {name: group for group, names in groups.items() for name in names}
    assert expected.keys() == shapes.keys()
    for separator in (".", "/"):
        actual = {
            name: reference_group(name.replace(".", separator), len(shape))
            for name, shape in shapes.items()
        }
        assert actual == expected
    assert set(groups) == set(actual.values())


@pytest.mark.core
@pytest.mark.parametrize("name", REAL_MODELS)
def test_golden_groups_of_our_models(name):
    """Our own paths and layouts fall into the same groups as torch's names and shapes."""
    expected, shapes = REAL_MODELS[name], REAL_MODELS[name]["shapes"]
    head = [shape for key, shape in shapes.items() if key.startswith("image_projection_head.")]
    linear = [shape for shape in head if len(shape) == 2]
    projection = ProjectionConfig(
        hidden_layers=len(linear) - 1, hidden=linear[0][0], width=linear[-1][0]
    )
    config = dataclasses.replace(preset(name), projection=projection)
    params = jax.eval_shape(lambda: clip.initialise(config, 0)[1])
    groups, numel = {}, Counter()
    for path, leaf in flat(params).items():
        path = path.replace(".", "/")
        group = reference_group(path, leaf.ndim)
        groups[torch_name(path)] = group
        numel[group] += math.prod(leaf.shape)
    assert groups == {n: group for group, names in expected["groups"].items() for n in names}
    assert numel == expected["numel"]


@pytest.mark.core
@pytest.mark.parametrize("name", ADAMW["settings"])
@pytest.mark.parametrize("form", ["flat", "nested"])
def test_golden_run(name, form):
    shape = nested if form == "nested" else dict
    given = ADAMW["settings"][name]
    settings = OptimizerSettings(
        beta1=ADAMW["beta1"],
        beta2=given["beta2"],
        eps=given["eps"],
        weight_decay=ADAMW["weight_decay"],
        clip_norm=given["clip"],
    )
    params = {key: jnp.asarray(value) for key, value in golden("adamw", "init/").items()}
    for key, value in params.items():
        assert reference_group(key, value.ndim) == ADAMW["groups"][key]
    grads, expected = golden("adamw", "grads/"), golden("adamw", f"{name}/")
    params = shape(params)
    state = optimizer.init(params, settings)
    for i, (image, text) in enumerate(expected["lrs_visual_rest"]):
        now = shape({key: value[i] for key, value in grads.items()})
        lrs = {"image": image, "text": text}
        params, state, metrics = update(now, state, params, lrs, settings)
        np.testing.assert_allclose(metrics["grad_norm"], expected["grad_norm"][i], rtol=1e-5)
        for key, value in flat(params).items():
            assert_close_to_max(value, expected[f"params/{key}"][i], 1e-5, f"{key}, step {i}")
    for key, value in flat(optimizer.merge(*(part.mu for part in state.values()))).items():
        assert_close_to_max(value, expected[f"exp_avg/{key}"], 1e-5, f"mu of {key}")
    for key, value in flat(optimizer.merge(*(part.nu for part in state.values()))).items():
        assert_close_to_max(value, expected[f"exp_avg_sq/{key}"], 1e-4, f"nu of {key}")
    steps = len(expected["lrs_visual_rest"])
    assert {int(part.count) for part in state.values()} == {steps}


def adamw64(p, grads, rates, s: OptimizerSettings, decay: float):
    """torch's AdamW in float64 numpy, for one tensor."""
    p, m, v = np.float64(p), 0.0, 0.0
    for t, (g, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        p = p * (1 - rate * decay)
        m = s.beta1 * m + (1 - s.beta1) * np.float64(g)
        v = s.beta2 * v + (1 - s.beta2) * np.float64(g) ** 2
        root = np.sqrt(v) / math.sqrt(1 - s.beta2**t) + s.eps
        p = p - rate / (1 - s.beta1**t) * m / root
    return p


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("betas", [(0.9, 0.999, 1e-8), (0.9, 0.98, 1e-6)])
def test_one_group_alone_equals_float64(params, group, betas):
    settings = OptimizerSettings(*betas, weight_decay=0.3)
    rates = np.linspace(1e-3, 1e-2, 7)
    history = [grads_like(params, seed) for seed in range(7)]
    start, state = params, optimizer.init(params, settings)
    for grads, rate in zip(history, rates, strict=True):
        lrs = {"image": rate, "text": rate}
        params, state, _ = update(grads, state, params, lrs, settings, (group,))
    history = [flat(grads) for grads in history]
    for name, value in flat(params).items():
        first = flat(start)[name]
        if optimizer.group_of(name) != group:
            np.testing.assert_array_equal(value, first)
            continue
        decay = 0.3 if optimizer.decays(name, first.ndim) else 0.0
        expected = adamw64(first, [g[name] for g in history], rates, settings, decay)
        np.testing.assert_allclose(value, expected, rtol=2e-5, atol=1e-6, err_msg=name)


def test_x64_is_float64_throughout(params):
    steps = 4
    with jax.enable_x64(True):
        start = params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params)
        state, history = optimizer.init(params, SETTINGS), []
        for i in range(steps):
            grads = jax.tree.map(lambda p, i=i: jnp.sin(p + i), params)
            params, state, metrics = update(grads, state, params, LRS, SETTINGS)
            norm = math.sqrt(sum(np.sum(np.square(g)) for g in flat(grads).values()))
            np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-12)
            scale = min(1.0, SETTINGS.clip_norm / (norm + 1e-6))
            assert scale < 1
            history.append({name: np.asarray(g) * scale for name, g in flat(grads).items()})
        leaves = jax.tree.leaves((params, metrics, [(s.mu, s.nu) for s in state.values()]))
        assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float64)}
        for name, value in flat(params).items():
            rate = LRS["image" if optimizer.group_of(name) == "image" else "text"]
            decay = SETTINGS.weight_decay if optimizer.decays(name, value.ndim) else 0.0
            given = [grads[name] for grads in history]
            expected = adamw64(flat(start)[name], given, [rate] * steps, SETTINGS, decay)
            np.testing.assert_allclose(value, expected, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("frozen", GROUPS)
def test_frozen_group_keeps_everything(params, frozen):
    state = optimizer.init(params, SETTINGS)
    params, state, _ = update(grads_like(params, 0), state, params, LRS, SETTINGS)
    trained = tuple(group for group in GROUPS if group != frozen)
    new, new_state, _ = update(grads_like(params, 1), state, params, LRS, SETTINGS, trained)
    jax.tree.map(np.testing.assert_array_equal, new_state[frozen], state[frozen])
    for name, value in flat(new).items():
        same = np.array_equal(value, flat(params)[name])
        assert same == (optimizer.group_of(name) == frozen), name
    for group in trained:
        assert int(new_state[group].count) == int(state[group].count) + 1


@pytest.mark.parametrize("frozen", GROUPS)
def test_frozen_gradients_are_not_in_the_norm_and_may_be_missing_or_nan(params, frozen):
    trained = tuple(group for group in GROUPS if group != frozen)
    grads, state = grads_like(params, 0), optimizer.init(params, SETTINGS)
    parts = {group: optimizer.select(grads, group) for group in GROUPS}
    left = optimizer.merge(*(parts[group] for group in trained))
    poisoned = optimizer.merge(
        left, jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), parts[frozen])
    )
    whole = update(grads, state, params, LRS, SETTINGS, trained)
    for other in (left, poisoned):
        out = update(other, state, params, LRS, SETTINGS, trained)
        jax.tree.map(np.testing.assert_array_equal, out, whole)
    expected = math.sqrt(sum(float(np.sum(np.float64(g) ** 2)) for g in flat(left).values()))
    np.testing.assert_allclose(whole[2]["grad_norm"], expected, rtol=1e-6)
    assert not np.isclose(expected, optax.tree.norm(grads), rtol=1e-4)


def test_late_group_starts_its_own_bias_correction(params):
    """Heads that join at step 3 move as heads that were there alone from the start."""
    settings = dataclasses.replace(SETTINGS, clip_norm=None)
    late_params, late_state = params, optimizer.init(params, settings)
    for seed in range(3):
        grads = grads_like(params, seed)
        late_params, late_state, _ = update(
            grads, late_state, late_params, LRS, settings, ("image", "text")
        )
    grads = grads_like(params, 9)
    late, late_state, _ = update(grads, late_state, late_params, LRS, settings)
    fresh, _, _ = update(grads, optimizer.init(params, settings), params, LRS, settings)
    assert int(late_state["heads"].count) == 1
    assert int(late_state["text"].count) == 4
    jax.tree.map(
        np.testing.assert_array_equal,
        optimizer.select(late, "heads"),
        optimizer.select(fresh, "heads"),
    )


def test_all_groups_trained_drift_on_momentum(params):
    """The reference's way: heads without a gradient keep moving."""
    state = optimizer.init(params, SETTINGS)
    params, state, _ = update(grads_like(params, 0), state, params, LRS, SETTINGS)
    zero = jax.tree.map(jnp.zeros_like, params)
    new, _, _ = update(zero, state, params, LRS, SETTINGS)
    moved = flat(jax.tree.map(lambda a, b: jnp.any(a != b), new, params))
    assert all(moved[name] for name in moved if optimizer.group_of(name) == "heads")


@pytest.mark.parametrize("name", ["logit_scale", "logit_scale_proto"])
@pytest.mark.parametrize("direction", [-1.0, 1.0])
def test_logit_scales_stay_within_bounds(params, name, direction):
    """Case NUM-03: from ln(100) - 0.001 at learning rate 1, five steps of one mind."""
    settings, lrs = OptimizerSettings(), {"image": 1.0, "text": 1.0}
    params = params | {name: jnp.float32(math.log(100) - 0.001)}
    grads = jax.tree.map(jnp.zeros_like, params) | {name: jnp.float32(-direction)}
    state = optimizer.init(params, settings)
    seen = []
    for _ in range(5):
        params, state, _ = update(grads, state, params, lrs, settings)
        seen.append(np.float32(params[name]))
    # float32 exp(ln 100) counts as 100.
    assert np.all(np.float64(np.exp(seen)) <= 100 * (1 + 2e-6))
    assert np.all(np.array(seen) >= 0)
    np.testing.assert_allclose(seen[-1], math.log(100) if direction > 0 else 0, rtol=1e-6)


def test_scales_above_the_bound_reach_the_loss_as_they_are(monkeypatch, tmp_path):
    """Clamped after the update only: a clamp in the forward would stop or halve their gradient."""

    def squares(features, scales, *_, **__):
        loss = sum(scale**2 for scale in scales.values())
        return loss, {"loss/total": loss}

    # What is between parameters and loss does not matter here, and takes long to compile.
    monkeypatch.setattr(step.clip, "apply", lambda *_, **__: (None, {}))
    monkeypatch.setattr(step, "total_loss", squares)
    config = small_config(tmp_path / "none.tsv", optimizer__clip_norm="none")
    phase = phase_of(config, 1)
    assert "heads" in phase.trained
    params = {"logit_scale": jnp.float32(5), "logit_scale_proto": jnp.float32(6)}
    state = {
        "step": jnp.int32(0),
        "params": params,
        "batch_stats": {},
        "opt_state": optimizer.init(params, step.optimizer_settings(config)),
    }
    batch = {"image": jnp.zeros((1, 2, 2, 3)), "tokens": None, "position": jnp.arange(1)}
    train_step = step.make_train_step(nnx.graphdef(nnx.List([])), config, phase)
    after, metrics = train_step(state, batch, None)
    np.testing.assert_allclose(metrics["loss/total"], 25 + 36, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], np.hypot(10, 12), rtol=1e-6)
    for name in params:
        np.testing.assert_allclose(after["params"][name], math.log(100), rtol=1e-6)


def test_no_clipping_and_gentle_clipping_agree(params):
    grads, state = grads_like(params, 0), optimizer.init(params, SETTINGS)
    results = []
    for limit in (None, 1e16):
        settings = dataclasses.replace(SETTINGS, clip_norm=limit)
        results.append(update(grads, state, params, LRS, settings))
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_select_and_merge_are_inverse(params):
    parts = [optimizer.select(params, group) for group in GROUPS]
    assert all(parts)
    assert optimizer.merge(*parts) == params
    assert sum(len(flat(part)) for part in parts) == len(flat(params))


def test_model_without_heads_has_no_heads_state(params):
    params = {name: value for name, value in params.items() if optimizer.group_of(name) != "heads"}
    state = optimizer.init(params, SETTINGS)
    assert set(state) == {"image", "text"}
    new, _, _ = update(grads_like(params, 0), state, params, LRS, SETTINGS, GROUPS)
    assert flat(new).keys() == flat(params).keys()


def test_state_like_has_the_form_of_the_state(params):
    specs = jax.tree.map(lambda p: PartitionSpec(*[None] * p.ndim), params)
    like = optimizer.state_like(specs, PartitionSpec())
    state = optimizer.init(params, SETTINGS)
    jax.tree.map(
        lambda leaf, spec: pytest.fail(str(spec)) if len(spec) != leaf.ndim else None, state, like
    )
    assert jax.tree.structure(state) == jax.tree.structure(like)


def test_unknown_group_is_refused(params):
    state = optimizer.init(params, SETTINGS)
    with pytest.raises(ValueError, match=r"no such parameter group: \['head'\]"):
        update(params, state, params, LRS, SETTINGS, ("head",))
