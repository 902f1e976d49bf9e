"""Models for the golden files: their config, their weights, and what happens inside them."""

import math
from contextlib import contextmanager

import numpy as np
from flax import nnx

from protoclip_jax.interop.torch_names import torch_name
from protoclip_jax.models.presets import (
    CLIPConfig,
    ProjectionConfig,
    ResNetConfig,
    TextConfig,
    ViTConfig,
)

HEADS = 4  # of every small transformer in the golden files


def config_of(state: dict[str, np.ndarray], activation: str = "quickgelu") -> CLIPConfig:
    """The config whose model has this torch state dict."""
    vision = vision_of(state)
    name = "visual.attnpool.c_proj.weight"
    embed_dim = state[name].shape[0] if name in state else state["visual.proj"].shape[1]
    head = [
        state[f"image_projection_head.{i}.weight"]
        for i in range(32)
        if state.get(f"image_projection_head.{i}.weight", np.zeros(1)).ndim == 2
    ]
    projection = (
        ProjectionConfig(len(head) - 1, head[0].shape[0], head[-1].shape[0]) if head else None
    )
    return CLIPConfig(embed_dim, vision, text_of(state), activation, projection)


def vision_of(state: dict[str, np.ndarray], prefix: str = "visual.") -> ResNetConfig | ViTConfig:
    """The sizes of an image tower."""
    if f"{prefix}attnpool.positional_embedding" in state:
        tokens = state[f"{prefix}attnpool.positional_embedding"].shape[0]
        layers = tuple(_count(state, f"{prefix}layer{i}.") for i in (1, 2, 3, 4))
        width = state[f"{prefix}conv3.weight"].shape[0]
        return ResNetConfig(layers, width, 32 * math.isqrt(tokens - 1))
    width, _, patch, _ = state[f"{prefix}conv1.weight"].shape
    side = math.isqrt(state[f"{prefix}positional_embedding"].shape[0] - 1)
    layers = _count(state, f"{prefix}transformer.resblocks.")
    return ViTConfig(side * patch, patch, width, layers, HEADS)


def text_of(state: dict[str, np.ndarray]) -> TextConfig:
    """The sizes of a text tower."""
    vocabulary, width = state["token_embedding.weight"].shape
    context = state["positional_embedding"].shape[0]
    return TextConfig(context, vocabulary, width, HEADS, _count(state, "transformer.resblocks."))


def _count(state: dict, prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})


@contextmanager
def recorded(model: nnx.Module, prefix: str = ""):
    """Gives a dict that fills with the outputs of the model's modules, by "/"-joined path.

    Works under tracing too, where the values are tracers.
    """
    paths = {id(module): "/".join(map(str, path)) for path, module in nnx.iter_modules(model)}
    originals = {
        type(module): type(module).__call__
        for _, module in nnx.iter_modules(model)
        if "__call__" in vars(type(module))
    }
    outputs = {}

    def record(original):
        def call(self, *args, **kwargs):
            result = original(self, *args, **kwargs)
            outputs[paths[id(self)]] = result
            return result

        return call

    for cls, original in originals.items():
        cls.__call__ = record(original)
    try:
        yield outputs
    finally:
        for cls, original in originals.items():
            cls.__call__ = original


def by_name(tree: dict, path: str = "") -> dict[str, np.ndarray]:
    """The leaves of a tree by torch name, in the tree's own layout."""
    found = {}
    for key, value in tree.items():
        inner = f"{path}/{key}" if path else key
        if isinstance(value, dict):
            found.update(by_name(value, inner))
        else:
            found[torch_name(inner)] = np.asarray(value)
    return found
