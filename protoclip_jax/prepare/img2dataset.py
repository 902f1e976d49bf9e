"""img2dataset as another program: where it is, how it is called, what its status files say."""

import collections
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

STATS = "_stats.json"
LOST = "lost inside img2dataset: see its log"
SUCCESS = "success"


def command(python: str | None) -> list[str]:
    """How to start it: by a given interpreter, this one, or the program on the PATH.

    Raises:
      ValueError: it is not installed; says how to.
    """
    if python is not None:
        if shutil.which(python) is None:
            raise ValueError(f"--img2dataset-python {python}: there is no such program")
        return [python, "-m", "img2dataset.main"]
    if importlib.util.find_spec("img2dataset") is not None:
        return [sys.executable, "-m", "img2dataset.main"]
    found = shutil.which("img2dataset")
    if found is None:
        raise ValueError(
            "downloading needs img2dataset: `pip install img2dataset` (the extra `download`), here "
            "or in an environment of its own that you name with --img2dataset-python"
        )
    return [found]


def arguments(links: Path, out: Path, settings) -> list[str]:
    """Its options for a folder of Parquet lists with the columns url, caption and line."""
    options = {
        "url_list": links,
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "save_additional_columns": '["line"]',
        "output_folder": out,
        "output_format": "webdataset",
        "number_sample_per_shard": settings.shard_rows,
        "processes_count": settings.processes,
        "thread_count": settings.threads,
        "timeout": settings.timeout,
        "retries": settings.retries,
        "incremental_mode": "incremental",
        "extract_exif": False,
        "enable_wandb": False,
        "encode_format": "jpg",
        "encode_quality": 95,
        # A JPEG that need not shrink stays byte for byte, and with it its orientation and its
        # damage, which `convert` then sees.
        "skip_reencode": True,
        "resize_mode": "keep_ratio" if settings.side else "no",
        "resize_only_if_bigger": True,
        "image_size": settings.side or 256,
    }
    return [f"--{name}={value}" for name, value in options.items()]


def shard_stats(out: Path) -> dict[int, dict]:
    """The status files of the finished shards, by shard; damaged ones are left out."""
    found = {}
    for path in sorted(out.glob(f"*{STATS}")):
        stats = _read(path)
        if stats is not None:
            found[int(path.name.removesuffix(STATS))] = stats
    return found


def remove_damaged(out: Path) -> int:
    """Removes status files that a kill left half written, so that their shards are done again."""
    damaged = [path for path in out.glob(f"*{STATS}") if _read(path) is None]
    for path in damaged:
        path.unlink()
    return len(damaged)


def _read(path: Path) -> dict | None:
    try:
        stats = json.loads(path.read_text(encoding="utf-8"))
        return stats if {"count", "status_dict"} <= stats.keys() else None
    except (ValueError, AttributeError):
        return None


def outcomes(stats: dict[int, dict]) -> collections.Counter[str]:
    """Rows by outcome, over all shards: `SUCCESS`, or the reason."""
    total: collections.Counter[str] = collections.Counter()
    for shard in stats.values():
        for text, count in shard["status_dict"].items():
            total[reason(text)] += count
        # A row on which img2dataset itself fails is in no count but that of all.
        total[LOST] += shard["count"] - sum(shard["status_dict"].values())
    return +total


def reason(text: str) -> str:
    """An error's text without what differs from link to link."""
    if match := re.search(r"HTTP Error (\d{3})[^<>]*", text):
        return match[0].strip()
    text = re.sub(r"\s+", " ", text.strip("<>() "))
    text = re.sub(r"(?<!\w)'[^']*'|\"[^\"]*\"", "'...'", text)
    return re.sub(r"\d+", "N", text)[:80]
