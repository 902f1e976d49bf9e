"""InfoNCE against the golden values, plain float64, and itself on eight devices."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import assert_close_to_max, golden
from jax.sharding import NamedSharding, PartitionSpec

from protoclip_jax.objectives.info_nce import info_nce
from protoclip_jax.objectives.logits import cross_entropy, similarity, wide

CASE = Path(__file__).parent.parent / "cases" / "NUM-05"
value_and_grads = jax.value_and_grad(info_nce, argnums=(0, 1, 2))


def unit_rows(seed: int, rows: int, width: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def plain(image: np.ndarray, text: np.ndarray, scale: float) -> float:
    """InfoNCE in float64, from its definition."""
    logits = np.exp(np.float64(scale)) * np.float64(image) @ np.float64(text).T

    def one_way(logits):
        top = logits.max(axis=1)
        return np.mean(top + np.log(np.exp(logits - top[:, None]).sum(axis=1)) - np.diag(logits))

    return (one_way(logits) + one_way(logits.T)) / 2


@pytest.mark.accelerator
@pytest.mark.core
@pytest.mark.parametrize(
    ("case", "scale"), [("scale14.29", np.log(1 / 0.07)), ("scale100", np.log(100)), ("scale1", 0)]
)
def test_golden_values_and_gradients(case, scale):
    inputs, expected = golden("losses", "in/"), golden("losses", f"clip/{case}/")
    loss, (image, text, scale_grad) = value_and_grads(
        inputs["image_features"], inputs["text_features"], np.array(scale, np.float32)
    )
    np.testing.assert_allclose(loss, expected["loss"], atol=1e-5, rtol=1e-5)
    assert_close_to_max(image, expected["grad_image"], 1e-5, "image gradient")
    assert_close_to_max(text, expected["grad_text"], 1e-5, "text gradient")
    assert_close_to_max(scale_grad, expected["grad_logit_scale_param"], 1e-5, "scale gradient")


@pytest.mark.accelerator
@pytest.mark.core
def test_golden_identical_features():
    inputs = golden("losses", "in/")
    expected = golden("losses", "degenerate/clip_identical_features/")
    same = np.repeat(inputs["image_features"][:1], len(inputs["image_features"]), axis=0)
    loss, grads = value_and_grads(same, same, inputs["logit_scale_param"])
    np.testing.assert_allclose(loss, expected["loss"], atol=1e-5, rtol=1e-5)
    for grad in grads:  # zero in exact arithmetic
        np.testing.assert_allclose(grad, 0, atol=1e-5)


@pytest.mark.parametrize("scale", [np.log(1 / 0.07), np.log(100)])
def test_equal_on_one_and_eight_devices(mesh, scale):
    image, text = unit_rows(1, 48, 12), unit_rows(2, 48, 12)
    scale = jnp.float32(scale)
    one, one_grads = jax.jit(value_and_grads)(image, text, scale)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    sharded = (jax.device_put(image, rows), jax.device_put(text, rows), scale)
    eight, eight_grads = jax.jit(
        jax.value_and_grad(lambda *args: info_nce(*args, mesh=mesh), argnums=(0, 1, 2))
    )(*sharded)
    np.testing.assert_allclose(one, plain(image, text, scale), rtol=1e-5)
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    for a, b in zip(eight_grads, one_grads, strict=True):
        assert_close_to_max(a, b, 1e-4)


def test_devices_hold_local_rows_only(mesh):
    rows, width = 64, 4
    image = jnp.ones((rows, width))
    step = jax.jit(jax.grad(lambda x: info_nce(x, image, jnp.float32(0), mesh=mesh)))
    text = step.lower(image).compile().as_text()
    assert f"f32[{rows // mesh.size},{rows}]" in text
    assert f"f32[{rows},{rows}]" not in text


def test_float64_stays_float64():
    with jax.enable_x64(True):
        image, text = np.float64(unit_rows(1, 8, 4)), np.float64(unit_rows(2, 8, 4))
        loss = info_nce(image, text, np.array(2.0))
        assert loss.dtype == jnp.float64
        np.testing.assert_allclose(loss, plain(image, text, 2.0), rtol=1e-12)


@pytest.mark.accelerator
def test_bfloat16_features_give_float32_logits():
    image = jnp.asarray(unit_rows(1, 64, 32), jnp.bfloat16)
    text = jnp.asarray(unit_rows(2, 64, 32), jnp.bfloat16)
    scale = jnp.float32(np.log(100))
    with jax.default_matmul_precision("bfloat16"):
        loss = info_nce(image, text, scale)
    assert loss.dtype == jnp.float32
    assert info_nce(image, text, jnp.bfloat16(2)).dtype == jnp.float32
    expected = plain(np.asarray(image, np.float64), np.asarray(text, np.float64), scale)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_logits_are_never_rounded_to_bfloat16():
    """Case NUM-05: 64 x 64 logits whose rounding to bfloat16 would move the loss by 4e-3."""
    logits = np.load(CASE / "logits.npy")
    expected = json.loads((CASE / "expected.json").read_text())
    identity = jnp.eye(len(logits), dtype=jnp.bfloat16)

    @jax.jit
    def losses(logits, identity):
        one_way_b = cross_entropy(similarity(*wide(logits, identity)), jnp.arange(len(logits)))
        return jnp.mean(one_way_b), info_nce(logits, identity, jnp.float32(0))

    with jax.default_matmul_precision("bfloat16"):
        one_way, both_ways = losses(logits, identity)
    # The expected value is that of the rows alone, image to text.
    assert abs(float(one_way) - expected["loss"]) <= expected["tolerance"]
    assert abs(float(both_ways) - plain(logits, np.eye(len(logits)), 0)) <= expected["tolerance"]


def test_matmuls_ask_for_full_precision():
    """On CPU every precision is exact, so the request itself is what can be checked."""
    x = jnp.ones((4, 3), jnp.bfloat16)
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda x: info_nce(x, x, jnp.float32(0))))(x))
    matmuls = jaxpr.count("dot_general[")
    assert matmuls >= 4
    assert jaxpr.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == matmuls


def test_batch_must_divide_over_the_devices(mesh):
    x = jnp.ones((12, 4))
    with pytest.raises(ValueError, match=r"batch of 12 does not divide over 8 devices.*multiple"):
        info_nce(x, x, jnp.float32(0), mesh=mesh)
