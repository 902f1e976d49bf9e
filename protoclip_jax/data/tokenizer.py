"""CLIP's byte-pair tokenizer, id for id as open_clip has it, without torch."""

import functools
import gzip
import html
from collections.abc import Sequence
from importlib import resources

import ftfy
import numpy as np
import tokenizers
from jaxtyping import Int

# Inside a caption, too, they are special tokens.
START = "<start_of_text>"
END = "<end_of_text>"


def clean(text: str) -> str:
    """Caption as the vocabulary expects it: mended, unescaped, single spaces, lower case.

    Every language passes through; nothing is reduced to ASCII. `ftfy` mends broken encodings and
    composes accents (NFC), so that one caption has one row of ids however it was typed.
    Reference: open_clip `_clean_lower`.
    """
    # Printable ASCII without "&" comes back unchanged from both, which cost more than the rest.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


@functools.cache
def _vocabulary() -> tokenizers.Tokenizer:
    asset = resources.files("protoclip_jax.data") / "assets" / "clip_tokenizer.json.gz"
    return tokenizers.Tokenizer.from_str(gzip.decompress(asset.read_bytes()).decode())


class Tokenizer:
    """Captions to rows of ids: start token, byte pairs, end token, then zeros.

    A caption that is too long loses its last byte pairs, never its end token (the text tower
    pools there). `<start_of_text>` and `<end_of_text>` inside a caption are those tokens, as in
    open_clip. An instance pickles as its length alone; a process reads the vocabulary once.

    Attributes:
      context_length: ids in a row; at least 2.
      sot: id of the start token.
      eot: id of the end token, the largest of all.
      vocab_size: number of ids.
    """

    def __init__(self, context_length: int = 77):
        if context_length < 2:
            raise ValueError(
                f"context_length is {context_length}: it must be at least 2, "
                "for the start and the end token"
            )
        self.context_length = context_length

    @property
    def sot(self) -> int:
        """Id of the start token."""
        return _vocabulary().token_to_id(START)

    @property
    def eot(self) -> int:
        """Id of the end token."""
        return _vocabulary().token_to_id(END)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return _vocabulary().get_vocab_size()

    def lengths(self, texts: Sequence[str]) -> Int[np.ndarray, " n"]:
        """Ids each caption has with both special tokens, before any cutting."""
        encoded = _vocabulary().encode_batch_fast([clean(text) for text in texts])
        return np.array([len(encoding) + 2 for encoding in encoded], np.int64)

    def __call__(self, texts: str | Sequence[str]) -> Int[np.ndarray, "n t"]:
        """Ids of one caption (n = 1) or many, int32, t = `context_length`."""
        texts = [texts] if isinstance(texts, str) else texts
        encoded = _vocabulary().encode_batch_fast([clean(text) for text in texts])
        sot, eot = self.sot, self.eot
        ids_nt = np.zeros((len(encoded), self.context_length), np.int32)
        for row, encoding in zip(ids_nt, encoded, strict=True):
            ids = encoding.ids[: self.context_length - 2]
            row[0] = sot
            row[1 : len(ids) + 1] = ids
            row[len(ids) + 1] = eot
        return ids_nt
