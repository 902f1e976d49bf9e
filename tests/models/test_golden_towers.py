"""The three towers against the reference: every recorded stage, output, statistic and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_files import assert_close_to_max, assert_norms_close, golden, golden_json
from golden_models import recorded, text_of, vision_of

from protoclip_jax.interop.torch_names import fill, to_torch
from protoclip_jax.models.clip import bind, split
from protoclip_jax.models.resnet import ModifiedResNet
from protoclip_jax.models.start import Draws
from protoclip_jax.models.text import TextTransformer
from protoclip_jax.models.vit import VisionTransformer

pytestmark = pytest.mark.core

VALUES, GRADIENTS = 1e-4, 5e-4
NOISE = ("attnpool.k_proj.bias",)  # zero in exact arithmetic


def draws() -> Draws:
    return Draws(jax.random.key(0))


def load(tower: nnx.Module, state: dict, root: str):
    """The tower's definition and the golden weights as trees with `root` on top."""
    graphdef, params, stats = split(tower)
    return graphdef, *fill(state, {root: params}, {root: stats})


def run(graphdef, params, stats, root, cotangent, call):
    """Stages, embedding, loss, new statistics and gradients of sum(embedding * cotangent)."""

    def loss(params):
        model = bind(graphdef, params[root], stats[root])
        with recorded(model) as stages:
            embedding = call(model)
        moved = {root: split(model)[2]}
        return jnp.sum(embedding * cotangent), (embedding, stages, moved)

    with jax.default_matmul_precision("highest"):
        (value, (embedding, stages, moved)), gradients = jax.jit(
            jax.value_and_grad(loss, has_aux=True)
        )(params)
    return value, embedding, stages, moved, to_torch(gradients, {})


def check_gradients(gradients, file, key, prefix=""):
    expected = golden(file, f"{key}/grad/")
    assert expected
    for name, array in expected.items():
        if not name.endswith(NOISE):
            assert_close_to_max(gradients[prefix + name], array, GRADIENTS, f"{key} {name}")
    names = golden_json("norm_names")[file + ".npz"][f"{key}/gradnorm"]
    norms = [np.linalg.norm(gradients[prefix + name]) for name in names]
    expected = golden(file)[f"{key}/gradnorm"]
    assert_norms_close(norms, expected, GRADIENTS, names, NOISE)
    assert len(names) == len(gradients)


@pytest.mark.accelerator
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_resnet(mode):
    file = "models_rn_tower"
    state, inputs = golden(file, "sd/"), golden(file, "in/")
    embed_dim = state["attnpool.c_proj.weight"].shape[0]
    tower = ModifiedResNet(vision_of(state, ""), embed_dim, None, dtype=jnp.float32, draws=draws())
    state = {f"visual.{name}": array for name, array in state.items()}
    graphdef, params, stats = load(tower, state, "visual")
    images = jnp.asarray(inputs["image"].transpose(0, 2, 3, 1))
    train = mode == "train"
    value, embedding, stages, moved, gradients = run(
        graphdef, params, stats, "visual", inputs["cot"], lambda m: m(images, train=train)
    )
    assert_close_to_max(embedding, golden(file)[f"{mode}/out/embed"], VALUES, "embed")
    assert_close_to_max(value, golden(file)[f"{mode}/loss"], VALUES, "loss")
    for name, array in golden(file, f"{mode}/stage/").items():
        ours = resnet_stage(name, stages)
        ours = ours.transpose(0, 3, 1, 2) if ours.ndim == 4 else ours
        assert_close_to_max(ours, array, VALUES, f"{mode} {name}")
    if train:
        for name, array in golden(file, "train/newstats/").items():
            moved_name = to_torch({}, moved)["visual." + name]
            assert_close_to_max(moved_name, array, VALUES, name)
    else:
        jax.tree.map(np.testing.assert_array_equal, moved, stats)
    check_gradients(gradients, file, mode, "visual.")


def resnet_stage(name: str, stages: dict):
    """A stage by torch's name, in NHWC."""
    if name == "relu1":
        return np.maximum(stages["bn1"], 0)
    if name == "avgpool":
        stem = np.maximum(stages["bn3"], 0)
        b, h, w, c = stem.shape
        return stem.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))
    path = name.replace(".", "/")
    last = [key for key in stages if key.startswith(path + "/") and key.count("/") == 1]
    return stages[path] if path in stages else stages[max(last)]


@pytest.mark.accelerator
@pytest.mark.parametrize("activation", ["quickgelu", "gelu"])
def test_vision_transformer(activation):
    file = "models_vit_tower"
    state, inputs = golden(file, "sd/"), golden(file, "in/")
    tower = VisionTransformer(
        vision_of(state, ""), state["proj"].shape[1], activation, dtype=jnp.float32, draws=draws()
    )
    state = {f"visual.{name}": array for name, array in state.items()}
    graphdef, params, stats = load(tower, state, "visual")
    images = jnp.asarray(inputs["image"].transpose(0, 2, 3, 1))
    value, embedding, stages, _, gradients = run(
        graphdef, params, stats, "visual", inputs["cot"], lambda m: m(images)
    )
    assert_close_to_max(embedding, golden(file)[f"{activation}/out/embed"], VALUES, "embed")
    assert_close_to_max(value, golden(file)[f"{activation}/loss"], VALUES, "loss")
    for name, array in golden(file, f"{activation}/stage/").items():
        ours = stages[name.replace(".", "/")]
        ours = ours.transpose(0, 3, 1, 2) if ours.ndim == 4 else ours
        assert_close_to_max(ours, array, VALUES, f"{activation} {name}")
    check_gradients(gradients, file, activation, "visual.")


@pytest.mark.accelerator
@pytest.mark.parametrize("activation", ["quickgelu", "gelu"])
def test_text_transformer(activation):
    file = "models_text_tower"
    state, inputs = golden(file, "sd/"), golden(file, "in/")
    embed_dim = state["text_projection"].shape[1]
    tower = TextTransformer(text_of(state), embed_dim, activation, dtype=jnp.float32, draws=draws())
    graphdef, params, stats = load(tower, state, "text")
    tokens = jnp.asarray(inputs["text"])
    value, embedding, stages, _, gradients = run(
        graphdef, params, stats, "text", inputs["cot"], lambda m: m(tokens)
    )
    expected = golden(file, f"{activation}/stage/")
    assert_close_to_max(embedding, golden(file)[f"{activation}/out/embed"], VALUES, "embed")
    assert_close_to_max(value, golden(file)[f"{activation}/loss"], VALUES, "loss")
    # We normalise only the pooled token, so the whole ln_final is seen at those positions.
    pooled = expected.pop("ln_final")[np.arange(len(tokens)), inputs["eot_index"]]
    assert_close_to_max(stages["ln_final"], pooled, VALUES, "ln_final")
    assert_close_to_max(stages["ln_final"], expected.pop("pooled_before_projection"), VALUES)
    embedded = state["token_embedding.weight"][inputs["text"]]
    np.testing.assert_array_equal(embedded, expected.pop("token_embedding"))
    for name, array in expected.items():
        assert_close_to_max(stages[name.replace(".", "/")], array, VALUES, f"{activation} {name}")
    check_gradients(gradients, file, activation)
