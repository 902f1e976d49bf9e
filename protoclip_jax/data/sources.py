"""Where pairs come from: one function opens every kind by name."""

import os
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from protoclip_jax.data.array_records import ArrayRecordPairs, is_array_records
from protoclip_jax.data.captions import is_caption
from protoclip_jax.data.decoding import NO_CAPTION, UnreadableImage
from protoclip_jax.data.left_out import shown
from protoclip_jax.data.list_form import HEAD, refuse_other_forms
from protoclip_jax.data.pair_list import PairList
from protoclip_jax.data.subset import Subset
from protoclip_jax.data.tars import TarPairs, tar_paths
from protoclip_jax.data.tfds_pairs import TfdsPairs, is_tfds
from protoclip_jax.storage import objects
from protoclip_jax.storage.paths import is_remote


@runtime_checkable
class PairSource(Protocol):
    """Pairs by row, in a fixed order. Picklable: worker processes read their own copy.

    Attributes:
      name: what to call it in messages.
      fingerprint: equal only for the same pairs in the same order, wherever they lie.
    """

    name: str
    fingerprint: str

    def __len__(self) -> int: ...

    def read(self, row: int) -> tuple[bytes, str]:
        """A picture's file content and its caption; `UnreadableImage` if it cannot be had."""
        ...


def read_pair(source, row: int) -> tuple[bytes, str]:
    """A pair of a `PairSource` for use; `UnreadableImage` also where its caption says nothing.

    Lists and tars have left such captions out before; sets in which a look at every caption would
    be a read of everything (TFDS, ArrayRecord) meet them here.
    """
    data, caption = source.read(row)
    if not is_caption(caption):
        raise UnreadableImage(NO_CAPTION)
    return data, caption


def where(source: PairSource, row: int) -> str:
    """What a row is called in reports: the picture's path where the source knows it."""
    return shown(source.where(row) if hasattr(source, "where") else f"{source.name} row {row}")


def origin(source: PairSource, row: int) -> int:
    """The row's number in the whole source, where `source` may be a subset of it."""
    return source.origin(row) if isinstance(source, Subset) else row


def _emoji_text(spec: str, options: dict) -> PairSource:
    from protoclip_jax.data.emoji_text import EmojiText

    return EmojiText(spec.removeprefix("emoji_text/"))


def _tfds(spec: str, options: dict) -> PairSource:
    names = ("split", "image_feature", "text_feature")
    return TfdsPairs(spec, **{name: options[name] for name in names})


def _array_records(spec: str, options: dict) -> PairSource:
    return ArrayRecordPairs(spec)


def _tars(spec: str, options: dict) -> PairSource:
    return TarPairs(spec)


def _pair_list(spec: str, options: dict) -> PairSource:
    names = ("image_column", "caption_column", "separator", "image_root")
    return PairList(spec, **{name: options[name] for name in names})


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
    ("a folder made by `prepare convert`", is_array_records, _array_records),
    ("tfds:NAME or a folder prepared by TFDS", is_tfds, _tfds),
    (
        "a .tar, a folder of them, or several as in shards/{00000..00331}.tar",
        lambda spec: bool(tar_paths(spec)),
        _tars,
    ),
)


def _found(spec: str) -> str:
    """What there is under a name that no kind recognises."""
    if os.path.isdir(spec) or (is_remote(spec) and objects.exists(spec)):
        return " (a folder without meta.json, dataset_info.json or .tar files)"
    return "" if os.path.exists(spec) else " (no such file or folder)"


def _refuse_other_form(spec: str) -> None:
    """Names a file that is no source by what it is, such as a compressed list."""
    if os.path.isfile(spec):
        with open(spec, "rb") as file:
            head = file.read(HEAD)
    elif is_remote(spec):
        try:
            head = objects.read(spec, 0, HEAD)
        except (FileNotFoundError, IsADirectoryError):
            return
    else:
        return
    refuse_other_forms(spec, head)


def needless_limit(pairs: int, limit: int | None) -> str | None:
    """A line on a limit above the number of pairs, which takes them all; none where it acts."""
    return f"there are only {pairs:,} pairs, and all are used" if limit and limit > pairs else None


def open_source(
    spec: str,
    *,
    image_column: str = "filepath",
    caption_column: str = "title",
    separator: str = "\t",
    image_root: str | None = None,
    split: str = "train",
    image_feature: str = "image",
    text_feature: str = "caption",
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
      split: of a TFDS set: a split, or a slice such as train[:90%].
      image_feature: of a TFDS set: name of the picture's feature.
      text_feature: of a TFDS set: name of the caption's; a part of another as whole/part.
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
        "split": split,
        "image_feature": image_feature,
        "text_feature": text_feature,
    }
    for _, recognises, opens in KINDS:
        if recognises(spec):
            source = opens(spec, options)
            break
    else:
        _refuse_other_form(spec)
        known = "; ".join(form for form, _, _ in KINDS)
        raise ValueError(f"no kind of data source is called {spec!r}{_found(spec)}: wanted {known}")
    if limit is not None and limit < len(source):
        source = Subset(source, limit, seed)
    return source
