"""Normalisation against plain float64 numpy, and its edge cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from protoclip_jax.models.clip import bind, split
from protoclip_jax.models.normalization import BatchNorm, LayerNorm, unit


def batch_norm(x, group: int, weight, bias, mean, var):
    """Output and running statistics, in float64, group by group."""
    x = np.asarray(x, np.float64)
    out, means, variances = [], [], []
    for rows in x.reshape(-1, group, *x.shape[1:]):
        axes = tuple(range(x.ndim - 1))
        m, v = rows.mean(axes), rows.var(axes)
        out.append((rows - m) / np.sqrt(v + 1e-5) * weight + bias)
        means.append(m)
        variances.append(rows.var(axes, ddof=1))
    new_mean = 0.9 * mean + 0.1 * np.mean(means, 0)
    return np.concatenate(out), new_mean, 0.9 * var + 0.1 * np.mean(variances, 0)


def parameters(width: int):
    random = np.random.default_rng(3)
    weight, bias, mean = random.normal(size=(3, width))
    return weight, bias, mean, random.uniform(0.5, 2, width)


def layer(width: int, group: int | None, weight, bias, mean, var):
    graphdef, *_ = split(BatchNorm(width, group=group))
    params, stats = {"weight": weight, "bias": bias}, {"running_mean": mean, "running_var": var}
    return graphdef, *jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (params, stats))


def run(graphdef, params, stats, x):
    model = bind(graphdef, params, stats)
    y = model(jnp.asarray(x), train=True)
    return y, split(model)[2]


@pytest.mark.parametrize("shape", [(24, 5), (24, 4, 6, 5)])
@pytest.mark.parametrize("group", [None, 24, 8, 2])
def test_batch_norm_equals_float64(shape, group):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32) * 3 + 50
    values = parameters(shape[-1])
    y, stats = jax.jit(run, static_argnums=0)(*layer(shape[-1], group, *values), x)
    expected, mean, var = batch_norm(x, group or 24, *values)
    np.testing.assert_allclose(y, expected, atol=2e-4)
    np.testing.assert_allclose(stats["running_mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(stats["running_var"], var, rtol=1e-5)


def test_groups_are_not_the_whole_batch():
    x = jnp.arange(32.0).reshape(16, 2)
    values = parameters(2)
    grouped, _ = run(*layer(2, 4, *values), x)
    whole, _ = run(*layer(2, None, *values), x)
    assert np.abs(grouped - whole).max() > 0.1


def test_variance_far_from_zero():
    """The mean of squares less the squared mean would be all rounding error here."""
    random = np.random.default_rng(1)
    x = (random.normal(size=(64, 8)) + 4096).astype(np.float32)
    y, stats = run(*layer(8, None, np.ones(8), np.zeros(8), np.zeros(8), np.ones(8)), x)
    np.testing.assert_allclose(np.std(y, 0), 1, atol=1e-3)
    np.testing.assert_allclose(
        stats["running_var"], 0.9 + 0.1 * x.astype(np.float64).var(0, ddof=1), rtol=1e-4
    )


def test_gradient_equals_float64_autodiff():
    """With the variance's gradient through the mean left out, which is exactly zero."""
    x = np.random.default_rng(2).normal(size=(12, 3, 3, 4)) + 2
    cotangent = np.random.default_rng(3).normal(size=x.shape)
    values = parameters(4)

    def ours(x):
        return jnp.sum(run(*layer(4, 6, *values), x)[0] * cotangent)

    def plain(x):
        grouped = x.reshape(2, 6, 3, 3, 4)
        mean = grouped.mean((1, 2, 3), keepdims=True)
        var = grouped.var((1, 2, 3), keepdims=True)
        y = (grouped - mean) / jnp.sqrt(var + 1e-5) * values[0] + values[1]
        return jnp.sum(y.reshape(x.shape) * cotangent)

    got = jax.grad(ours)(jnp.asarray(x, jnp.float32))
    with jax.enable_x64(True):
        expected = jax.grad(plain)(jnp.asarray(x, jnp.float64))
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_global_batch_on_eight_devices():
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    x = np.random.default_rng(0).normal(size=(16, 4, 4, 6)).astype(np.float32)
    arguments = layer(6, None, *parameters(6))
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    y, stats = jax.jit(run, static_argnums=0)(*arguments, sharded)
    expected, expected_stats = run(*arguments, x)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), stats, expected_stats)


