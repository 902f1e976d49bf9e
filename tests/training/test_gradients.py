"""Part by part equals at once; rematerialisation changes memory only."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny_run import small_config, tiny_models, write_pairs  # noqa: F401 (a fixture)

from protoclip_jax.models import clip
from protoclip_jax.training import gradients, state
from protoclip_jax.training.phases import phase_of
from protoclip_jax.training.step import make_train_step

pytestmark = [pytest.mark.usefixtures("tiny_models")]

# float32 sums in another order; the gradients of so small a model are about 1e-2.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def inputs(config, mesh):
    rng = np.random.default_rng(0)
    rows, k, d = config.optimizer.batch, config.episode.prototypes, config.model.projection_width
    size = state.model_of(config).vision.image_size
    batch = {
        "image": rng.integers(0, 256, (rows, size, size, 3), np.uint8),
        "tokens": rng.integers(1, 49406, (rows, 16)).astype(np.int32),
        "position": np.arange(rows, dtype=np.int32),
        "labels": {name: rng.integers(0, k, rows).astype(np.int32) for name in ("image", "text")},
    }
    batch["tokens"][:, -1] = 49407
    counts = rng.integers(1, 3, k).astype(np.int32)
    means = [0.3 * rng.normal(size=(k, d)).astype(np.float32) for _ in range(4)]
    prototypes = {
        "image": {"centroids": means[0], "counts": counts},
        "text": {"centroids": means[1], "counts": counts},
        "text_in_image": means[2],
        "image_in_text": means[3],
    }
    batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(state.BATCH_AXES)))
    return batch, jax.device_put(prototypes, NamedSharding(mesh, PartitionSpec()))


def compiled(config, devices: int):
    mesh = jax.make_mesh(
        (devices, 1),
        state.BATCH_AXES,
        devices=jax.devices()[:devices],
        axis_types=(AxisType.Auto, AxisType.Auto),
    )
    graphdef, start = state.create(config, mesh)
    step = jax.jit(make_train_step(graphdef, config, phase_of(config, 1), mesh))
    arguments = (start, *inputs(config, mesh))
    return step.lower(*arguments).compile(), arguments


def one_step(config, devices: int):
    """Metrics, gradients (first Adam moments) and statistics after a prototype step."""
    program, arguments = compiled(config, devices)
    after, metrics = program(*arguments)
    moments = {group: found.mu for group, found in after["opt_state"].items()}
    return jax.device_get((metrics, moments, after["batch_stats"]))


def recipe(**settings):
    common = {"optimizer__batch": 16, "data__augmentation": "light", "optimizer__clip_norm": 10}
    return small_config("pairs.tsv", **(common | settings))


def assert_close(left, right):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **CLOSE), left, right)


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_parts_equal_the_whole_where_rows_do_not_mix(devices):
    """A ViT with linear heads has no BatchNorm."""
    settings = {"model__projection": 0}
    whole = one_step(recipe(**settings), 1)
    parts = one_step(recipe(**settings, optimizer__accumulate=4), devices)
    assert_close(parts, whole)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.long), 4])
@pytest.mark.parametrize("name", ["test-vit", "test-rn"])
def test_parts_are_groups_of_batch_statistics(name, devices):
    """Their statistics are those of groups of that size, and move once; a ViT has heads only."""
    settings = {"model__name": name}
    whole = one_step(recipe(**settings, model__batch_norm_group=8), 1)
    parts = one_step(recipe(**settings, optimizer__accumulate=2), devices)
    assert_close(parts, whole)


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-rn"])
def test_rematerialisation_keeps_less_for_the_backward_pass(name):
    """By what the forward hands to the backward pass: a CPU's compiler joins the two again."""
    config = recipe(model__name=name)
    graphdef, like = state.shapes(config)
    size = state.model_of(config).vision.image_size

    def kept_bytes(wrap) -> int:
        def forward(params, rows):
            return clip.apply(graphdef, params, stats, rows["image"], rows["tokens"], train=True)

        def residuals(params, batch_stats, rows):
            nonlocal stats
            stats = batch_stats
            return jax.vjp(lambda params: wrap(forward)(params, rows)[0], params)[1]

        stats = None
        rows = {
            "image": jax.ShapeDtypeStruct((16, size, size, 3), np.float32),
            "tokens": jax.ShapeDtypeStruct((16, 24), np.int32),
        }
        kept = jax.eval_shape(residuals, like["params"], like["batch_stats"], rows)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))

    plain, lean = kept_bytes(lambda forward: forward), kept_bytes(gradients.rematerialised)
    parameters = sum(4 * leaf.size for leaf in jax.tree.leaves(like["params"]))
    assert lean - parameters < 0.5 * (plain - parameters)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.long), 4])
@pytest.mark.parametrize("name", ["test-vit", "test-rn"])
def test_rematerialisation_changes_nothing(name, devices):
    settings = {"model__name": name}
    plain = one_step(recipe(**settings), 1)
    lean = one_step(recipe(**settings, model__rematerialise=True), devices)
    assert_close(lean, plain)


@pytest.mark.slow
def test_parts_need_less_memory_than_the_whole():
    settings = {"model__name": "tiny-vit", "optimizer__batch": 64, "episode__size": 64}
    used = [
        compiled(recipe(**settings, optimizer__accumulate=parts), 1)[0]
        .memory_analysis()
        .temp_size_in_bytes
        for parts in (1, 8)
    ]
    assert used[1] < 0.4 * used[0]
