"""What a source holds: readable and repeated pairs, lengths and scripts of captions, sizes."""

import collections
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Shaped, UInt64

from protoclip_jax.data.bar import counted
from protoclip_jax.data.decoding import UnreadableImage, load
from protoclip_jax.data.image_warnings import caught
from protoclip_jax.data.sources import PairSource, read_pair
from protoclip_jax.data.tokenizer import Tokenizer
from protoclip_jax.prepare import pool
from protoclip_jax.prepare.scripts import scripts_of
from protoclip_jax.storage.atomic import write_json
from protoclip_jax.storage.paths import as_path

CONTEXT = 77  # tokens that CLIP's text tower sees, start and end included
NO_SCRIPT = "no letters"

_BLOCK = 2000  # rows of a job
_COUNTED = ("characters", "tokens", "shorter_side", "longer_side")
_SHOWN = ("least", "5 %", "median", "95 %", "most")


@dataclasses.dataclass
class Part:
    """Counts over some rows; they add up.

    Attributes:
      unreadable: rows by reason.
      odd: pictures that Pillow warns of and that are used all the same, by kind.
      formats: pictures by file format.
      scripts: captions by script; a caption with two counts in both.
      counted: how often each value of a quantity occurs, by quantity.
      pictures: 64-bit hashes of the files of readable pictures.
      captions: of the captions of the same rows.
    """

    unreadable: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    odd: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    formats: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    scripts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    counted: dict[str, collections.Counter] = dataclasses.field(
        default_factory=lambda: {name: collections.Counter() for name in _COUNTED}
    )
    pictures: UInt64[np.ndarray, " n"] = dataclasses.field(
        default_factory=lambda: np.zeros(0, np.uint64)
    )
    captions: UInt64[np.ndarray, " n"] = dataclasses.field(
        default_factory=lambda: np.zeros(0, np.uint64)
    )


@dataclasses.dataclass(frozen=True)
class _Reader:
    """A job of the pool: reads a range of rows."""

    source: PairSource

    def __call__(self, rows: range, tick: Callable[[], None]) -> Part:
        part, captions, pictures = Part(), [], []
        for row in rows:
            try:
                data, caption = read_pair(self.source, row)
                with caught() as odd:
                    image = load(data)
            except UnreadableImage as error:
                part.unreadable[error.reason] += 1
            else:
                part.odd.update(odd)
                part.formats[_format(data)] += 1
                part.counted["shorter_side"][min(image.size)] += 1
                part.counted["longer_side"][max(image.size)] += 1
                part.scripts.update(scripts_of(caption) or (NO_SCRIPT,))
                pictures.append(_hash(data))
                captions.append(caption)
            tick()
        if captions:
            part.counted["characters"].update(map(len, captions))
            part.counted["tokens"].update(Tokenizer().lengths(captions).tolist())
        part.pictures = np.array(pictures, np.uint64)
        part.captions = np.array([_hash(c.encode(errors="replace")) for c in captions], np.uint64)
        return part


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _format(data: bytes) -> str:
    """By the first bytes; the picture is known to be readable."""
    for start, name in (
        (b"\xff\xd8", "JPEG"),
        (b"\x89PNG", "PNG"),
        (b"RIFF", "WebP"),
        (b"GIF8", "GIF"),
        (b"BM", "BMP"),
        (b"II*\0", "TIFF"),
        (b"MM\0*", "TIFF"),
    ):
        if data.startswith(start):
            return name
    return "AVIF" if data[4:8] == b"ftyp" else "other"


def measure(source: PairSource, *, workers: int = 1, progress: bool = True) -> dict:
    """Reads and decodes every pair of a source.

    Memory: 16 bytes a row for the hashes that find repeated pairs.

    Returns:
      The numbers, as they go to JSON: see `describe` for what they are.
    """
    blocks = [
        range(first, min(first + _BLOCK, len(source))) for first in range(0, len(source), _BLOCK)
    ]
    parts, total = [], Part()
    with counted(len(source), "pair", shown=progress) as bar:
        for part in pool.run(_Reader(source), blocks, workers, bar):
            for name in ("unreadable", "odd", "formats", "scripts"):
                getattr(total, name).update(getattr(part, name))
            for name in _COUNTED:
                total.counted[name].update(part.counted[name])
            parts.append((part.pictures, part.captions))
    pictures = np.concatenate([part[0] for part in parts])
    captions = np.concatenate([part[1] for part in parts])
    return _numbers(source, total, pictures, captions)


