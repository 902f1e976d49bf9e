"""Where pairs come from: one function opens every kind by name."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from protoclip_jax.data.pair_list import PairList


@runtime_checkable
class PairSource(Protocol):
    """Pairs by row, in a fixed order. Picklable: worker processes read their own copy.

    Attributes:
      name: what to call it in messages.
      fingerprint: equal only for the same pairs in the same order.
    """

    name: str
    fingerprint: str

    def __len__(self) -> int: ...

    def read(self, row: int) -> tuple[bytes, str]:
        """A picture's file content and its caption; `UnreadableImage` if it cannot be had."""
        ...


def where(source: PairSource, row: int) -> str:
    """What a row is called in reports: the picture's path where the source knows it."""
    if hasattr(source, "where"):
        return source.where(row)
    return f"{source.name} row {row}"


class Subset:
    """Some rows of a source; a `PairSource`.

    Attributes:
      rows: their numbers in the source, increasing.
    """

    def __init__(self, source: PairSource, limit: int, seed: int):
        """Draws `limit` rows from the seed alone."""
        rng = np.random.default_rng(seed)
        drawn = rng.choice(len(source), limit, replace=False, shuffle=False)
        self.rows: Int[np.ndarray, " n"] = np.sort(drawn)
        self._source = source
        self.name = f"{source.name} ({limit} of {len(source)} pairs)"
        self.fingerprint = f"{source.fingerprint}/{limit}/{seed}"

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, row: int) -> tuple[bytes, str]:
        """The pair that `row` of the subset stands for."""
        return self._source.read(int(self.rows[row]))

    def caption(self, row: int) -> str:
        """The caption alone, without opening the picture where the source can do so."""
        row = int(self.rows[row])
        if hasattr(self._source, "caption"):
            return self._source.caption(row)
        return self._source.read(row)[1]

    def where(self, row: int) -> str:
        """What the row is called in the source."""
        return where(self._source, int(self.rows[row]))

    @property
    def report(self) -> dict:
        """What the source dropped."""
        return getattr(self._source, "report", {})


def _emoji_text(spec: str, options: dict) -> PairSource:
    from protoclip_jax.data.emoji_text import EmojiText

    return EmojiText(spec.removeprefix("emoji_text/"))


def _pair_list(spec: str, options: dict) -> PairSource:
    return PairList(spec, **options)


# Kind by kind: how it is written, what recognises it, what opens it. The first that fits opens.
KINDS: tuple[tuple[str, Callable[[str], bool], Callable[[str, dict], PairSource]], ...] = (
    (
        "emoji_text/train, emoji_text/val or emoji_text/test",
        lambda spec: spec.startswith("emoji_text/"),
        _emoji_text,
    ),
    (
        "a pair list named .tsv, .csv or .txt",
        lambda spec: spec.lower().endswith((".tsv", ".csv", ".txt")),
        _pair_list,
    ),
)


def open_source(
    spec: str,
    *,
    image_column: str = "filepath",
    caption_column: str = "title",
    separator: str = "\t",
    image_root: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> PairSource:
    """The pairs that `spec` names.

    Args:
      spec: one of `KINDS`.
      image_column: of a pair list: name of the column of picture paths.
      caption_column: of a pair list: name of the column of captions.
      separator: of a pair list: one character.
      image_root: of a pair list: folder of relative paths; none = the list's own folder.
      limit: keep a random subset of this many pairs, where there are more.
      seed: of the subset.

    Raises:
      ValueError: no such kind, or the source holds no pairs or cannot be used.
      FileNotFoundError: no such file.
    """
    options = {
        "image_column": image_column,
        "caption_column": caption_column,
        "separator": separator,
        "image_root": image_root,
    }
    for _, recognises, opens in KINDS:
        if recognises(spec):
            source = opens(spec, options)
            break
    else:
        known = "; ".join(form for form, _, _ in KINDS)
        raise ValueError(f"no kind of data source is called {spec!r}: wanted {known}")
    if limit is not None and limit < len(source):
        source = Subset(source, limit, seed)
    return source
