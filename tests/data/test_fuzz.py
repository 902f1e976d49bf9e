"""Foreign bytes, spoiled at random: every reader ends in time and memory, and with its own errors.

The seeds are fixed, so that a fault found once is found again; what got through is in `FOUND`.
"""

import contextlib
import dataclasses
import json
import resource
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from array_record.python import array_record_module
from pair_files import caption, picture, write_shards

from protoclip_jax import recipe
from protoclip_jax.config import Config, ConfigError, flatten
from protoclip_jax.data import array_records, tar_index, teacher_note
from protoclip_jax.data.bert import read_safetensors
from protoclip_jax.data.decoding import UnreadableImage, decode
from protoclip_jax.data.emoji_text import embedded_directory
from protoclip_jax.data.npy_table import open_table
from protoclip_jax.data.record_files import RecordFile, check_counts, opened
from protoclip_jax.data.seen_files import SeenFiles, states_of
from protoclip_jax.data.tar_members import members
from protoclip_jax.data.tar_samples import samples
from protoclip_jax.data.tf_records import TfRecords
from protoclip_jax.data.tfds_description import FEATURES, INFO
from protoclip_jax.data.tfds_pairs import TfdsPairs
from protoclip_jax.training import record

MEMORY = 2**30  # bytes that all cases of a reader may add
SECONDS = 5.0  # of this process, for one case


class Reader(NamedTuple):
    """What reads a kind of file.

    `seeds` are valid files, `read` gets one of them spoiled, in a folder of its own; `errors` are
    what its documentation names.
    """

    seeds: list[bytes]
    read: Callable[[Path, bytes], Any]
    errors: tuple[type[Exception], ...] = (ValueError,)


