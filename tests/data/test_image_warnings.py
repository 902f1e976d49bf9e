"""Pillow's warnings: counted by kind, never on the screen; those of others as before."""

import io
import threading
import warnings

import pytest
from pair_files import picture, write_list
from PIL import Image
from small_batches import open_batches

from protoclip_jax.data.decoding import load
from protoclip_jax.data.image_warnings import (
    KINDS,
    NOTES,
    ODD,
    PALETTE,
    PIXELS,
    SERIES,
    caught,
    kind_of,
)
from protoclip_jax.data.sources import open_source
from protoclip_jax.data.unreadable import UnreadableLog
from protoclip_jax.prepare.convert import ConvertSettings, convert
from protoclip_jax.prepare.stats import describe, measure

# Promises two notes and holds one.
CUT = b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0\x01\0\0\0"


def palette() -> bytes:
    image, file = Image.new("P", (20, 20)), io.BytesIO()
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.save(file, "PNG", transparency=b"\x00\x80")
    return file.getvalue()


@pytest.fixture
def odd_list(tmp_path):
    """A list of ten pictures, of which the fourth and the eighth have damaged notes."""
    path = write_list(tmp_path, 10, {5: "missing"})
    for number in (3, 7):
        (tmp_path / f"{number}.jpg").write_bytes(picture(number, exif=CUT))
    return path


@pytest.mark.parametrize("filters", ["default", "error", "ignore"])
def test_every_picture_is_counted_in_every_thread(capsys, filters):
    data, found = picture(1, exif=CUT), []

    def read():
        for _ in range(3):
            with caught() as kinds:
                load(data)
            found.append(kinds)

    with warnings.catch_warnings():
        warnings.simplefilter(filters)
        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        load(data)  # where nobody collects
    assert found == [{NOTES}] * 9
    assert capsys.readouterr().err == ""


def test_other_warnings_are_shown_as_before(capsys):
    with caught() as kinds:
        load(picture(1))
    with pytest.warns(UserWarning, match="of another"):
        warnings.warn("of another", UserWarning, stacklevel=1)
    # Pillow's, to those who use it themselves.
    with pytest.warns(UserWarning, match="EXIF"):
        Image.open(io.BytesIO(picture(1, exif=CUT))).getexif()
    assert kinds == set()


def test_the_kinds():
    with caught() as kinds:
        load(palette(), parity=True).convert("RGB")
    assert kinds == {PALETTE}
    for text, kind in {
        "Corrupt EXIF data.  Expecting to read 12 bytes but only got 4. ": NOTES,
        "Possibly corrupt EXIF data.  Expecting to read 1 bytes": NOTES,
        "Truncated File Read": NOTES,
        "Metadata Warning, tag 296 had too many entries: 2, expected 1": NOTES,
        "Image appears to be a malformed MPO file, it will be interpreted as a base JPEG": SERIES,
        "Invalid APNG, will use default PNG image if possible": SERIES,
        "Image size exceeds limit of 10, could be decompression bomb DOS attack.": PIXELS,
        "another": ODD,
    }.items():
        assert kind_of(text) == kind
        assert kind in KINDS


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_in_training_they_are_counted_once_a_picture(odd_list, workers, capfd):
    source = open_source(odd_list)
    log = UnreadableLog(source)
    with open_batches(source, kind="train", episodes=[0, 1], workers=workers, unreadable=log) as it:
        list(it)
    assert {kind: sorted(rows) for kind, rows in log.odd.items()} == {NOTES: [3, 7]}
    assert log.counts == {"missing file": 1}
    assert log.first_odd(NOTES).endswith((("3.jpg"), "7.jpg"))
    assert "EXIF" not in capfd.readouterr().err


def test_in_prepare(odd_list, tmp_path, capfd):
    source = open_source(odd_list)
    numbers = measure(source, progress=False)
    assert numbers["odd"] == {NOTES: 2}
    assert "used all the same" in describe(numbers)
    convert(source, tmp_path / "out", ConvertSettings(shard_rows=4), progress=False)
    shown = capfd.readouterr()
    assert f"2 pictures have {NOTES}, and are used all the same; the first is" in shown.out
    assert "3.jpg" in shown.out
    assert shown.err == ""


def test_counts_are_one_over_all_processes(odd_list, tmp_path):
    source = open_source(odd_list)
    path = tmp_path / "unreadable.tsv"
    logs = [UnreadableLog(source, path), UnreadableLog(source, tmp_path / "unreadable.1.tsv")]
    for log in logs:  # both meet the same ones
        with open_batches(source, kind="extract", episodes=[0], unreadable=log) as batches:
            list(batches)
    for _ in range(2):
        taken = [log.take_new() for log in logs]
        for log in logs:
            for one in taken:
                log.include(one)
    for log in logs:
        assert (len(log), log.counts) == (1, {"missing file": 1})
        assert {kind: sorted(rows) for kind, rows in log.odd.items()} == {NOTES: [3, 7]}
    # A run that goes on knows them, also those of a process that is no more.
    later = UnreadableLog(source, tmp_path / "unreadable.2.tsv", [path])
    assert len(later) == 1
    other = UnreadableLog(source)
    other.include(later.take_new())
    assert other.counts == {"missing file": 1}
