"""Named sizes: parameter counts as published, and what cannot be built."""

import dataclasses

import jax
import pytest

from protoclip_jax.models.clip import initialise
from protoclip_jax.models.presets import (
    PRESETS,
    CLIPConfig,
    ProjectionConfig,
    ResNetConfig,
    TextConfig,
    ViTConfig,
    preset,
)

# Millions of parameters, whole and image tower: open_clip, docs/model_profile.csv.
PUBLISHED = {
    "RN50": (102.01, 38.32),
    "RN101": (119.69, 56.26),
    "RN50x4": (178.30, 87.14),
    "RN50x16": (290.98, 167.33),
    "ViT-B-32": (151.28, 87.85),
    "ViT-B-16": (149.62, 86.19),
    "ViT-L-14": (427.62, 303.97),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    _, params, _ = jax.eval_shape(lambda: initialise(preset(name), 0))
    counts = [sum(leaf.size for leaf in jax.tree.leaves(t)) for t in (params, params["visual"])]
    assert [round(count / 1e6, 2) for count in counts] == list(PUBLISHED[name])


def test_quickgelu_twins_differ_in_the_activation_only():
    for name in PUBLISHED:
        assert preset(name).activation == "gelu"
        twin = preset(f"{name}-quickgelu")
        assert twin == dataclasses.replace(preset(name), activation="quickgelu")


def test_presets_are_plain_clip():
    assert all(config.projection is None for config in PRESETS.values())


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("RN5O", "RN50"), ("vit-b/32", "ViT-B-32"), ("ViT_B_16", "ViT-B-16"), ("tinyrn", "tiny-rn")],
)
def test_unknown_preset_names_the_nearest(wrong, right):
    with pytest.raises(ValueError, match=f"did you mean {right}\\?"):
        preset(wrong)


def test_unknown_preset_far_from_all_lists_them():
    with pytest.raises(ValueError, match="known are RN50"):
        preset("????")


TEXT = TextConfig(77, 49408, 64, 4, 2)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ResNetConfig((1, 1, 1, 1), 16, 60), "a ResNet needs a multiple of 32"),
        (lambda: ViTConfig(60, 32, 64, 2, 4), "multiple of the patch size 32"),
        (lambda: ViTConfig(64, 32, 64, 2, 5), "5 attention heads do not divide a width of 64"),
        (lambda: TextConfig(77, 49408, 64, 0, 2), "0 attention heads"),
        (lambda: ProjectionConfig(-1, 8, 8), "use 0 or more"),
        (lambda: CLIPConfig(8, ViTConfig(64, 32, 64, 2, 4), TEXT, "relu"), 'activation "relu"'),
        (
            lambda: CLIPConfig(8, ViTConfig(64, 32, 64, 2, 4), TEXT, batch_norm_group=0),
            "batch_norm_group 0",
        ),
    ],
)
def test_what_cannot_be_built(build, message):
    with pytest.raises(ValueError, match=message):
        build()
