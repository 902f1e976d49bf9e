"""The pure functions around the model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protoclip_jax.models.clip import apply, apply_image, apply_text, initialise
from protoclip_jax.models.presets import (
    CLIPConfig,
    ProjectionConfig,
    ResNetConfig,
    TextConfig,
    ViTConfig,
)

TEXT = TextConfig(77, 600, 32, 4, 2)
HEAD = ProjectionConfig(1, 24, 16)
RESNET = CLIPConfig(32, ResNetConfig((1, 1, 1, 1), 8, 32), TEXT, "quickgelu", HEAD)
VIT = CLIPConfig(32, ViTConfig(32, 8, 32, 2, 4), TEXT, "gelu", HEAD)
END = 599


def batch(size: int = 8, tokens: int = 16):
    random = np.random.default_rng(0)
    images = random.normal(size=(size, 32, 32, 3)).astype(np.float32)
    text = np.zeros((size, tokens), np.int32)
    for row in text:
        end = random.integers(1, tokens)
        row[:end], row[end] = random.integers(1, END, end), END
    return images, text


made = jax.jit(initialise, static_argnums=(0, 2))


def start(config, dtype=jnp.float32):
    """A model whose residual branches and statistics are not at their trivial start."""
    graphdef, *arrays = made(config, 1, dtype)
    params, stats = jax.device_get(arrays)  # of JAX's, each shape would be added by its own program
    random = np.random.default_rng(9)
    params = jax.tree.map(
        lambda x: x + np.float32(0.1) * random.normal(size=x.shape).astype("f"), params
    )
    stats = jax.tree.map(
        lambda x: x + np.float32(0.1) * random.random(size=x.shape, dtype="f"), stats
    )
    return graphdef, params, stats


run = jax.jit(apply, static_argnames=("graphdef", "train", "train_image", "project"))
run_image = jax.jit(apply_image, static_argnums=0)
run_text = jax.jit(apply_text, static_argnums=0)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("config", [RESNET, VIT])
def test_shapes_without_arrays(config):
    graphdef, params, stats = jax.eval_shape(lambda seed: initialise(config, seed), 0)
    real = made(config, 0)
    assert graphdef == real[0]
    assert hash(graphdef) == hash(real[0])
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (params, stats))
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), real[1:])
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((params, stats)))


def test_paths_are_those_of_the_contract():
    _, params, stats = jax.eval_shape(lambda: initialise(RESNET, 0))
    assert {"logit_scale", "logit_scale_proto", "image_projection_head"} <= set(params)
    assert params["visual"]["layer1"]["0"]["conv1"]["kernel"].shape == (1, 1, 8, 8)
    assert stats["visual"]["layer1"]["0"]["bn1"]["running_var"].shape == (8,)
    assert type(params) is type(params["visual"]["layer1"]) is dict


def test_same_seed_same_model():
    first, again, other = (made(VIT, seed)[1] for seed in (3, 3, 4))
    assert_equal(first, again)
    assert_equal(first, made(VIT, jax.random.key(3))[1])
    # Not compiled: each array by a program of its own.
    assert_equal(first, initialise(VIT, 3)[1])
    assert np.abs(first["text"]["text_projection"] - other["text"]["text_projection"]).max() > 0.1


@pytest.mark.parametrize("config", [RESNET, VIT])
def test_evaluation_leaves_the_statistics(config):
    model = start(config)
    features, stats = run(*model, *batch(), train=False)
    assert_equal(stats, model[2])
    for name, feature in features._asdict().items():
        np.testing.assert_allclose(np.linalg.norm(feature, axis=1), 1, rtol=1e-5, err_msg=name)


def test_training_moves_all_statistics_and_no_argument():
    model = start(RESNET)
    before = jax.tree.map(np.array, model[2])
    _, stats = run(*model, *batch(), train=True)
    assert_equal(model[2], before)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != b)), stats, before))


def test_locked_image_tower():
    """Its statistics stand still and are used; the heads' move."""
    model = start(RESNET)
    features, stats = run(*model, *batch(), train=True, train_image=False)
    evaluated, _ = run(*model, *batch(), train=False)
    assert_equal(features.image, evaluated.image)
    assert_equal(stats["visual"], model[2]["visual"])
    moved = stats["image_projection_head"], model[2]["image_projection_head"]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != b)), *moved))


def test_heads_do_not_run_without_project():
    model = start(RESNET)
    features, stats = run(*model, *batch(), train=True, project=False)
    full, _ = run(*model, *batch(), train=True)
    assert features.image_projected is None
    assert features.text_projected is None
    assert_equal((features.image, features.text), (full.image, full.text))
    for head in ("image_projection_head", "text_projection_head"):
        assert_equal(stats[head], model[2][head])


