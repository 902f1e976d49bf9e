"""The whole model, with heads of 0, 1 and 2 hidden layers and without, against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import assert_close_to_max, assert_norms_close, golden, golden_json
from golden_models import config_of, recorded

from protoclip_jax.interop.torch_names import from_torch, to_torch
from protoclip_jax.models.clip import bind, initialise, split

pytestmark = pytest.mark.core

VALUES, GRADIENTS = 1e-4, 5e-4
FILES = [
    "models_clip_vit_headnone",
    pytest.param("models_clip_vit_head0", marks=pytest.mark.slow),
    pytest.param("models_clip_vit_head1", marks=pytest.mark.slow),  # its head is the ResNet's too
    "models_clip_vit_head2",
    "models_clip_rn_head1",
]
OUTPUTS = {
    "image": "image_features",
    "text": "text_features",
    "image_projected": "image_features_projected",
    "text_projected": "text_features_projected",
}


def forward(file: str, train: bool):
    """Loss, (features, stages, moved statistics) and gradients of the golden loss."""
    state, inputs = golden(file, "sd/"), golden(file, "in/")
    config = config_of(state)
    params, stats = from_torch(state, config)
    graphdef, *_ = jax.eval_shape(lambda: initialise(config, 0))
    images, tokens = jnp.asarray(inputs["image"].transpose(0, 2, 3, 1)), jnp.asarray(inputs["text"])

    def loss(params):
        model = bind(graphdef, params, stats)
        with recorded(model) as stages:
            features = model(images, tokens, train=train)
        total = 0.1 * jnp.exp(params["logit_scale"])
        if config.projection is not None:
            total += 0.2 * jnp.exp(params["logit_scale_proto"])
        for ours, theirs in OUTPUTS.items():
            feature = getattr(features, ours)
            if feature is not None:
                total += jnp.sum(feature * inputs[f"cot_{theirs}"])
        return total, (features, stages, split(model)[2])

    with jax.default_matmul_precision("highest"):
        (value, auxiliary), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return params, stats, value, auxiliary, to_torch(gradients, {})


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("file", FILES)
def test_clip(file, mode):
    params, stats, value, (features, stages, moved), gradients = forward(file, mode == "train")
    outputs = golden(file, f"{mode}/out/")
    for name, scale in (("logit_scale", "logit_scale"), ("logit_scale_proto",) * 2):
        assert (name in outputs) == (scale in params)
        if name in outputs:
            assert_close_to_max(np.exp(params[scale]), outputs.pop(name), VALUES, name)
    for ours, theirs in OUTPUTS.items():
        assert (getattr(features, ours) is not None) == (theirs in outputs)
        if theirs in outputs:
            assert_close_to_max(getattr(features, ours), outputs[theirs], VALUES, theirs)
    assert_close_to_max(value, golden(file)[f"{mode}/loss"], VALUES, "loss")
    for name, array in golden(file, f"{mode}/stage/").items():
        assert_close_to_max(stages[stage_path(name)], array, VALUES, f"{mode} {name}")
    if mode == "train":
        statistics = to_torch({}, moved)
        expected = golden(file, "train/newstats/")
        assert set(statistics) == set(expected)
        for name, array in expected.items():
            assert_close_to_max(statistics[name], array, VALUES, name)
    else:
        jax.tree.map(np.testing.assert_array_equal, moved, stats)
    check_gradients(file, mode, gradients)


def stage_path(name: str) -> str:
    """Torch's module name as a path here."""
    if name == "encode_text_unnormalised":
        return "text"
    head, _, number = name.partition(".")
    return f"{head}/layers/{number}" if number else head


def check_gradients(file, mode, gradients):
    # The bias in front of a batch norm has a gradient of rounding noise, in training only; so has
    # the key bias of the pooling query in both modes.
    hidden = golden_json("norm_names")[file + ".npz"][f"{mode}/gradnorm"]
    noise = ["attnpool.k_proj.bias"]
    if mode == "train":
        noise += [
            name
            for name in hidden
            if "projection_head" in name
            and name.endswith(".bias")
            and _before_batch_norm(name, gradients)
        ]
    expected = golden(file, f"{mode}/grad/")
    assert expected
    for name, array in expected.items():
        if not name.endswith(tuple(noise)):
            assert_close_to_max(gradients[name], array, GRADIENTS, f"{mode} {name}")
    norms = [np.linalg.norm(gradients[name]) for name in hidden]
    golden_norms = golden(file)[f"{mode}/gradnorm"]
    assert_norms_close(norms, golden_norms, GRADIENTS, hidden, noise)
    assert set(hidden) == set(gradients)


def _before_batch_norm(name: str, state: dict) -> bool:
    head, number, _ = name.split(".")
    following = state.get(f"{head}.{int(number) + 1}.weight")
    return (
        following is not None and following.ndim == 1 and state[f"{head}.{number}.weight"].ndim == 2
    )
