"""Names and layouts of torch state dicts: ProtoCLIP's PyTorch code and open_clip.

One table says what each parameter is called there. The other direction needs the model's shapes
(torch calls a Linear's matrix and a norm's scale both "weight"), so it goes through the paths of a
given config and is strict: every name must be used, every parameter found.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from protoclip_jax.models.clip import initialise
from protoclip_jax.models.presets import CLIPConfig

Tree = dict[str, Any]

# Axes of our array in torch's order: Linear (in, out) -> (out, in), HWIO -> OIHW.
_SAME, _LINEAR, _CONV = None, (1, 0), (3, 2, 0, 1)

_PLACEHOLDERS = {
    "n": r"(\d+)",
    "part": r"([a-z]+)",
    "ln": r"(weight|bias)",
    "bn": r"(weight|bias|running_mean|running_var)",
}

# Path, torch name, layout. What stands in braces is the same text on both sides; see _PLACEHOLDERS.
TABLE: tuple[tuple[str, str, tuple[int, ...] | None], ...] = (
    ("logit_scale", "logit_scale", _SAME),
    ("logit_scale_proto", "logit_scale_proto", _SAME),
    # ResNet
    ("visual/conv{n}/kernel", "visual.conv{n}.weight", _CONV),
    ("visual/bn{n}/{bn}", "visual.bn{n}.{bn}", _SAME),
    ("visual/layer{n}/{n}/conv{n}/kernel", "visual.layer{n}.{n}.conv{n}.weight", _CONV),
    ("visual/layer{n}/{n}/bn{n}/{bn}", "visual.layer{n}.{n}.bn{n}.{bn}", _SAME),
    (
        "visual/layer{n}/{n}/downsample/conv/kernel",
        "visual.layer{n}.{n}.downsample.0.weight",
        _CONV,
    ),
    ("visual/layer{n}/{n}/downsample/bn/{bn}", "visual.layer{n}.{n}.downsample.1.{bn}", _SAME),
    ("visual/attnpool/positional_embedding", "visual.attnpool.positional_embedding", _SAME),
    ("visual/attnpool/{part}_proj/kernel", "visual.attnpool.{part}_proj.weight", _LINEAR),
    ("visual/attnpool/{part}_proj/bias", "visual.attnpool.{part}_proj.bias", _SAME),
    # ViT
    ("visual/class_embedding", "visual.class_embedding", _SAME),
    ("visual/positional_embedding", "visual.positional_embedding", _SAME),
    ("visual/proj", "visual.proj", _SAME),
    ("visual/ln_{part}/{ln}", "visual.ln_{part}.{ln}", _SAME),
    # text
    ("text/token_embedding", "token_embedding.weight", _SAME),
    ("text/positional_embedding", "positional_embedding", _SAME),
    ("text/ln_final/{ln}", "ln_final.{ln}", _SAME),
    ("text/text_projection", "text_projection", _SAME),
    # transformers
    *(
        (f"{path}/resblocks/{{n}}/{ours}", f"{name}.resblocks.{{n}}.{theirs}", layout)
        for path, name in (
            ("visual/transformer", "visual.transformer"),
            ("text/transformer", "transformer"),
        )
        for ours, theirs, layout in (
            ("ln_{n}/{ln}", "ln_{n}.{ln}", _SAME),
            ("attn/in_proj/kernel", "attn.in_proj_weight", _LINEAR),
            ("attn/in_proj/bias", "attn.in_proj_bias", _SAME),
            ("attn/out_proj/kernel", "attn.out_proj.weight", _LINEAR),
            ("attn/out_proj/bias", "attn.out_proj.bias", _SAME),
            ("mlp/c_{part}/kernel", "mlp.c_{part}.weight", _LINEAR),
            ("mlp/c_{part}/bias", "mlp.c_{part}.bias", _SAME),
        )
    ),
    # projection heads
    ("{part}_projection_head/layers/{n}/kernel", "{part}_projection_head.{n}.weight", _LINEAR),
    ("{part}_projection_head/layers/{n}/{bn}", "{part}_projection_head.{n}.{bn}", _SAME),
)

# Entries of a state dict that are no weights: torch's step counters, and what OpenAI's archives
# say about the model.
_IGNORED = re.compile(r"(.*\.num_batches_tracked|input_resolution|context_length|vocab_size)$")


class WeightsError(ValueError):
    """A state dict does not fit the model.

    Attributes:
      missing: torch names that the model needs and the state dict lacks.
      unused: names in the state dict that the model does not know.
      misshaped: names with another shape than the model's, with both shapes.
    """

    def __init__(self, missing: list[str], unused: list[str], misshaped: list[str]):
        self.missing, self.unused, self.misshaped = missing, unused, misshaped
        kinds = (("missing", missing), ("not in the model", unused), ("other shape", misshaped))
        found = "; ".join(f"{len(names)} {kind}: {_some(names)}" for kind, names in kinds if names)
        super().__init__(
            f"the weights do not fit the model ({found}): choose the preset and the projection "
            "heads that they were made with"
        )


def torch_name(path: str) -> str:
    """The torch name of a parameter or batch statistic.

    Args:
      path: its keys joined by "/", such as "visual/layer1/0/conv1/kernel".

    Raises:
      KeyError: the table has no such path.
    """
    return _lookup(path)[0]


def from_torch(state: Mapping[str, Any], config: CLIPConfig) -> tuple[Tree, Tree]:
    """Parameters and batch statistics, float32, from a torch state dict of numpy arrays.

    Args:
      state: name -> array, with or without the "module." of torch's parallel wrappers; any float
        type.
      config: the model they are for.

    Raises:
      WeightsError: names are missing, unknown or of another shape; lists them all.
    """
    _, params, batch_stats = jax.eval_shape(lambda: initialise(config, 0))
    return fill(state, params, batch_stats)


def fill(state: Mapping[str, Any], params: Tree, batch_stats: Tree) -> tuple[Tree, Tree]:
    """As `from_torch`, for trees of shapes: the whole model's, or those of a part of it."""
    state = {
        name.removeprefix("module."): value
        for name, value in state.items()
        if not _IGNORED.match(name)
    }
    trees = {"params": params, "batch_stats": batch_stats}
    leaves, structure = jax.tree_util.tree_flatten_with_path(trees)
    missing, misshaped, arrays = [], [], []
    for keys, leaf in leaves:
        name, layout = _lookup(_path(keys[1:]))
        if name not in state:
            missing.append(name)
            continue
        array = np.asarray(state.pop(name))
        wanted = leaf.shape if layout is None else tuple(leaf.shape[axis] for axis in layout)
        if array.shape != wanted:
            misshaped.append(f"{name} {array.shape} instead of {wanted}")
            continue
        if layout is not None:
            array = array.transpose(np.argsort(layout))
        arrays.append(np.array(array, np.float32, order="C"))
    if missing or state or misshaped:
        raise WeightsError(missing, sorted(state), misshaped)
    filled = jax.tree_util.tree_unflatten(structure, arrays)
    return filled["params"], filled["batch_stats"]


def to_torch(params: Tree, batch_stats: Tree) -> dict[str, np.ndarray]:
    """A torch state dict of numpy arrays, in their own float type; the inverse of `from_torch`."""
    state = {}
    for tree in (params, batch_stats):
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name, layout = _lookup(_path(keys))
            array = np.asarray(leaf)
            state[name] = np.array(array if layout is None else array.transpose(layout), order="C")
    return state


def _lookup(path: str) -> tuple[str, tuple[int, ...] | None]:
    for pattern, name, layout in _COMPILED:
        match = pattern.fullmatch(path)
        if match:
            return name.format(*match.groups()), layout
    raise KeyError(f"no torch name for {path}: add it to the table")


def _compile(path: str, name: str, layout) -> tuple[re.Pattern, str, tuple[int, ...] | None]:
    """The path as a regular expression, the name as a format of its groups."""
    pattern = re.compile(re.sub(r"{(\w+)}", lambda match: _PLACEHOLDERS[match[1]], path))
    return pattern, re.sub(r"{\w+}", "{}", name), layout


_COMPILED = tuple(_compile(*row) for row in TABLE)


def _path(keys: tuple) -> str:
    return "/".join(str(key.key) for key in keys)


def _some(names: list[str], limit: int = 20) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