def test_plain_clip_has_no_heads():
    model = made(dataclasses.replace(VIT, projection=None), 0)
    assert set(model[1]) == {"visual", "text", "logit_scale"}
    assert model[2] == {}
    features, stats = run(*model, *batch(), train=True)
    assert features.image_projected is None
    assert stats == {}


@pytest.mark.parametrize("config", [RESNET, VIT])
def test_embeddings_are_the_features_before_normalisation(config):
    model = start(config)
    images, tokens = batch()
    features, _ = run(*model, images, tokens, train=False)
    for embedding, feature in (
        (run_image(*model, images), features.image),
        (run_text(*model, tokens), features.text),
    ):
        norm = np.linalg.norm(embedding, axis=1, keepdims=True)
        assert np.abs(norm - 1).max() > 0.01
        np.testing.assert_allclose(embedding / norm, feature, atol=1e-5)


def test_short_batches_of_tokens():
    """Causal, so what follows the end token does not count, nor how much of it there is."""
    model = start(VIT)
    _, tokens = batch(tokens=16)
    lengths = (16, 32, 77)
    padded = [np.pad(tokens, ((0, 0), (0, length - 16))) for length in lengths]
    with jax.default_matmul_precision("highest"):
        short, *longer = (np.asarray(run_text(*model, ids)) for ids in padded)
    for embedding in longer:
        np.testing.assert_allclose(embedding, short, atol=1e-5)
    garbage = padded[1].copy()
    garbage[:, 20:] = 5
    np.testing.assert_allclose(run_text(*model, garbage), short, atol=1e-5)


def test_the_first_end_token_is_pooled():
    model = start(VIT)
    _, tokens = batch(tokens=16)
    twice = tokens.copy()
    twice[:, -1] = END
    np.testing.assert_allclose(run_text(*model, twice), run_text(*model, tokens), atol=1e-5)


def test_wrong_sizes_are_named():
    model = made(VIT, 0)
    images, _ = batch()
    with pytest.raises(ValueError, match="16x16 pixels: this model reads 32x32"):
        run_image(*model, images[:, :16, :16])
    with pytest.raises(ValueError, match="78 tokens: this model reads at most 77"):
        run_text(*model, np.ones((2, 78), np.int32))


@pytest.mark.parametrize("config", [RESNET, VIT])
@pytest.mark.parametrize("train", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_bfloat16_is_close(config, train):
    images, tokens = batch(16)
    exact = start(config)
    features, stats = run(*exact, images, tokens, train=train)
    rounded, rounded_stats = run(
        start(config, jnp.bfloat16)[0], *exact[1:], images, tokens, train=train
    )
    for name, feature in rounded._asdict().items():
        assert feature.dtype == jnp.float32
        cosine = np.sum(feature * getattr(features, name), axis=1)
        assert cosine.min() > 0.995, name
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(rounded_stats))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.1), rounded_stats, stats)


@pytest.mark.parametrize("config", [RESNET, VIT])
def test_float64_end_to_end(config):
    """float64 in, float64 out, and float32 agrees: nothing inside is narrower than asked."""
    images, tokens = batch()
    graphdef, params, stats = start(config)
    with jax.default_matmul_precision("highest"):
        narrow, _ = run(graphdef, params, stats, images, tokens, train=True)
    with jax.enable_x64(True):
        params, stats = jax.tree.map(np.float64, (params, stats))
        graphdef, *_ = jax.eval_shape(lambda: initialise(config, 1, jnp.float64))
        features, stats = run(graphdef, params, stats, images.astype(float), tokens, train=True)
        assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves((features, stats)))
    for a, b in zip(narrow, features, strict=True):
        difference = np.abs(a - np.asarray(b)).max()
        assert 1e-12 < difference < 1e-4


@pytest.mark.parametrize("config", [RESNET, VIT])
def test_gradients_are_finite_at_degenerate_inputs(config):
    """Equal rows (no variance), black pictures, and heads that give zero."""
    graphdef, params, stats = made(config, 0)
    head = params["image_projection_head"]["layers"]["3"]
    head["kernel"], head["bias"] = 0 * head["kernel"], 0 * head["bias"]
    images, tokens = np.zeros((4, 32, 32, 3), np.float32), np.full((4, 5), END, np.int32)

    def loss(params):
        features, _ = run(graphdef, params, stats, images, tokens, train=True)
        return sum(jnp.sum(feature[:, 0] + feature[:, 1] ** 2) for feature in features)

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
