"""Small pictures, lists and tars for tests of sources and of `prepare`."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(number: int, size: tuple[int, int] = (40, 30), form: str = "JPEG", **options) -> bytes:
    """A picture's file that no other number has."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 255, (4, 5, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize(size).save(file, form, **options)
    return file.getvalue()


def caption(number: int) -> str:
    """A caption that no other number has."""
    return f"picture no. {number}, ünïcode"


def spoiled(data: bytes, how: str) -> bytes:
    """A file that cannot be used: cut, empty or html."""
    return {"cut": data[: len(data) * 9 // 10], "empty": b"", "html": b"<html>gone</html>"}[how]


def write_list(
    folder: Path, count: int, faults: dict[int, str] | None = None, size: tuple[int, int] = (40, 30)
) -> str:
    """A pair list and its pictures; `faults` names the rows that are missing, cut, empty, html."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["filepath\ttitle"]
    for number in range(count):
        lines.append(f"{number}.jpg\t{caption(number)}")
        fault = (faults or {}).get(number)
        if fault != "missing":
            data = picture(number, size)
            (folder / f"{number}.jpg").write_bytes(spoiled(data, fault) if fault else data)
    path = folder / "pairs.tsv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def write_tar(
    path: Path, members: dict[str, bytes | str | dict], form: int = tarfile.DEFAULT_FORMAT
) -> str:
    """A tar of files by name; a dict becomes JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members.items():
            if isinstance(content, dict):
                content = json.dumps(content)
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def write_shards(folder: Path, shards: int, rows: int) -> str:
    """A folder of tars as img2dataset writes them."""
    for shard in range(shards):
        members = {}
        for number in range(shard * rows, (shard + 1) * rows):
            members[f"{number:09}.jpg"] = picture(number)
            members[f"{number:09}.txt"] = caption(number)
            members[f"{number:09}.json"] = {"caption": caption(number), "url": "http://x/y"}
        write_tar(folder / f"{shard:05}.tar", members)
    return str(folder)


class Unlooked:
    """A source that meets its captions only when they are read, as sets of TFDS do."""

    name, fingerprint = "unlooked", "0"

    def __init__(self, captions: list[str]):
        self.captions = captions

    def __len__(self) -> int:
        return len(self.captions)

    def read(self, row: int) -> tuple[bytes, str]:
        return picture(row), self.captions[row]