def spoiled(data: bytes, rng: np.random.Generator) -> bytes:
    """One to three faults: flipped bits, lost, moved or repeated parts, extreme numbers."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at, other, length = (int(rng.integers(0, len(data) + 1)) for _ in range(3))
        length = min(length, int(2 ** rng.integers(0, 12)))
        match rng.integers(0, 8):
            case 0 | 1 if at < len(data):
                data[at] ^= 1 << int(rng.integers(0, 8))
            case 2:
                del data[at:]
            case 3:
                del data[at : at + length]
            case 4:
                data[at : at + length] = bytes(length)
            case 5:
                data[at:at] = data[other : other + length]
            case 6:
                data[at : at + length] = data[other : other + length]
            case _:
                extreme = EXTREMES[int(rng.integers(0, len(EXTREMES)))]
                data[at : at + len(extreme)] = extreme
    return bytes(data)


EXTREMES = (
    b"\xff" * 4,
    b"\xff" * 8,
    b"\xff" * 7 + b"\x7f",
    b"\x80" + bytes(10),
    b"\x80" + b"\xff" * 11,
    b"99999999999",
    b"-1",
    b"-77777777777",
    bytes(8),
    b"\xc3\x28",
    b"[" * 3000,
)
VALUES = (None, True, -1, 0, 2**70, 1e308, float("nan"), "", "../x", "\ud800", "x" * 5000, [], {})


def spoiled_json(data: bytes, rng: np.random.Generator) -> bytes:
    """A JSON in which a value is another one, or its bytes are spoiled."""
    if rng.random() < 0.4:
        return spoiled(data, rng)
    content = json.loads(data)
    places = list(_places(content))
    holder, key = places[int(rng.integers(0, len(places)))]
    choice = int(rng.integers(0, len(VALUES) + 2))
    if choice < len(VALUES):
        holder[key] = VALUES[choice]
    elif choice == len(VALUES):
        del holder[key]
    else:
        holder[key] = [holder[key]] * 3
    return json.dumps(content).encode()


def _places(content) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON, as its holder and its key there."""
    keys = content.keys() if isinstance(content, dict) else range(len(content))
    for key in keys:
        yield content, key
        if isinstance(content[key], dict | list):
            yield from _places(content[key])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Valid files of every kind."""
    folder = tmp_path_factory.mktemp("base")
    writer = array_record_module.ArrayRecordWriter(
        str(folder / "a.array_record"), array_records.WRITER_OPTIONS
    )
    for row in range(5):
        writer.write(array_records.pack(row, caption(row), picture(row)))
    writer.close()
    write_shards(folder / "tars", 1, 3)
    tar_index.tar_index([str(folder / "tars" / "00000.tar")])
    np.save(folder / "a.npy", np.ones((4, 3), np.float32))
    header = {name: {"dtype": "F32", "shape": [2, 3]} for name in "ab"}
    for number, entry in enumerate(header.values()):
        entry["data_offsets"] = [24 * number, 24 * number + 24]
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    (folder / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(48))
    return folder


def tar(folder: Path, data: bytes) -> None:
    def read(start: int, length: int) -> bytes:
        assert length <= 2**20
        return data[start : start + length]

    list(samples(members(read), read, lambda reason, name: None))


def index(folder: Path, suffix: str, data: bytes) -> None:
    """A kept index is used as it was, or not at all."""
    stem = next((folder / ".protoclip_tars").glob("*.json")).with_suffix("")
    states = states_of([str(folder / "00000.tar")])
    path = stem.with_suffix(suffix)
    valid, whole = path.read_bytes(), tar_index._load(stem, states)
    path.write_bytes(data)
    found = tar_index._load(stem, states)
    path.write_bytes(valid)
    assert found is None or (found.fingerprint, found.report) == (whole.fingerprint, whole.report)
    assert found is None or (found.entries == whole.entries).all()


def image(folder: Path, data: bytes) -> None:
    decode(data, max_pixels=2**20)


def npy(folder: Path, data: bytes) -> None:
    (folder / "a.npy").write_bytes(data)
    table = open_table(folder / "a.npy", 4)
    table.rows(np.arange(min(table.count, 4)))


def safetensors(folder: Path, data: bytes) -> None:
    (folder / "a.safetensors").write_bytes(data)
    read_safetensors(folder / "a.safetensors")


def note(folder: Path, data: bytes) -> None:
    (folder / "a.npy.json").write_bytes(data)
    found = teacher_note.read_note(folder / "a.npy")
    found.check("a.npy", found.numbers, None)


def meta(folder: Path, records: bytes, data: bytes) -> None:
    assert len(records) == SHARD["bytes"]
    (folder / "meta.json").write_bytes(data)
    for place in (folder, folder.parent):  # outside of the set's folder, too
        (place / array_records.shard_name(0, 1)).write_bytes(records)
    source = array_records.ArrayRecordPairs(folder)
    assert len(source) < 2**40
    for file in source._files():
        assert Path(file.path).parent == folder


def run_recipe(folder: Path, data: bytes) -> None:
    (folder / "recipe.json").write_bytes(data)
    recipe.from_flat(record.read(folder)["recipe"])


def description(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)
    TfdsPairs(str(folder), **VAL)


def tf_records(folder: Path, data: bytes) -> None:
    path = str(folder / "a.tfrecord")
    Path(path).write_bytes(data)
    records = TfRecords([RecordFile(path, 0, -1, "")], SeenFiles.now([path]), str)
    for row in range(min(len(records), 5)):
        records[row]


def array_record(folder: Path, data: bytes) -> None:
    path = str(folder / "a.array_record")
    Path(path).write_bytes(data)
    check_counts({path: 5})
    reader = opened(path)
    for row in range(5):
        reader.read([row])


def example(source: TfdsPairs) -> Callable[[Path, bytes], None]:
    def read(folder: Path, data: bytes) -> None:
        source._records = [data] * len(source)
        source.read(0)

    return read


def _all_but_val(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if "array_record" in name and "-val." not in name]


VAL = {"split": "val", "text_feature": "title"}
FORMS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
NOTE = {"format": teacher_note.FORMAT, "version": teacher_note.VERSION, "source": "a", "pairs": 4}
NOTE |= {"source_fingerprint": "f", "encoder": "e", "dimensions": 3, "numbers": "n"}
SHARD = {"file": array_records.shard_name(0, 1), "pairs": 5, "bytes": 131072, "digest": "d"}
META = {"format": array_records.FORMAT, "version": array_records.VERSION, "source": "a"}
META |= {"pairs": 5, "fingerprint": array_records.fingerprint(["d"]), "shards": [SHARD]}
META |= {"unreadable": {"broken image": {"count": 1, "examples": ["row 3"]}}}


def dumped(content) -> list[bytes]:
    return [json.dumps(content).encode()]


def reader_of(kind: str, base: Path, folder: Path) -> Reader:
    """How a kind is read; its files lie in the folder."""
    prepared = embedded_directory()
    records = (base / "a.array_record").read_bytes()
    if kind == "tar":
        return Reader([(base / "tars" / "00000.tar").read_bytes().rstrip(b"\0") + bytes(2048)], tar)
    if kind in ("index .json", "index .npy"):
        shutil.copytree(base / "tars", folder, dirs_exist_ok=True)
        suffix = kind.removeprefix("index ")
        seed = next((base / "tars" / ".protoclip_tars").glob(f"*{suffix}"))
        return Reader([seed.read_bytes()], lambda folder, data: index(folder, suffix, data), ())
    if kind.startswith("image "):
        form = kind.removeprefix("image ")
        return Reader([picture(1, (20, 15), form)], image, (UnreadableImage,))
    if kind in (INFO, FEATURES):
        shutil.copytree(prepared, folder, dirs_exist_ok=True, ignore=_all_but_val)
        return Reader(
            [(prepared / kind).read_bytes()],
            lambda folder, data: description(folder, kind, data),
            (ValueError, OSError),
        )
    if kind == "example":
        source = TfdsPairs(str(prepared), **VAL)
        return Reader([source._records[1]], example(source), (UnreadableImage,))
    return {
        "npy": Reader([(base / "a.npy").read_bytes()], npy),
        "safetensors": Reader([(base / "a.safetensors").read_bytes()], safetensors),
        "teacher note": Reader(dumped(NOTE), note),
        "meta.json": Reader(
            dumped(META),
            lambda folder, data: meta(folder, records, data),
            (ValueError, OSError),
        ),
        "recipe.json": Reader(
            dumped({"recipe": flatten(dataclass_dict())}), run_recipe, (ConfigError,)
        ),
        "tfrecord": Reader([tf_record(b"abc") + tf_record(b"")], tf_records),
        "array_record": Reader([records], array_record, (ValueError, RuntimeError)),
        "record of a pair": Reader(
            [array_records.pack(3, caption(3), b"picture")],
            lambda folder, data: array_records.unpack(data),
            (UnreadableImage,),
        ),
    }[kind]


def dataclass_dict() -> dict:
    return dataclasses.asdict(Config())


def tf_record(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + bytes(4) + data + bytes(4)


JSON = (INFO, FEATURES, "teacher note", "meta.json", "recipe.json")
KINDS = (
    "tar",
    "index .json",
    "index .npy",
    *(f"image {form}" for form in FORMS),
    "npy",
    "safetensors",
    "tfrecord",
    "array_record",
    "example",
    "record of a pair",
    *JSON,
)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """No more memory than so much above what the process has now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def tried(reader: Reader, folder: Path, data: bytes) -> bool:
    """Whether a reader takes the data; fails where it needs too long or errs in another way."""
    begin = time.process_time()
    try:
        reader.read(folder, data)
        return True
    except reader.errors as error:
        return "MemoryError" in str(error) and pytest.fail("needs too much memory")
    finally:
        assert time.process_time() - begin < SECONDS


