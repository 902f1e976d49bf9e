"""The start of the parameters against the reference's distributions, and the random stream."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden_json

from protoclip_jax.interop.torch_names import to_torch
from protoclip_jax.models.clip import initialise
from protoclip_jax.models.presets import ProjectionConfig, preset
from protoclip_jax.models.start import Draws, normal, uniform


@pytest.mark.core
@pytest.mark.parametrize("name", ["RN50", pytest.param("ViT-B-32", marks=pytest.mark.slow)])
def test_distributions_of_the_reference(name):
    """Same mean, deviation and shape (uniform or normal) of every parameter.

    The bounds are six standard errors of the difference of two samples of that size: of a mean
    std sqrt(2/n), of a deviation at most std/sqrt(n).
    """
    expected = golden_json("init_stats_reference")[name]
    expected.pop("__note__")
    hidden = expected["image_projection_head.0.weight"]["shape"][0]
    width = expected["image_projection_head.3.weight"]["shape"][0]
    config = dataclasses.replace(preset(name), projection=ProjectionConfig(1, hidden, width))
    _, params, stats = jax.jit(lambda: initialise(config, 7))()
    ours = to_torch(params, {})
    assert set(ours) == set(expected)
    for parameter, facts in expected.items():
        array = ours[parameter]
        assert list(array.shape) == facts["shape"], parameter
        if facts["std"] == 0:
            np.testing.assert_allclose(array, facts["mean"], rtol=1e-6, err_msg=parameter)
            continue
        error = 6 * facts["std"] / np.sqrt(array.size)
        assert abs(array.mean() - facts["mean"]) < error * np.sqrt(2), parameter
        assert abs(array.std() - facts["std"]) < error, parameter
        # A uniform sample ends near sqrt(3) deviations, a normal one beyond 2.
        bounded = facts["max"] < 2 * facts["std"]
        assert bounded == (array.max() < 2 * array.std()), parameter
    jax.tree.map(
        np.testing.assert_array_equal,
        params["image_projection_head"],
        params["text_projection_head"],
    )
    for buffer, array in to_torch({}, stats).items():
        np.testing.assert_array_equal(array, buffer.endswith("var"), buffer)


def draws(seed: int = 0) -> Draws:
    return Draws(jax.random.key(seed))


def test_stream_is_even():
    x = np.sort(draws()((200_000,)))
    steps = np.linspace(-1, 1, x.size)
    assert np.abs(x - steps).max() < 2 * 1.95 / np.sqrt(x.size)  # Kolmogorov-Smirnov, p = 0.001
    assert -1 < x[0] < x[-1] < 1


def test_normal_has_normal_moments():
    x = np.asarray(normal(2.0)(draws(), (400_000,)), np.float64) / 2
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        spread = np.sqrt(np.mean(x ** (2 * power)) / x.size)
        assert abs(np.mean(x**power) - moment) < 5 * spread
    assert np.isfinite(x).all()


def test_stream_is_uncorrelated():
    """Neighbours, successive draws, and other seeds."""
    stream = draws()
    first, second = np.asarray(stream((300, 300))), np.asarray(stream((300, 300)))
    pairs = [(first[:, 1:], first[:, :-1]), (first[1:], first[:-1]), (first, second)]
    pairs += [(first, draws(seed)((300, 300))) for seed in (1, 2, 3, 2**20)]
    for a, b in pairs:
        assert abs(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]) < 5 / np.sqrt(a.size)


def test_stream_depends_on_seed_and_position_only():
    stream = draws(5)
    whole = np.asarray(draws(5)((20,)))
    np.testing.assert_array_equal(np.concatenate([stream((8,)), stream((12,))]), whole)
    traced = jax.jit(lambda key: Draws(key)((4, 5)))(jax.random.key(5))
    np.testing.assert_array_equal(np.ravel(traced), whole)
    stream = draws(5)
    stream((8,))
    np.testing.assert_array_equal(stream.copy()((12,)), stream((12,)))


def test_starts_are_float32_whatever_the_default():
    with jax.enable_x64(True):
        assert uniform(1.0)(draws(), (3,)).dtype == jnp.float32
        assert normal(1.0)(draws(), (3,)).dtype == jnp.float32
