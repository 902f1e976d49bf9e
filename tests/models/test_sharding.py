"""Where parameters lie: every preset on the table, and what eight devices then hold."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from protoclip_jax.models import sharding
from protoclip_jax.models.clip import initialise
from protoclip_jax.models.presets import PRESETS, ProjectionConfig, preset
from protoclip_jax.models.sharding import ShardingError, describe, partition_specs

# The paper's heads; one more hidden layer than usual, so that all kinds of layer occur.
HEADS = ProjectionConfig(2, 2048, 128)


def shapes_of(name: str) -> tuple[dict, dict]:
    """Shapes of a preset with heads; a ViT-L is never allocated."""
    config = dataclasses.replace(preset(name), projection=HEADS)
    return jax.eval_shape(lambda: initialise(config, 0))[1:]


def mesh_of(data: int, fsdp: int) -> jax.sharding.Mesh:
    return jax.make_mesh(
        (data, fsdp),
        ("data", "fsdp"),
        devices=jax.devices()[: data * fsdp],
        axis_types=(AxisType.Auto, AxisType.Auto),
    )


def by_path(tree) -> dict:
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, PartitionSpec))
    return {"/".join(str(key.key) for key in keys): leaf for keys, leaf in flat}


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def nbytes(leaf, sizes) -> int:
    return math.prod(sizes) * leaf.dtype.itemsize


@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_of_every_preset(name):
    """Each is on the table, its partition has no more axes than it, and a device gets its share."""
    mesh = mesh_of(1, 8)
    params, stats = shapes_of(name)
    held = total = 0
    for tree in (params, stats):
        specs = partition_specs(tree)
        assert jax.tree.structure(tree) == jax.tree.structure(specs)
        leaves, specs = by_path(tree), by_path(specs)
        for path, leaf in leaves.items():
            # Raises where the axis does not divide, so the published sizes all do.
            own = NamedSharding(mesh, specs[path]).shard_shape(leaf.shape)
            held, total = held + nbytes(leaf, own), total + nbytes(leaf, leaf.shape)
            if "running" in path:
                assert own == leaf.shape
    # The most is left whole in ViT-B-32: its patch embedding, 9 of 649 MB.
    assert total / 8 <= held <= 1.12 * total / 8


@pytest.mark.parametrize("name", ["RN50", "ViT-B-32"])
def test_every_large_matrix_is_cut_once(name):
    """Along one axis; the exceptions are vectors, positions and the first convolutions."""
    params, _ = shapes_of(name)
    leaves, specs = by_path(params), by_path(partition_specs(params))
    for path, leaf in leaves.items():
        cut = [axis for axis in specs[path] if axis is not None]
        small = leaf.ndim < 2 or "positional_embedding" in path or path.startswith("visual/conv")
        assert cut == ([] if small else ["fsdp"]), path


@pytest.mark.parametrize(("data", "fsdp"), [(2, 4), (1, 8)])
@pytest.mark.parametrize("name", ["tiny-rn", "tiny-vit"])
def test_devices_hold_their_share(name, data, fsdp):
    """Of real arrays; the `data` axis copies what the `fsdp` axis cuts."""
    mesh = mesh_of(data, fsdp)
    params, _ = shapes_of(name)
    placed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(params, mesh))
    arrays = jax.device_put(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), params), placed)
    held = dict.fromkeys(jax.devices(), 0)
    for path, array in by_path(arrays).items():
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
        if array.size >= 2**15:
            assert array.addressable_shards[0].data.size == array.size // fsdp, path
    total = sum(array.nbytes for array in jax.tree.leaves(arrays))
    assert min(held.values()) >= total / fsdp
    assert max(held.values()) <= 1.1 * total / fsdp


def test_initialised_where_it_will_lie():
    """The way the trainer does it, with the same numbers as on one device."""
    config = dataclasses.replace(
        preset("tiny-vit"),
        projection=ProjectionConfig(1, 32, 16),
        text=dataclasses.replace(preset("tiny-vit").text, vocab_size=64, layers=1),
        vision=dataclasses.replace(preset("tiny-vit").vision, layers=1),
    )
    mesh = mesh_of(2, 4)
    specs = partition_specs(jax.eval_shape(lambda: initialise(config, 0)[1]), mesh)
    placed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    cut = jax.jit(lambda: initialise(config, 0)[1], out_shardings=placed)()
    jax.tree.map(np.testing.assert_array_equal, cut, jax.jit(lambda: initialise(config, 0)[1])())
    kernel = cut["visual"]["transformer"]["resblocks"]["0"]["mlp"]["c_fc"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(128, 128)}


def test_unknown_paths_are_all_named():
    tree = {
        "visual": {"new_layer": {"gain": shape(3)}, "proj": shape(4, 4)},
        "text": {"adapter": shape(2, 2)},
    }
    with pytest.raises(ShardingError) as raised:
        partition_specs(tree)
    assert "visual/new_layer/gain" in str(raised.value)
    assert "text/adapter" in str(raised.value)
    assert "visual/proj" not in str(raised.value)


@pytest.mark.parametrize("name", ["my_logit_scale", "old_bias", "token_embedding_2"])
def test_only_whole_keys_match(name):
    with pytest.raises(ShardingError, match=name):
        partition_specs({name: shape(4)})


def test_what_does_not_divide_stays_whole():
    """Only where a mesh is given, and only by the axis that is cut."""
    tree = {
        "odd": {"c_fc": {"kernel": shape(8, 12)}},
        "even": {"c_fc": {"kernel": shape(3, 16)}},
        "rows": {"c_proj": {"kernel": shape(12, 8)}},
    }
    columns, rows, whole = (PartitionSpec(*axes) for axes in ((None, "fsdp"), ("fsdp", None), ()))
    wanted = {
        None: (columns, columns, rows),
        (2, 4): (columns, columns, rows),
        (1, 8): (whole, columns, whole),
        (1, 3): (columns, whole, rows),
    }
    for sizes, expected in wanted.items():
        mesh = None if sizes is None else mesh_of(*sizes)
        specs = by_path(partition_specs(tree, mesh))
        found = tuple(specs[f"{name}/kernel"] for name in ("odd/c_fc", "even/c_fc", "rows/c_proj"))
        assert found == expected, sizes


def test_first_match_wins(monkeypatch):
    rows = ((r"conv1/kernel", PartitionSpec("fsdp")), (r"conv\d/kernel", PartitionSpec()))
    tree = {"conv1": {"kernel": shape(8)}, "conv2": {"kernel": shape(8)}}
    monkeypatch.setattr(sharding, "TABLE", rows)
    assert list(by_path(partition_specs(tree)).values()) == [PartitionSpec("fsdp"), PartitionSpec()]
    monkeypatch.setattr(sharding, "TABLE", rows[::-1])
    assert list(by_path(partition_specs(tree)).values()) == [PartitionSpec(), PartitionSpec()]


def test_stem_is_whole_and_stages_are_cut():
    """The rows of the table that overlap: both are convolutions, the stem's row comes first."""
    params, _ = shapes_of("tiny-rn")
    specs = by_path(partition_specs(params))
    assert specs["visual/conv2/kernel"] == PartitionSpec()
    last = PartitionSpec(None, None, None, "fsdp")
    assert specs["visual/layer1/0/conv2/kernel"] == last
    assert specs["visual/layer1/0/downsample/conv/kernel"] == last


