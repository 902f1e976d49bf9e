"""BERT as a sentence encoder in jax, from a folder in Hugging Face's form, without torch."""

import functools
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jaxtyping import Array, Float, Int

_TYPES = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "I64": np.int64}
_NEEDED = (
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "layer_norm_eps",
    "max_position_embeddings",
)
_MOST_HEADER = 2**26  # bytes
_MOST_AXES = 8
_TOKENS = 2048  # a call of the model, padding included
_SHORTEST = 8  # tokens a row; rows are padded to this or the next power of two


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """Arrays of a .safetensors file by name: a header of JSON, then plain numbers.

    Raises:
      OSError: it cannot be read.
      ValueError: it is damaged, or holds another type of numbers.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _MOST_HEADER):
            raise ValueError(f"{path} is cut short, or no .safetensors file")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            places = {name: _place(entry) for name, entry in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged, or no .safetensors file: {error}") from error
        # Parts that overlap would need more memory than the file has bytes.
        if sum(last - first for _, _, first, last in places.values()) > size - 8 - length:
            raise ValueError(f"{path} is cut short, or its arrays overlap")
        arrays = {}
        for name, (dtype, shape, first, last) in places.items():
            file.seek(8 + length + first)
            numbers = file.read(last - first)
            if len(numbers) < last - first:
                raise ValueError(f"{path} is cut short: {name} is not all there")
            arrays[name] = np.frombuffer(numbers, dtype).reshape(shape)
    return arrays


def _place(entry: dict) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Type, shape, and first and last byte of an array, which fit together.

    Raises:
      ValueError, TypeError, KeyError: they do not.
    """
    if entry["dtype"] not in _TYPES:
        raise ValueError(f"numbers are {entry['dtype']!r}, wanted {', '.join(_TYPES)}")
    dtype, shape = np.dtype(_TYPES[entry["dtype"]]), tuple(entry["shape"])
    first, last = entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, first, last)):
        raise ValueError(f"the shape {shape} from byte {first} to {last}")
    if len(shape) > _MOST_AXES or math.prod(shape) * dtype.itemsize != last - first:
        raise ValueError(f"{last - first} bytes for the shape {shape}")
    return dtype, shape, first, last


def _linear(params: dict, name: str, x: Float[Array, "b t c"]) -> Float[Array, "b t e"]:
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]


def _normalise(params: dict, name: str, x: Float[Array, "b t e"], eps: float):
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    scaled = (x - mean) * jax.lax.rsqrt(variance + eps)
    return scaled * params[f"{name}.weight"] + params[f"{name}.bias"]


def _attend(params: dict, name: str, x: Float[Array, "b t e"], real_bt, heads: int):
    def split(part: str):
        whole = _linear(params, f"{name}.self.{part}", x)
        return whole.reshape(*whole.shape[:2], heads, -1)

    query, key, value = split("query"), split("key"), split("value")
    scores_bhts = jnp.einsum("bthe,bshe->bhts", query, key) / jnp.sqrt(query.shape[-1])
    scores_bhts = jnp.where(real_bt[:, None, None, :], scores_bhts, -jnp.inf)
    mixed = jnp.einsum("bhts,bshe->bthe", jax.nn.softmax(scores_bhts, axis=-1), value)
    return _linear(params, f"{name}.output.dense", mixed.reshape(x.shape))


def sentence_features(
    params: dict[str, Array], ids_bt: Int[Array, "b t"], heads: int, layers: int, eps: float
) -> Float[Array, "b e"]:
    """Mean of the last layer over real tokens, of length 1.

    Args:
      params: arrays by BERT's names ("encoder.layer.0.attention.self.query.weight", ...).
      ids_bt: token ids, padded with -1.
      heads: attention heads.
      layers: transformer layers.
      eps: of the layer normalisations.
    """
    real_bt = ids_bt >= 0
    x = (
        params["embeddings.word_embeddings.weight"][jnp.maximum(ids_bt, 0)]
        + params["embeddings.position_embeddings.weight"][: ids_bt.shape[1]]
        + params["embeddings.token_type_embeddings.weight"][0]
    )
    x = _normalise(params, "embeddings.LayerNorm", x, eps)
    for layer in range(layers):
        name = f"encoder.layer.{layer}"
        mixed = x + _attend(params, f"{name}.attention", x, real_bt, heads)
        x = _normalise(params, f"{name}.attention.output.LayerNorm", mixed, eps)
        inner = jax.nn.gelu(_linear(params, f"{name}.intermediate.dense", x), approximate=False)
        outer = x + _linear(params, f"{name}.output.dense", inner)
        x = _normalise(params, f"{name}.output.LayerNorm", outer, eps)
    mean_be = (x * real_bt[..., None]).sum(1) / real_bt.sum(1, keepdims=True)
    return mean_be / jnp.linalg.norm(mean_be, axis=1, keepdims=True)


