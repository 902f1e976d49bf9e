"""One shard: the rows of a block of the source, written as ArrayRecord, with their outcomes."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from array_record.python import array_record_module

from protoclip_jax.data.array_records import (
    WRITER_OPTIONS,
    add_to_digest,
    digest_of,
    pack,
    samples_of,
    shard_digest,
    shard_name,
)
from protoclip_jax.data.decoding import UnreadableImage
from protoclip_jax.data.image_warnings import caught
from protoclip_jax.data.sources import PairSource, origin, read_pair, where
from protoclip_jax.prepare.picture import stored
from protoclip_jax.storage.atomic import part_of, settle, write_json

OUTCOMES = "outcomes"


@dataclasses.dataclass(frozen=True)
class ConvertSettings:
    """What a converted set depends on beside its source.

    Attributes:
      side: shorter side of larger pictures; 0 = as they are.
      encoding: "jpeg" or "webp".
      quality: of the encoding, 1 to 100.
      shard_rows: rows of the source in a block, which becomes a shard.
    """

    side: int = 256
    encoding: str = "jpeg"
    quality: int = 95
    shard_rows: int = 20_000

    def __post_init__(self):
        if self.side < 0 or not 1 <= self.quality <= 100 or self.shard_rows < 1:
            raise ValueError(
                f"side {self.side} must be 0 or more, quality {self.quality} from 1 to 100, rows "
                f"of a shard {self.shard_rows} 1 or more"
            )


def outcome_path(out: Path, number: int) -> Path:
    """Where the outcomes of a shard's rows are; it is there when the shard is finished."""
    return out / OUTCOMES / f"{number:05}.json"


def is_finished(out: Path, number: int, count: int, rows: tuple[int, int]) -> bool:
    """Whether a shard and its outcome are there, and are what was written.

    A shard of another conversion, or of zeros, may well have the right size: its records are read.

    Args:
      out: folder of the set.
      number: of the shard.
      count: shards of the set.
      rows: of the source, first and behind the last.

    Raises:
      OSError: the disk fails.
    """
    try:
        outcome = json.loads(outcome_path(out, number).read_text(encoding="utf-8"))
        shard = out / shard_name(number, count)
        unreadable, odd = outcome["unreadable"], outcome.get("odd", {})
        return (
            outcome["file"] == shard.name  # a damaged one might name a file elsewhere
            and tuple(outcome["rows"]) == rows
            and all(type(outcome[number]) is int for number in ("pairs", "bytes"))
            and isinstance(unreadable, list)
            and outcome["pairs"] + len(unreadable) == rows[1] - rows[0]
            and all(
                isinstance(reason, str) and isinstance(name, str) for _, reason, name in unreadable
            )
            and all(isinstance(many, int) for many, _ in odd.values())
            and shard.stat().st_size == outcome["bytes"]
            and digest_of(str(shard)) == outcome["digest"]
            and ("samples" not in outcome or samples_of(str(shard)) == outcome["samples"])
        )
    except FileNotFoundError:
        return False
    # Of another form; the last one is the reader's, for a damaged shard.
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError):
        return False


@dataclasses.dataclass(frozen=True)
class ShardWriter:
    """Makes shards; a job of the pool.

    Attributes:
      source: the pairs.
      out: folder of the set.
      settings: form of the pictures.
      count: shards of the set.
    """

    source: PairSource
    out: Path
    settings: ConvertSettings
    count: int

    def __call__(self, number: int, tick: Callable[[], None]) -> dict:
        """Writes a shard, then its outcomes; returns these.

        Raises:
          OSError: the shard could not be written.
        """
        first = number * self.settings.shard_rows
        rows = range(first, min(first + self.settings.shard_rows, len(self.source)))
        path = self.out / shard_name(number, self.count)
        part = part_of(path)
        try:
            written, digest, unreadable, odd = self._write(part, rows, tick)
        except RuntimeError as error:  # the writer's, for a full disk among others
            raise OSError(f"{path} cannot be written: {error}") from error
        _check(part, written)
        samples = samples_of(str(part))
        settle(part, path)
        outcome = {
            "file": path.name,
            "rows": [rows.start, rows.stop],
            "pairs": written,
            "bytes": path.stat().st_size,
            "digest": digest,
            "samples": samples,
            "unreadable": unreadable,
            "odd": odd,
        }
        write_json(outcome_path(self.out, number), outcome)
        return outcome

    def _write(
        self, part: Path, rows: range, tick: Callable[[], None]
    ) -> tuple[int, str, list[list], dict[str, list]]:
        """Number and digest of the records, and what is wrong.

        That is [row, reason, picture] of what is unreadable; and of what is odd and used all the
        same, by kind, how many there are and the first picture.
        """
        settings, source = self.settings, self.source
        written, unreadable, odd = 0, [], {}
        digest = shard_digest()
        writer = array_record_module.ArrayRecordWriter(str(part), WRITER_OPTIONS)
        try:
            for row in rows:
                try:
                    data, caption = read_pair(source, row)
                    with caught() as kinds:
                        picture = stored(data, settings.side, settings.encoding, settings.quality)
                except UnreadableImage as error:
                    unreadable.append([origin(source, row), error.reason, where(source, row)])
                else:
                    record = pack(origin(source, row), caption, picture)
                    add_to_digest(digest, record)
                    writer.write(record)
                    written += 1
                    for kind in kinds:
                        odd.setdefault(kind, [0, where(source, row)])[0] += 1
                tick()
        finally:
            writer.close()
        return written, digest.hexdigest(), unreadable, odd


def _check(part: Path, written: int) -> None:
    """Reads back how many records the file holds: the writer may have failed unheard."""
    reader = array_record_module.ArrayRecordReader(str(part))
    found = reader.num_records()
    reader.close()
    if found != written:
        raise OSError(f"{part} holds {found} records after writing {written}: is the disk full?")
