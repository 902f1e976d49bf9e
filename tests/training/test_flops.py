"""Operations counted in a jaxpr, against XLA's own count and by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from protoclip_jax.training.compiled import CompiledStep
from protoclip_jax.training.flops import flops
from protoclip_jax.training.state import make_mesh

CONVOLUTIONS = {
    "plain": {"window_strides": (1, 1), "padding": "VALID"},
    "padded": {"window_strides": (1, 1), "padding": ((1, 2), (0, 3))},
    "strided": {"window_strides": (2, 3), "padding": "SAME"},
    "image dilated": {
        "window_strides": (1, 1),
        "padding": ((2, 1), (3, 4)),
        "lhs_dilation": (2, 3),
    },
    "kernel dilated": {"window_strides": (1, 2), "padding": "SAME", "rhs_dilation": (3, 2)},
}


def counted(function, *arguments) -> float:
    return flops(jax.jit(function).trace(*arguments).jaxpr)


def by_xla(function, *arguments) -> float:
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_count_what_xla_counts(name):
    image, kernel = jnp.ones((3, 13, 11, 6)), jnp.ones((3, 5, 6, 10))

    def convolved(image, kernel):
        return lax.conv_general_dilated(
            image, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **CONVOLUTIONS[name]
        )

    assert counted(convolved, image, kernel) == by_xla(convolved, image, kernel) > 0

    # Its gradients are convolutions too, dilated ones.
    def with_gradients(image, kernel, cotangent):
        result, pull = jax.vjp(convolved, image, kernel)
        return result, pull(cotangent)

    given = image, kernel, jnp.ones_like(convolved(image, kernel))
    assert counted(with_gradients, *given) == by_xla(with_gradients, *given)
    assert counted(with_gradients, *given) == 3 * counted(convolved, image, kernel)


def test_groups_see_their_own_channels_only():
    image, kernel = jnp.ones((2, 9, 9, 8)), jnp.ones((3, 3, 2, 12))

    def convolved(image, kernel):
        return lax.conv_general_dilated(
            image,
            kernel,
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=4,
        )

    assert counted(convolved, image, kernel) == 2 * 2 * 7 * 7 * 12 * (3 * 3 * 2)


def test_products_with_batches_and_several_inner_axes():
    a, b = jnp.ones((5, 2, 3, 7)), jnp.ones((5, 3, 7, 4))
    assert counted(lambda a, b: jnp.einsum("bmij,bijn->bmn", a, b), a, b) == 2 * 5 * 2 * 4 * 3 * 7


def test_what_repeats_counts_as_often():
    square = jnp.ones((4, 4))
    one = 2 * 4**3

    def scanned(x):
        return lax.scan(lambda carry, _: (carry @ carry, None), x, length=7)[0]

    def chosen(x):
        return lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert counted(scanned, square) == 7 * one
    assert counted(chosen, square) == 2 * one
    assert counted(jax.checkpoint(lambda x: x @ x), square) == one
    assert counted(jax.jit(lambda x: x @ x), square) == one


def test_shards_count_for_all_devices():
    mesh, rows = make_mesh(2), PartitionSpec(("data", "fsdp"))
    product = jax.shard_map(
        lambda a, b: a @ b, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows
    )
    assert mesh.size > 1
    a, b = jnp.ones((16 * mesh.size, 3)), jnp.ones((3, 5))
    assert counted(product, a, b) == 2 * 16 * mesh.size * 3 * 5


def test_a_compiled_step_knows_the_last_programs_operations():
    step = CompiledStep(lambda state, batch: state @ batch["tokens"].astype(jnp.float32))
    assert step.flops is None
    for length in (3, 9):
        step(jnp.ones((2, 4)), {"tokens": jnp.ones((4, length), jnp.int32)})
        assert step.flops == 2 * 2 * 4 * length
