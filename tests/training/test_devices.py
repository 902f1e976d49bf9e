"""The same step on one device and on several: both losses, both scales, global BatchNorm."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny_run import small_config, tiny_models, write_pairs  # noqa: F401 (a fixture)

from protoclip_jax.encoder import Encoder
from protoclip_jax.training import state
from protoclip_jax.training.phases import phase_of
from protoclip_jax.training.step import make_train_step

pytestmark = [pytest.mark.usefixtures("tiny_models")]


def mesh_of(shape):
    count = int(np.prod(shape))
    return jax.make_mesh(
        shape,
        state.BATCH_AXES,
        devices=jax.devices()[:count],
        axis_types=(AxisType.Auto, AxisType.Auto),
    )


def one_step(config, shape):
    """Metrics, gradients (first Adam moments) and statistics after one prototype step."""
    mesh = mesh_of(shape)
    graphdef, start = state.create(config, mesh)
    size = state.model_of(config).vision.image_size
    rng = np.random.default_rng(0)
    rows, k, d = config.optimizer.batch, config.episode.prototypes, config.model.projection_width
    batch = {
        "image": rng.normal(size=(rows, size, size, 3)).astype(np.float32),
        "tokens": rng.integers(1, 49406, (rows, 16)).astype(np.int32),
        "position": np.arange(rows, dtype=np.int32),
        "labels": {
            name: rng.integers(0, k, rows).astype(np.int32)
            for name in ("image", "text", "external")
        },
    }
    batch["tokens"][:, -1] = 49407

    def means():
        return 0.3 * rng.normal(size=(k, d)).astype(np.float32)

    counts = rng.integers(0, 3, k).astype(np.int32)
    prototypes = {
        "image": {"centroids": means(), "counts": counts},
        "text": {"centroids": means(), "counts": counts},
        "text_in_image": means(),
        "image_in_text": means(),
        "external": {"in_image": means(), "in_text": means(), "counts": counts},
    }
    batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(state.BATCH_AXES)))
    prototypes = jax.device_put(prototypes, NamedSharding(mesh, PartitionSpec()))
    step = jax.jit(make_train_step(graphdef, config, phase_of(config, 1), mesh))
    after, metrics = step(start, batch, prototypes)
    moments = {group: found.mu for group, found in after["opt_state"].items()}
    return jax.device_get((metrics, moments, after["batch_stats"]))


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("test-rn", ((8, 1),)),
        ("test-vit", ((4, 2),)),
        pytest.param("test-rn", ((1, 4), (4, 2)), marks=pytest.mark.slow),
        pytest.param("test-rn", ((2, 1), (4, 1)), marks=[pytest.mark.slow, pytest.mark.long]),
        pytest.param("test-vit", ((1, 4), (8, 1)), marks=pytest.mark.slow),
        pytest.param("test-vit", ((2, 1), (4, 1)), marks=[pytest.mark.slow, pytest.mark.long]),
    ],
    ids=str,
)
def test_one_and_several_devices_give_the_same_loss_and_gradients(name, shapes, tmp_path):
    config = small_config(
        tmp_path / "none.tsv",
        num_devices=8,
        model__name=name,
        optimizer__batch=16,
        episode__size=48,
        optimizer__clip_norm="none",
        data__teacher="given",
        objective__external=0.5,
    )
    with jax.default_matmul_precision("highest"):
        one, *others = (one_step(config, shape) for shape in ((1, 1), *shapes))
    for other in others:
        for key, value in one[0].items():
            np.testing.assert_allclose(other[0][key], value, rtol=1e-4, atol=1e-5, err_msg=key)
        for key in ("loss/total", "loss/clip", "loss/prototype", "loss/external"):
            np.testing.assert_allclose(other[0][key], one[0][key], rtol=1e-5, err_msg=key)
        assert_gradients_close(other[1], one[1])
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), other[2], one[2]
        )


# Zero in exact arithmetic (a bias before BatchNorm, keys' biases before a softmax): only rounding.
NOISE = ("projection_head']['layers']['0']['bias", "in_proj']['bias", "k_proj']['bias")


def assert_gradients_close(ours, theirs):
    """1e-4 of the largest entry of each array."""
    leaves = jax.tree_util.tree_leaves_with_path(theirs)
    largest = max(float(np.abs(leaf).max()) for _, leaf in leaves)
    for (path, expected), actual in zip(leaves, jax.tree.leaves(ours), strict=True):
        name = jax.tree_util.keystr(path)
        if any(part in name for part in NOISE):
            continue
        # Below a ten-thousandth of the largest gradient, float32 sums are rounding.
        bound = 1e-4 * max(float(np.abs(expected).max()), 1e-4 * largest)
        worst = float(np.abs(actual - expected).max())
        assert worst <= bound, f"{name}: {worst:.3e} > {bound:.3e}"


def test_encoder_spreads_its_batch():
    rng = np.random.default_rng(0)
    config = small_config("pairs.tsv", model__projection=None, num_devices=8)
    model = state.model_of(config)
    images, texts = rng.integers(0, 256, (19, 32, 32, 3), np.uint8), ["a kite", "two red kites"]
    found = []
    for shape in ((1, 1), (4, 2)):
        mesh = mesh_of(shape)
        graphdef, start = state.create(config, mesh)
        rows = NamedSharding(mesh, PartitionSpec(state.BATCH_AXES))
        encoder = Encoder(
            model, graphdef, start["params"], start["batch_stats"], sizes=(3, 12), rows=rows
        )
        assert all(encoder.supplies(number) for number in range(19))
        found.append((encoder.encode_image(images), encoder.encode_text(texts)))
    for one, eight in zip(*found, strict=True):
        # float32 products are summed in another order on another number of rows.
        np.testing.assert_allclose(eight, one, atol=1e-6)
