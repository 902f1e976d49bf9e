"""Pictures of a list of links into tar shards, by img2dataset; resumable, every row accounted for.

`out` holds the shards (00000.tar with its .parquet and _stats.json) and the folder `download`:
settings.json, the list as img2dataset gets it, log.txt, and at the end report.json.
"""

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from protoclip_jax.data.bar import counted
from protoclip_jax.prepare import img2dataset
from protoclip_jax.prepare.link_list import Layout, Link, find_layout, links, photo_ids
from protoclip_jax.prepare.notes import begun_with, read_note
from protoclip_jax.storage.atomic import clear_parts, part_of, settle, write_json, write_text
from protoclip_jax.storage.lock import NO_LOCKS, locked
from protoclip_jax.storage.paths import local_only
from protoclip_jax.storage.screen import ESCAPED

FOLDER = "download"
_LIST_ROWS = 1_000_000  # of one Parquet file: img2dataset holds one in memory at a time
_BATCH = 50_000  # rows of it written at a time
_SHOWN = 25  # reasons on the screen; all are in report.json
_POLL = 0.5  # seconds
_GROUP = "group"  # file with the number of img2dataset's process group
_PATIENCE = 10.0  # seconds for what a killed run left to end


@dataclasses.dataclass(frozen=True)
class DownloadSettings:
    """How to download.

    Attributes:
      side: shorter side of larger pictures; 0 keeps JPEG files as they are.
      processes: processes of img2dataset, each at work on a shard.
      threads: links of a process at a time.
      timeout: seconds for a link.
      retries: further tries of a link that fails.
      shard_rows: rows of the list in a shard.
    """

    side: int = 0
    processes: int = 1
    threads: int = 64
    timeout: int = 10
    retries: int = 1
    shard_rows: int = 10_000

    def __post_init__(self):
        least = min(self.processes, self.threads, self.timeout, self.shard_rows)
        if self.side < 0 or self.retries < 0 or least < 1:
            raise ValueError(f"impossible settings: {self}")


def download(
    list_path: str,
    out: str | Path,
    settings: DownloadSettings,
    *,
    url_column: str | None = None,
    caption_column: str | None = None,
    separator: str | None = None,
    photo_ids: str | None = None,
    python: str | None = None,
) -> int:
    """Downloads, or goes on; says what became of every row of the list.

    Args:
      list_path: the list of links.
      out: folder of the shards.
      settings: see there.
      url_column: name or number, where it is not to be found out; so are the next two.
      caption_column: the same.
      separator: the same.
      photo_ids: list of the photos wanted from the YFCC100M table.
      python: interpreter that has img2dataset.

    Returns:
      Exit code: 0, or 1 if img2dataset left shards undone.

    Raises:
      ValueError: img2dataset is missing, the list is not understood, or `out` is of another list.
    """
    start = img2dataset.command(python)
    layout = find_layout(
        list_path, url_column=url_column, caption_column=caption_column, separator=separator
    )
    print(f"{list_path} is {layout}")
    out = local_only(out, "shards are").absolute()
    folder = out / FOLDER
    _claim(out, folder)
    log_path = folder / "log.txt"
    with locked(folder), open(log_path, "a+", encoding="utf-8", errors=ESCAPED) as log:
        _end_earlier(folder, log)
        _agree(folder, list_path, settings, layout, photo_ids)
        notes = _handed_over(folder, list_path, settings, layout, photo_ids)
        again = img2dataset.remove_damaged(out)
        done = img2dataset.shard_stats(out)
        if done or again:
            print(f"goes on: {len(done)} of {notes['shards']} shards are there")
        if settings.side:
            print(
                "img2dataset shrinks the pictures, and does not turn those that the camera marked "
                "as turned; --side 0 keeps the files as they are, for `convert` to do both"
            )
        if len(done) < notes["shards"]:
            full = [*start, *img2dataset.arguments(folder / "links", out, settings)]
            _run(full, out, log, notes["rows"])
    return _report(list_path, out, folder, notes)