def _numbers(
    source: PairSource,
    total: Part,
    pictures: UInt64[np.ndarray, " n"],
    captions: UInt64[np.ndarray, " n"],
) -> dict:
    pairs = np.stack([pictures, captions], axis=1).view([("", np.uint64)] * 2)[:, 0]
    left_out = getattr(source, "report", {})
    tokens = total.counted["tokens"]
    return {
        "source": source.name,
        "fingerprint": source.fingerprint,
        "rows": len(source),
        "left_out": {reason: left.count for reason, left in left_out.items()},
        "readable": len(pictures),
        "unreadable": dict(total.unreadable.most_common()),
        "odd": dict(total.odd.most_common()),
        "repeated": {
            "pictures": _repeated(pictures),
            "captions": _repeated(captions),
            "pairs": _repeated(pairs),
        },
        "captions": {
            "characters": _quantiles(total.counted["characters"]),
            "tokens": _quantiles(tokens),
            "share_cut": sum(n for length, n in tokens.items() if length > CONTEXT)
            / max(1, len(pictures)),
            "scripts": dict(total.scripts.most_common()),
        },
        "pictures": {
            "formats": dict(total.formats.most_common()),
            "shorter_side": _quantiles(total.counted["shorter_side"]),
            "longer_side": _quantiles(total.counted["longer_side"]),
        },
    }


def _repeated(hashes: Shaped[np.ndarray, " n"]) -> int:
    """Entries that an earlier one equals."""
    return len(hashes) - len(np.unique(hashes))


def _quantiles(counts: collections.Counter) -> dict[str, int | float | None]:
    """Least, 5th, 50th, 95th percentile, most, and mean of counted values."""
    if not counts:
        return dict.fromkeys([*_SHOWN, "mean"])
    values = np.array(sorted(counts))
    ends = np.cumsum([counts[value] for value in values.tolist()])
    ranks = [round(share * (int(ends[-1]) - 1)) for share in (0, 0.05, 0.5, 0.95, 1)]
    found = values[np.searchsorted(ends, ranks, side="right")]
    mean = sum(value * count for value, count in counts.items()) / int(ends[-1])
    return dict(zip(_SHOWN, found.tolist(), strict=True)) | {"mean": round(mean, 2)}


def describe(numbers: dict) -> str:
    """The numbers as text."""
    rows, readable = numbers["rows"], numbers["readable"]
    captions, pictures = numbers["captions"], numbers["pictures"]
    lines = [f"{numbers['source']}: {rows:,} rows"]
    lines += _counts("left out by the source", numbers["left_out"], None)
    lines.append(f"readable                {readable:,} ({readable / rows:.2%})")
    lines += _counts("unreadable", numbers["unreadable"], rows)
    lines += _counts("odd, and used all the same", numbers["odd"], readable)
    lines.append("repeated earlier ones")
    lines += _counts("", numbers["repeated"], readable)
    lines.append(f"captions                {'  '.join(f'{name:>7}' for name in (*_SHOWN, 'mean'))}")
    lines += [_line(name, captions[name]) for name in ("characters", "tokens")]
    lines.append(f"  cut at {CONTEXT} tokens       {captions['share_cut']:.2%}")
    lines += _counts("scripts", captions["scripts"], readable)
    lines.append("pictures")
    lines += [_line(name, pictures[name]) for name in ("shorter_side", "longer_side")]
    lines += _counts("formats", pictures["formats"], readable)
    return "\n".join(lines)


def _line(name: str, values: dict) -> str:
    cells = ("-" if values[key] is None else f"{values[key]:g}" for key in (*_SHOWN, "mean"))
    return f"  {name.replace('_', ' '):<22}" + "  ".join(f"{cell:>7}" for cell in cells)


def _counts(title: str, counts: dict[str, int], total: int | None) -> Iterable[str]:
    if title and counts:
        yield title
    for name, count in counts.items():
        share = f" ({count / total:.2%})" if total else ""
        yield f"  {name:<22}{count:,}{share}"


def write(numbers: dict, path: str | os.PathLike) -> None:
    """Writes the numbers as JSON, to a local or remote file."""
    write_json(as_path(path), numbers)