class Bert:
    """Captions to features of length 1, by the model in a folder.

    The folder holds config.json (model type "bert"), model.safetensors and tokenizer.json.

    Attributes:
      width: numbers in a row of features.
    """

    def __init__(self, folder: str | Path):
        """Reads the folder.

        Raises:
          OSError: a file is missing.
          ValueError: one is damaged, or of another model.
        """
        folder = Path(folder)
        config = _config(folder / "config.json", *_NEEDED)
        wanted = {
            "model_type": "bert",
            "hidden_act": "gelu",
            "position_embedding_type": "absolute",
        }
        for key, value in wanted.items():
            if config.get(key, value) != value:
                raise ValueError(
                    f"{folder}/config.json: {key} is {config[key]!r}, wanted {value!r}"
                )
        self.width = config["hidden_size"]
        self._tokenizer = _tokenizer(folder / "tokenizer.json")
        self._tokenizer.no_padding()
        self._longest = _longest(folder, config)
        self._tokenizer.enable_truncation(self._longest)
        weights = read_safetensors(folder / "model.safetensors")
        self._params = {
            name.removeprefix("bert."): jnp.asarray(array, jnp.float32)
            for name, array in weights.items()
            if array.dtype.kind == "f"
        }
        model = functools.partial(
            sentence_features,
            heads=config["num_attention_heads"],
            layers=config["num_hidden_layers"],
            eps=config["layer_norm_eps"],
        )
        self._model = jax.jit(model)
        try:
            jax.eval_shape(self._model, self._params, np.zeros((1, _SHORTEST), np.int32))
        except Exception as error:  # a missing array or one of another shape, told in many ways
            what = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            raise ValueError(
                f"{folder}/model.safetensors is not of the model in config.json ({what[:200]})"
            ) from error

    def __call__(self, captions: Sequence[str]) -> Float[np.ndarray, "n e"]:
        """Features of the captions, float32, rows in their order."""
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch(list(captions))]
        features_ne = np.empty((len(ids), self.width), np.float32)
        with jax.default_matmul_precision("highest"):
            for shape, rows in _batches([len(row) for row in ids], self._longest):
                padded_bt = np.full(shape, -1, np.int32)
                padded_bt[len(rows) :, 0] = 0  # unused rows: one token, so that no mean is 0 / 0
                for padded, row in zip(padded_bt, rows, strict=False):
                    padded[: len(ids[row])] = ids[row]
                features_ne[rows] = self._model(self._params, padded_bt)[: len(rows)]
        return features_ne


def _batches(lengths: Sequence[int], longest: int) -> Iterator[tuple[tuple[int, int], list[int]]]:
    """Rows to run together and the shape to pad them to: few shapes, so few compilations."""
    by_length = defaultdict(list)
    for row, length in enumerate(lengths):
        by_length[min(max(_SHORTEST, 1 << (length - 1).bit_length()), longest)].append(row)
    for length, rows in sorted(by_length.items()):
        step = max(1, _TOKENS // length)
        for first in range(0, len(rows), step):
            yield (step, length), rows[first : first + step]


def _longest(folder: Path, config: dict) -> int:
    """Tokens that the model takes: sentence-transformers' limit where the folder states one."""
    stated = folder / "sentence_bert_config.json"
    longest = _config(stated).get("max_seq_length") if stated.exists() else None
    return longest or config["max_position_embeddings"]


def _config(path: Path, *numbers: str) -> dict:
    """A file of settings, which has these numbers.

    Raises:
      OSError: there is none.
      ValueError: it is damaged, or lacks a number.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    lacking = [
        name for name in numbers if not isinstance(found, dict) or not _above_zero(found, name)
    ]
    if lacking or not isinstance(found, dict):
        raise ValueError(f"{path} is damaged, or of another model: no {', '.join(lacking)}")
    return found


def _above_zero(found: dict, name: str) -> bool:
    return isinstance(found.get(name), int | float) and found[name] > 0


def _tokenizer(path: Path) -> tokenizers.Tokenizer:
    text = path.read_bytes()
    try:
        return tokenizers.Tokenizer.from_buffer(text)
    except Exception as error:  # the package raises no other
        raise ValueError(f"{path} is damaged, or of another model: {error}") from error
