"""Any source as a set of ArrayRecord shards (see `data.array_records`), resumable at any moment."""

import collections
import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from protoclip_jax.data.array_records import FORMAT, META, SETTINGS, VERSION, fingerprint
from protoclip_jax.data.bar import counted
from protoclip_jax.data.left_out import LeftOut
from protoclip_jax.data.sources import PairSource
from protoclip_jax.prepare import pool
from protoclip_jax.prepare.notes import begun_with
from protoclip_jax.prepare.shard import (
    OUTCOMES,
    ConvertSettings,
    ShardWriter,
    is_finished,
    outcome_path,
)
from protoclip_jax.storage.atomic import PART, clear_parts, part_of, settle, write_json
from protoclip_jax.storage.lock import LOCK, NOTE, locked
from protoclip_jax.storage.paths import local_only
from protoclip_jax.storage.screen import ESCAPED

__all__ = ["UNREADABLE", "ConvertSettings", "convert"]

UNREADABLE = "unreadable.tsv"
# What meta.json takes of a shard's outcome; older outcomes have no samples.
_OF_META = ("file", "pairs", "rows", "bytes", "digest", "samples")
_AT_A_TIME = 4  # finished shards read at once, which the disk bounds


def convert(
    source: PairSource,
    out: str | Path,
    settings: ConvertSettings,
    *,
    workers: int = 1,
    progress: bool = True,
) -> dict:
    """Writes the pairs of a source as shards; or goes on, or finds that all is done.

    Says what it finds and what became of every row.

    Args:
      source: the pairs.
      out: folder of the set.
      settings: form of pictures and shards.
      workers: processes that decode and write.
      progress: show how far it is.

    Returns:
      The content of meta.json.

    Raises:
      ValueError: `out` holds something else, or another process works there.
      OSError: it cannot be written.
    """
    out = local_only(out, "shards are")
    _claim(out)
    with locked(out):
        _agree(out, source, settings)
        count = -(-len(source) // settings.shard_rows)
        finished = _finished(out, count, len(source), settings)
        _clear(out, len(finished), count)
        todo = [number for number in range(count) if number not in finished]
        done = sum(stop - start for start, stop in finished.values())
        if todo:
            job = ShardWriter(source, out.absolute(), settings, count)
            with counted(len(source), "pair", done=done, shown=progress) as bar:
                for _ in pool.run(job, todo, workers, bar):
                    pass
        meta = _summary(out, source, settings, count)
    _tell(out, meta)
    return meta


def _claim(out: Path) -> None:
    """Makes the folder, unless it holds other things."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose another --out")
    if out.exists() and not (out / SETTINGS).exists():
        # A run killed at its very beginning leaves these.
        known = (OUTCOMES, LOCK, NOTE)
        if any(path.name not in known and path.suffix != PART for path in out.iterdir()):
            raise ValueError(f"{out} holds other files: choose another --out")
    (out / OUTCOMES).mkdir(parents=True, exist_ok=True)


def _agree(out: Path, source: PairSource, settings: ConvertSettings) -> None:
    """Notes what the set is made from, or compares."""
    wanted = {
        "format": FORMAT,
        "version": VERSION,
        "source": source.name,
        "rows": len(source),
        "fingerprint": source.fingerprint,
        **dataclasses.asdict(settings),
    }
    path = out / SETTINGS
    if not path.exists():
        write_json(path, wanted)
        return
    stored = begun_with(path, ["fingerprint"])
    for key, value in wanted.items():
        if key != "source" and stored.get(key) != value:
            raise ValueError(
                f"{out} was begun with {key} {stored.get(key)!r} (source {stored.get('source')}), "
                f"and this is {key} {value!r}: choose another --out, or remove it"
            )


def _finished(
    out: Path, count: int, rows: int, settings: ConvertSettings
) -> dict[int, tuple[int, int]]:
    """Rows of the shards that need not be made again, by number; removes outcomes of the others."""
    finished = {}
    for number in range(count):
        first = number * settings.shard_rows
        finished[number] = first, min(first + settings.shard_rows, rows)
    there = [number for number in finished if outcome_path(out, number).exists()]
    if there:
        print(f"{out}: looks through {len(there)} shards of {count}")
    with ThreadPoolExecutor(_AT_A_TIME) as threads:
        good = threads.map(lambda number: is_finished(out, number, count, finished[number]), there)
        kept = {number for number, whole in zip(there, good, strict=True) if whole}
    for number in set(there) - kept:
        outcome_path(out, number).unlink()
    return {number: finished[number] for number in sorted(kept)}


def _clear(out: Path, finished: int, count: int) -> None:
    parts = clear_parts(out) + clear_parts(out / OUTCOMES)
    if finished == count:
        print(f"{out}: all {count} shards are there")
    elif finished or parts:
        print(
            f"{out}: goes on, {finished} of {count} shards are there"
            + (f"; {parts} unfinished files removed" if parts else "")
        )


def _summary(out: Path, source: PairSource, settings: ConvertSettings, count: int) -> dict:
    """Adds up the outcomes: unreadable.tsv, and meta.json as the last file of all."""
    shards, unreadable = [], collections.defaultdict(LeftOut)
    odd: dict[str, list] = {}
    next_row = 0
    table = part_of(out / UNREADABLE)
    with open(table, "w", encoding="utf-8", errors=ESCAPED) as file:
        for number in range(count):
            outcome = json.loads(outcome_path(out, number).read_text(encoding="utf-8"))
            first, stop = outcome["rows"]
            lost = outcome["unreadable"]
            if first != next_row or outcome["pairs"] + len(lost) != stop - first:
                raise ValueError(
                    f"{outcome_path(out, number)} accounts for {outcome['pairs']} + {len(lost)} of "
                    f"the rows {first} to {stop}: remove it and run again"
                )
            next_row = stop
            for row, reason, name in lost:
                unreadable[reason].add(f"row {row}")
                name = name.replace("\t", " ").replace("\n", " ")
                file.write(f"{row}\t{name}\t{reason}\n")
            for kind, (number_of, first_one) in outcome.get("odd", {}).items():
                odd.setdefault(kind, [0, first_one])[0] += number_of
            shards.append({key: outcome[key] for key in _OF_META if key in outcome})
    settle(table, out / UNREADABLE)
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "pairs": sum(shard["pairs"] for shard in shards),
        "fingerprint": fingerprint(shard["digest"] for shard in shards),
        "source": source.name,
        "source_fingerprint": source.fingerprint,
        "source_rows": len(source),
        **dataclasses.asdict(settings),
        "unreadable": {reason: dataclasses.asdict(left) for reason, left in unreadable.items()},
        "odd": odd,
        "shards": shards,
    }
    if next_row != len(source):
        raise ValueError(f"{out}: the shards hold {next_row} of {len(source)} rows")
    write_json(out / META, meta)
    return meta


def _tell(out: Path, meta: dict) -> None:
    lost = {reason: entry["count"] for reason, entry in meta["unreadable"].items()}
    print(
        f"wrote {out}: {meta['source_rows']:,} rows = {meta['pairs']:,} pairs + "
        f"{sum(lost.values()):,} unreadable"
    )
    for reason, count in sorted(lost.items(), key=lambda item: -item[1]):
        print(f"  {reason}: {count:,}")
    if lost:
        print(f"  each of them is in {out / UNREADABLE}")
    for kind, (count, first) in meta["odd"].items():
        print(f"  {count:,} pictures have {kind}, and are used all the same; the first is {first}")