def fuzzed(kind: str, base: Path, folder: Path, cases: int, seed: int) -> None:
    reader = reader_of(kind, base, folder)
    rng = np.random.default_rng(seed)
    spoil = spoiled_json if kind in JSON else spoiled
    refused = 0
    with bounded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed_file in reader.seeds:
            assert tried(reader, folder, seed_file)
            for case in range(cases):
                data = spoil(seed_file, rng)
                try:
                    refused += not tried(reader, folder, data)
                except BaseException as error:
                    error.add_note(f"{kind}: case {case} of seed {seed}: {data[:300]!r}")
                    raise
    assert refused or not reader.errors


@pytest.mark.parametrize("kind", KINDS)
def test_spoiled_bytes_of_every_kind(base, tmp_path, kind):
    fuzzed(kind, base, tmp_path, 30, 0)


def arrays(**entries: list[int]) -> bytes:
    """A .safetensors file of 24 bytes with these arrays of six numbers."""
    header = {
        name: {"dtype": "F32", "shape": [2, 3], "data_offsets": offsets}
        for name, offsets in entries.items()
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(24)


def spelled(content: dict, old: str, new: str) -> bytes:
    text = json.dumps(content)
    assert old in text
    return text.replace(old, new).encode()


# What once came out as another error, took memory without bound, or led out of a folder.
FOUND = [
    ("safetensors", b""),
    ("safetensors", b"\xff" * 8 + b"{}"),
    ("safetensors", (100_000).to_bytes(8, "little") + b"[" * 100_000),
    ("safetensors", arrays(a=[0, 24], b=[0, 24], c=[0, 24])),
    ("safetensors", arrays(a=[24, 48])),
    ("safetensors", arrays(a=[-24, 0])),
    ("npy", b"\x93NUMPY\x01\x00\x70\x17" + b"(" * 6000),
    ("npy", b""),
    ("meta.json", spelled(META, '"row 3"', "1e308")),
    ("meta.json", spelled(META, '"pairs": 5', '"pairs": -5')),
    ("meta.json", spelled(META, '"file": "', '"file": "../')),
    ("meta.json", spelled(META, '"file": "', '"file": "/')),
    ("meta.json", b"[" * 100_000),
    ("meta.json", b"\xff"),
    ("teacher note", spelled(NOTE, '"encoder": "e"', '"encoder": [1]')),
    ("teacher note", b"[" * 100_000),
    ("recipe.json", b'{"recipe": {"episode.size": "many"}}'),
    ("recipe.json", b'{"recipe": [1]}'),
    ("recipe.json", b"[" * 100_000),
    ("record of a pair", b"short"),
    ("record of a pair", bytes(8) + b"\1\0\0\0\xff"),
    ("tfrecord", b"\xff" * 16),
    ("array_record", b""),
]


@pytest.mark.parametrize("number", range(len(FOUND)))
def test_what_got_through_once_is_refused(base, tmp_path, number):
    kind, data = FOUND[number]
    with bounded():
        assert not tried(reader_of(kind, base, tmp_path), tmp_path, data)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_more_spoiled_bytes_of_every_kind(base, tmp_path, kind):
    fuzzed(kind, base, tmp_path, 300, 1)