def test_no_row_of_the_table_is_dead():
    """A row that nothing reaches is a mistake in a pattern, or in the order."""
    paths = [
        path for name in ("tiny-rn", "tiny-vit") for t in shapes_of(name) for path in by_path(t)
    ]
    for pattern, spec in sharding.TABLE:
        alone = [p for p in paths if sharding._lookup(p) is spec]
        assert alone, pattern


def test_description_has_a_line_for_each_array_and_the_total():
    tree = {"logit_scale": shape(), "visual": {"proj": shape(6, 4)}}
    lines = describe(tree, partition_specs(tree)).splitlines()
    assert lines[0].split() == ["logit_scale", "scalar", "float32", "()"]
    assert lines[1].split(maxsplit=3) == ["visual/proj", "6x4", "float32", "('fsdp', None)"]
    assert lines[2] == "2 arrays, 25 numbers"


def test_weights_travel_in_the_compute_type_and_gradients_stay_cut():
    mesh, rng = mesh_of(2, 4), np.random.default_rng(0)
    kernel, table = (rng.normal(size=(8, 16)).astype(np.float32) for _ in range(2))
    params = {
        "text": {"mlp": {"c_fc": {"kernel": kernel, "bias": np.ones(16, np.float32)}}},
        "token_embedding": table,
        "image_projection_head": {"layers": {"0": {"kernel": kernel}}},
    }
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(params, mesh))
    cut = jax.device_put(params, places)

    @jax.jit
    def both(cut):
        def loss(cut):
            whole = sharding.gathered(cut, mesh, jnp.bfloat16)
            return sum(jnp.sum(leaf.astype(jnp.float32) ** 2) for leaf in jax.tree.leaves(whole))

        return sharding.gathered(cut, mesh, jnp.bfloat16), jax.grad(loss)(cut)

    whole, gradient = both(cut)
    types = {path: leaf.dtype for path, leaf in by_path(whole).items()}
    assert types.pop("text/mlp/c_fc/kernel") == jnp.bfloat16
    assert set(types.values()) == {jnp.dtype(jnp.float32)}
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(whole))
    for found, place, leaf in zip(*map(jax.tree.leaves, (gradient, places, params)), strict=True):
        assert found.sharding == place
        np.testing.assert_allclose(found, 2 * leaf, rtol=2**-8)  # bfloat16 rounds once
    assert sharding.gathered(params, mesh_of(8, 1)) is params
