"""The prototype loss in chunks of rows: the plain formula's numbers in less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from protoclip_jax.objectives import prototype
from protoclip_jax.objectives.prototype import prototype_loss

ROWS, K, WIDTH = 40, 11, 6


def plain_loss(features, scale, student, teacher, labels, used, temperature):
    """The formula as it stands, all rows at once, differentiated by JAX."""
    student, teacher = (jnp.where(used[:, None], found, 0) for found in (student, teacher))
    lowest = jnp.finfo(features.dtype).min
    scores = jnp.where(used, jnp.exp(scale) * features @ student.T, lowest)
    own = jnp.arange(len(used)) == labels[:, None]
    if temperature is None:
        target = own
    else:
        similar = teacher[jnp.clip(labels, 0, len(used) - 1)] @ teacher.T / temperature
        target = jax.nn.softmax(jnp.where(used, similar, lowest))
    counts = jnp.any(own & used, axis=1)
    losses = -jnp.sum(target * jax.nn.log_softmax(scores), axis=1)
    right = counts & (jnp.argmax(scores, axis=1) == labels)
    loss = jnp.sum(jnp.where(counts, losses, 0)) / jnp.maximum(jnp.sum(counts), 1)
    return loss, 100 * jnp.mean(right)


def inputs(rows=ROWS, k=K, width=WIDTH, dtype=np.float64) -> dict:
    """Random ones: two equal prototypes, two unused, and rows with labels that do not count."""
    rng = np.random.default_rng(3)

    def unit(count):
        x = rng.normal(size=(count, width))
        return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(dtype)

    used = np.ones(k, bool)
    used[[2, 7]] = False
    labels = rng.integers(0, k, rows).astype(np.int32)
    labels[[1, 5, 9, 13]] = -1, k, 2**31 - 1, 7
    arrays = {
        "features": unit(rows),
        "scale": np.array(2.3, dtype),
        "student": 0.7 * unit(k),
        "teacher": 0.7 * unit(k),
        "labels": labels,
        "used": used,
    }
    arrays["student"][4] = arrays["student"][3]
    labels[20:24] = 3, 4, 3, 4
    arrays["features"][20:24] = arrays["student"][3] / np.linalg.norm(arrays["student"][3])
    return arrays


NAMES = ("features", "scale", "student", "teacher", "labels", "used")


@functools.partial(jax.jit, static_argnames=("loss", "temperature", "mesh", "chunk"))
def compiled(loss, arrays, temperature, mesh, chunk):
    """((loss, accuracy), (gradient by the features, by the logit scale))."""
    function = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    options = {} if mesh is None else {"mesh": mesh}
    return function(*(arrays[name] for name in NAMES), temperature, **options)


def values(loss, arrays, temperature, mesh=None):
    # The chunk is part of what is compiled.
    return jax.device_get(compiled(loss, arrays, temperature, mesh, prototype._SCORES_AT_ONCE))


@pytest.fixture(params=[1, 170, 10**6], ids=["8 rows", "16 rows", "all rows"])
def chunked(request, monkeypatch):
    """Chunks that divide the rows, that leave a rest, and one."""
    monkeypatch.setattr(prototype, "_SCORES_AT_ONCE", request.param)


@pytest.mark.parametrize("temperature", [None, 0.01, 0.5])
@pytest.mark.parametrize("shape", [None, (4, 2)], ids=["one device", "eight devices"])
def test_chunks_give_the_plain_formula_in_float64(chunked, temperature, shape):
    auto = (AxisType.Auto,) * 2
    mesh = shape and jax.make_mesh(shape, ("data", "fsdp"), axis_types=auto)
    with jax.enable_x64(True):
        arrays = inputs()
        expected = values(plain_loss, arrays, temperature)
        actual = values(prototype_loss, arrays, temperature, mesh=mesh)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.dtype == np.float64
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-13)
    (loss, accuracy), (by_features, by_scale) = actual
    assert loss > 0.1
    assert 0 < accuracy < 100
    assert abs(by_scale) > 1e-3
    counts = (arrays["labels"] >= 0) & (arrays["labels"] < K) & ~np.isin(arrays["labels"], (2, 7))
    assert np.count_nonzero(~counts) > 4
    np.testing.assert_array_equal(np.any(by_features != 0, axis=1), counts)


def test_the_chunk_is_one_for_small_problems_and_whole_tiles_else():
    assert prototype.chunk_rows(128, 320) == 128
    assert prototype.chunk_rows(64, 20_000) == 64
    for rows, k in ((512, 20_000), (500, 20_000), (7, 10**6), (8192, 65_536)):
        size = prototype.chunk_rows(rows, k)
        assert size == rows or size % 8 == 0
        assert size * k <= prototype._SCORES_AT_ONCE + 8 * k


def test_gradients_follow_what_comes_back(chunked):
    """Scaled, negative, through a function of the loss, under vmap; and nothing, without a NaN."""
    with jax.enable_x64(True):
        arrays = inputs()
        rest = [arrays[name] for name in NAMES[2:]]
        several = np.stack([arrays["features"], arrays["features"][::-1], arrays["features"]])
        scales = np.array([2.3, 0.5, 1.0])

        def gradients(loss, features, scales, rest):
            def of(features, scales):
                losses = jax.vmap(lambda x, scale: loss(x, scale, *rest, 0.1)[0])(features, scales)
                return -3 * losses[0] + losses[1] ** 2 + 0 * losses[2]

            return jax.grad(of, argnums=(0, 1))(features, scales)

        ours, plain = (
            jax.device_get(jax.jit(functools.partial(gradients, loss))(several, scales, rest))
            for loss in (prototype_loss, plain_loss)
        )
        shapes = jax.eval_shape(functools.partial(gradients, prototype_loss), several, scales, rest)
    for one, other, shape in zip(ours, plain, shapes, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-14)
        assert np.any(one[0] != 0)
        np.testing.assert_array_equal(one[2], 0)
        assert (one.shape, one.dtype) == (shape.shape, shape.dtype)


def test_without_a_gradient_it_is_the_same_loss(chunked):
    with jax.enable_x64(True):
        arrays = inputs()
        given = [arrays[name] for name in NAMES]
        ours, plain = (
            jax.jit(functools.partial(loss, temperature=0.1))(*given)
            for loss in (prototype_loss, plain_loss)
        )
        np.testing.assert_allclose(ours, plain, rtol=1e-12)


@pytest.mark.parametrize("temperature", [None, 0.01])
def test_float32_is_within_rounding_at_many_prototypes(temperature):
    arrays = inputs(512, 5000, 32, np.float32)
    assert prototype.chunk_rows(512, 5000) == 256
    ours, plain = (values(loss, arrays, temperature) for loss in (prototype_loss, plain_loss))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5 * np.abs(other).max())


@functools.cache
def memory_of(loss, rows: int, temperature: float | None) -> int:
    k, width = 20_000, 128
    shapes = (
        jax.ShapeDtypeStruct((rows, width), jnp.float32),
        jax.ShapeDtypeStruct((), jnp.float32),
        jax.ShapeDtypeStruct((k, width), jnp.float32),
        jax.ShapeDtypeStruct((k, width), jnp.float32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
        jax.ShapeDtypeStruct((k,), jnp.bool_),
    )
    function = jax.value_and_grad(
        functools.partial(loss, temperature=temperature), argnums=(0, 1), has_aux=True
    )
    return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("temperature", [None, 0.01])
@pytest.mark.parametrize("rows", [64, 512])
def test_compiled_memory_is_what_the_dry_run_counts(rows, temperature):
    counted = prototype.working_bytes(rows, 20_000, 128, soft=temperature is not None)
    small = 8 * 4 * rows * 128  # features and their gradients
    held = memory_of(prototype_loss, rows, temperature)
    assert 0.5 * counted <= held <= counted + small
    if rows == 512:  # rows x K is 41 MB
        assert held <= memory_of(plain_loss, rows, temperature) / 3
