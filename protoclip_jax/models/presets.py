"""The sizes of the models that can be named in a recipe."""

import dataclasses
import difflib


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """CLIP's ModifiedResNet.

    Attributes:
      layers: bottleneck blocks in each of the four stages.
      width: channels after the stem; the last stage has 32 times as many.
      image_size: height and width of the pictures in pixels, a multiple of 32.
    """

    layers: tuple[int, int, int, int]
    width: int
    image_size: int

    def __post_init__(self):
        if self.image_size % 32:
            raise ValueError(f"image size {self.image_size}: a ResNet needs a multiple of 32")

    @property
    def heads(self) -> int:
        """Heads of the attention pool: 64 channels each, but at least one."""
        return max(1, self.width * 32 // 64)


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Vision transformer on square patches; `image_size` and `patch_size` in pixels.

    `mlp` is the width inside the MLPs; None for four times the width.
    """

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp: int | None = None

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image size {self.image_size}: it must be a multiple of the patch size "
                f"{self.patch_size}"
            )
        _check_heads(self.width, self.heads)


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Causal transformer over at most `context_length` tokens of a vocabulary."""

    context_length: int
    vocab_size: int
    width: int
    heads: int
    layers: int

    def __post_init__(self):
        _check_heads(self.width, self.heads)


@dataclasses.dataclass(frozen=True)
class ProjectionConfig:
    """The two projection heads of ProtoCLIP.

    Attributes:
      hidden_layers: Linear-BatchNorm-ReLU groups before the last Linear (0: one Linear).
      hidden: width of the hidden layers.
      width: width of the projected features.
    """

    hidden_layers: int
    hidden: int
    width: int

    def __post_init__(self):
        if self.hidden_layers < 0:
            raise ValueError(f"projection with {self.hidden_layers} hidden layers: use 0 or more")


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """A whole model.

    Attributes:
      embed_dim: width of the joint space of both towers.
      vision: the image tower.
      text: the text tower.
      activation: "gelu" (exact) or "quickgelu", in the transformers.
      projection: ProtoCLIP's heads; None for a plain CLIP.
      batch_norm_group: rows that share batch statistics; None for the whole batch.
    """

    embed_dim: int
    vision: ResNetConfig | ViTConfig
    text: TextConfig
    activation: str = "gelu"
    projection: ProjectionConfig | None = None
    batch_norm_group: int | None = None

    def __post_init__(self):
        if self.activation not in ("gelu", "quickgelu"):
            raise ValueError(f'activation "{self.activation}": use "gelu" or "quickgelu"')
        if self.batch_norm_group is not None and self.batch_norm_group < 1:
            raise ValueError(
                f"batch_norm_group {self.batch_norm_group}: use at least 1 row, or none for the "
                "whole batch"
            )


def _check_heads(width: int, heads: int) -> None:
    if heads < 1 or width % heads:
        raise ValueError(f"{heads} attention heads do not divide a width of {width}")


def _text(width: int, layers: int = 12, heads: int | None = None) -> TextConfig:
    return TextConfig(77, 49408, width, heads or width // 64, layers)


def _resnet(layers, width: int, image_size: int, embed_dim: int, text_width: int) -> CLIPConfig:
    return CLIPConfig(embed_dim, ResNetConfig(layers, width, image_size), _text(text_width))


_GELU = {
    "RN50": _resnet((3, 4, 6, 3), 64, 224, 1024, 512),
    "RN101": _resnet((3, 4, 23, 3), 64, 224, 512, 512),
    "RN50x4": _resnet((4, 6, 10, 6), 80, 288, 640, 640),
    "RN50x16": _resnet((6, 8, 18, 8), 96, 384, 768, 768),
    "ViT-B-32": CLIPConfig(512, ViTConfig(224, 32, 768, 12, 12), _text(512)),
    "ViT-B-16": CLIPConfig(512, ViTConfig(224, 16, 768, 12, 12), _text(512)),
    "ViT-L-14": CLIPConfig(768, ViTConfig(224, 14, 1024, 24, 16), _text(768)),
    "ViT-H-14": CLIPConfig(1024, ViTConfig(224, 14, 1280, 32, 16), _text(1024, layers=24)),
    "ViT-g-14": CLIPConfig(1024, ViTConfig(224, 14, 1408, 40, 16, 6144), _text(1024, layers=24)),
}
# The tiny ones train on two CPU cores; the towers keep all the parts of the real ones.
_TINY = {
    "tiny-rn": CLIPConfig(
        128, ResNetConfig((1, 1, 1, 1), 16, 64), _text(128, layers=2, heads=4), "quickgelu"
    ),
    "tiny-vit": CLIPConfig(
        128, ViTConfig(64, 8, 128, 4, 4), _text(128, layers=2, heads=4), "quickgelu"
    ),
}

PRESETS: dict[str, CLIPConfig] = {
    **_GELU,
    **{
        f"{name}-quickgelu": dataclasses.replace(config, activation="quickgelu")
        for name, config in _GELU.items()
    },
    **_TINY,
}


def preset(name: str) -> CLIPConfig:
    """The sizes behind a model's name; without projection heads, which are the recipe's choice.

    Args:
      name: as in open_clip, such as "RN50" (exact GELU) or "RN50-quickgelu" (the activation of
        OpenAI's weights and of ProtoCLIP).

    Raises:
      ValueError: there is no such preset.
    """
    if name in PRESETS:
        return PRESETS[name]
    lower = {known.lower(): known for known in PRESETS}
    wanted = name.lower().replace("/", "-").replace("_", "-")
    near = difflib.get_close_matches(wanted, lower, n=1, cutoff=0.5)
    hint = f"did you mean {lower[near[0]]}?" if near else f"known are {', '.join(PRESETS)}"
    raise ValueError(f'there is no model preset "{name}": {hint}')