def test_groups_of_a_device_need_no_communication():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.device_put(np.ones((32, 6), np.float32), rows)
    graphdef, params, stats = layer(6, 4, *parameters(6))
    program = jax.jit(lambda x: run(graphdef, params, stats, x)[0], out_shardings=rows)
    program = program.lower(x).compile().as_text()
    assert not [op for op in ("all-reduce(", "all-gather(", "all-to-all(") if op in program]


def test_evaluation_uses_running_statistics():
    weight, bias, mean, var = parameters(5)
    model = bind(*layer(5, None, weight, bias, mean, var))
    x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    expected = (x - mean) / np.sqrt(var + 1e-5) * weight + bias
    np.testing.assert_allclose(model(jnp.asarray(x), train=False), expected, atol=1e-5)
    np.testing.assert_array_equal(model.running_mean[...], mean.astype(np.float32))


def test_bad_batches_are_named():
    with pytest.raises(ValueError, match=r"10 rows cannot be cut into groups of 4"):
        run(*layer(5, 4, *parameters(5)), jnp.ones((10, 5)))
    with pytest.raises(ValueError, match="more than one value a channel"):
        run(*layer(5, None, *parameters(5)), jnp.ones((1, 5)))


def test_bfloat16_keeps_float32_statistics():
    x = (np.random.default_rng(0).normal(size=(512, 4)) + 3).astype(np.float32)
    arguments = layer(4, None, *parameters(4))
    y, stats = run(*arguments, jnp.asarray(x, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    expected = batch_norm(jnp.asarray(x, jnp.bfloat16), 512, *parameters(4))
    np.testing.assert_allclose(stats["running_var"], expected[2], rtol=1e-5)
    np.testing.assert_allclose(np.asarray(y, np.float32), expected[0], atol=3e-2)


def test_layer_norm_equals_float64():
    x = (np.random.default_rng(0).normal(size=(7, 9, 32)) * 0.01 + 5).astype(np.float32)
    weight, bias, *_ = parameters(32)
    graphdef, *_ = split(LayerNorm(32))
    tree = {"weight": jnp.asarray(weight, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    y = bind(graphdef, tree, {})(jnp.asarray(x))
    np.testing.assert_allclose(y, expected * weight + bias, atol=2e-3)


def zero_row() -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    x[3] = 0
    return x


def test_unit_of_a_zero_vector():
    """NUM-01: finite, and so is the gradient of any scalar of it."""
    x = zero_row()
    y = unit(x)
    np.testing.assert_array_equal(y[3], 0)
    np.testing.assert_allclose(np.linalg.norm(np.delete(y, 3, 0), axis=1), 1, rtol=1e-6)
    weights = np.random.default_rng(1).normal(size=x.shape)
    scalars = (
        lambda x: jnp.sum(unit(x) * weights),
        lambda x: jnp.sum(jnp.log1p(unit(x) ** 2)),
        lambda x: jax.nn.logsumexp(unit(x) @ unit(x).T / 0.01),
    )
    for scalar in scalars:
        gradient = jax.jit(jax.grad(scalar))(x)
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[3], 0)


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1.0, 1e15])
def test_unit_of_any_size(size):
    x = np.full((2, 3), size, np.float32)
    y, gradient = unit(x), jax.grad(lambda x: jnp.sum(unit(x)[:, 0]))(x)
    assert np.isfinite(y).all()
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(np.linalg.norm(y, axis=1), float(size > 1e-12), rtol=1e-6)


def test_unit_widens():
    assert unit(jnp.ones((2, 3), jnp.bfloat16)).dtype == jnp.float32
    with jax.enable_x64(True):
        assert unit(jnp.ones((2, 3), jnp.float64)).dtype == jnp.float64


def test_unit_of_nan_stays_nan():
    """A diverged model must not look like one whose features are zero."""
    assert np.all(np.isnan(unit(jnp.asarray([[np.nan, 1.0]]))))
    assert np.any(np.isnan(unit(jnp.asarray([[np.inf, 1.0]]))))