def _claim(out: Path, folder: Path) -> None:
    if out.exists() and not folder.exists() and any(out.iterdir()):
        raise ValueError(f"{out} holds other files: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)


def _end_earlier(folder: Path, log) -> None:
    """Ends what a killed run left behind, which would write to the same shards.

    img2dataset's processes inherit the log as their output and, with it, its lock; so the lock is
    held as long as one of them lives. What they were at is done again.

    Raises:
      ValueError: they do not end.
    """
    group, waited = folder / _GROUP, 0.0
    while True:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno in NO_LOCKS:  # nothing tells whether an earlier run lives: end it
                if group.exists():
                    _kill_group(int(group.read_text()))
                return
            if waited > _PATIENCE:
                raise ValueError(
                    f"processes of an earlier run are still at work in {folder.parent}: end them"
                ) from None
        if group.exists():
            _kill_group(int(group.read_text()))
        time.sleep(0.1)
        waited += 0.1


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _agree(
    folder: Path, list_path: str, settings: DownloadSettings, layout: Layout, ids: str | None
) -> None:
    """Notes what is downloaded, or compares."""
    how = dataclasses.asdict(layout) | {"captions": list(layout.captions)}
    wanted = {
        "list": _digest(list_path),
        "photo_ids": _digest(ids) if ids else None,
        # What follows from the list itself need not be compared.
        "layout": {key: how[key] for key in how.keys() - {"names", "width"}},
        "side": settings.side,
        "shard_rows": settings.shard_rows,
    }
    path = folder / "settings.json"
    if not path.exists():
        write_json(path, wanted)
        return
    stored = begun_with(path, ["list"])
    for key, value in wanted.items():
        if stored.get(key) != value:
            raise ValueError(
                f"{folder.parent} was begun with {key} {stored.get(key)}, and this is {value}: "
                "choose another --out, or remove it"
            )


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _handed_over(
    folder: Path, list_path: str, settings: DownloadSettings, layout: Layout, ids: str | None
) -> dict:
    """Writes the list as Parquet, which has no quotes or headers to misread; returns the counts."""
    path = folder / "links.json"
    if path.exists() and (notes := read_note(path, ("rows", "dropped", "shards"))):
        return notes  # a damaged one is made again, from the same list
    if ids and layout.photo is None:
        raise ValueError(f"--photo-ids goes with the YFCC100M table, and {list_path} is {layout}")
    target = folder / "links"
    target.mkdir(exist_ok=True)
    clear_parts(target)
    dropped: collections.Counter[str] = collections.Counter()
    rows = links(list_path, layout, dropped, photo_ids(ids) if ids else None)
    # Whole shards only, so that a shard never spans two files.
    per_file = max(1, _LIST_ROWS // settings.shard_rows) * settings.shard_rows
    count, number = 0, 0
    while written := _write_links(target / f"{number:05}.parquet", rows, per_file):
        count, number = count + written, number + 1
    if not count:
        raise ValueError(f"{list_path} holds 0 links ({dict(dropped)})")
    notes = {
        "rows": count,
        "dropped": dict(dropped),
        "shards": -(-count // settings.shard_rows),
    }
    write_json(path, notes)
    return notes


def _write_links(path: Path, rows: Iterator[Link], limit: int) -> int:
    """Writes up to `limit` rows; returns how many, and makes no file for none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("url", pa.string()), ("caption", pa.string()), ("line", pa.int64())])
    part, written, writer = part_of(path), 0, None
    while written < limit:
        batch = list(itertools.islice(rows, min(_BATCH, limit - written)))
        if not batch:
            break
        writer = writer or pq.ParquetWriter(part, schema)
        columns = {name: [getattr(row, name) for row in batch] for name in schema.names}
        writer.write_table(pa.table(columns, schema=schema))
        written += len(batch)
    if writer is not None:
        writer.close()
        settle(part, path)
    return written


def _run(full: list[str], out: Path, log, rows: int) -> None:
    """Runs img2dataset to its end, and counts the rows of finished shards."""
    print(f"{' '.join(full)}", file=log, flush=True)
    environment = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1", "PYTHONWARNINGS": "ignore"}
    group = out / FOLDER / _GROUP
    group.unlink(missing_ok=True)
    with (
        subprocess.Popen(
            full,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # a group of its own, which can be ended as a whole
        ) as process,
        counted(rows, "link") as bar,
    ):
        try:
            write_text(group, str(process.pid))
            code = None
            while code is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(_POLL)
                done = sum(stats["count"] for stats in img2dataset.shard_stats(out).values())
                bar.update(done - bar.n)
        finally:
            _kill_group(process.pid)
    if code:
        raise OSError(f"img2dataset ended with code {code}: {_last_line(log.name)} ({log.name})")


def _last_line(path: str) -> str:
    lines = Path(path).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "no output"


def _report(list_path: str, out: Path, folder: Path, notes: dict) -> int:
    """Says and writes what became of every row; returns the exit code."""
    stats = img2dataset.shard_stats(out)
    found = img2dataset.outcomes(stats)
    open_rows = notes["rows"] - sum(found.values())
    dropped = sum(notes["dropped"].values())
    success = found.pop(img2dataset.SUCCESS, 0)
    report = {
        "list": list_path,
        "rows": notes["rows"] + dropped,
        "dropped": notes["dropped"],
        "pictures": success,
        "failed": dict(found.most_common()),
        "open": open_rows,
    }
    write_json(folder / "report.json", report)
    print(
        f"{out}: {report['rows']:,} rows = {success:,} pictures + {sum(found.values()):,} failed + "
        f"{dropped:,} that are no link with a caption"
        + (f" + {open_rows:,} not tried" if open_rows else "")
    )
    for reason, count in [*notes["dropped"].items(), *found.most_common(_SHOWN)]:
        print(f"  {reason}: {count:,}")
    if len(found) > _SHOWN:
        print(f"  ... and {len(found) - _SHOWN} more reasons in {folder / 'report.json'}")
    if open_rows:
        missing = notes["shards"] - len(stats)
        print(f"{missing} of {notes['shards']} shards are not finished: run the command again")
        return 1
    print(f"next: python -m protoclip_jax.prepare convert {out} --out {out}_256")
    return 0
