"""Batches: the same function of (seed, episode, position) however they are made."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from pair_files import Unlooked
from PIL import Image
from small_batches import SIZE, Shuffled, open_batches

from protoclip_jax.data.augmentation import AUGMENTATIONS, training_crop
from protoclip_jax.data.decoding import (
    MISSING,
    NO_CAPTION,
    NOT_A_FILE,
    NOT_AN_IMAGE,
    TOO_MANY_PIXELS,
    TRUNCATED,
    evaluation_crop,
    load,
)
from protoclip_jax.data.kept import Keep, KeptPairs, Pair, opened
from protoclip_jax.data.seen_files import SourceError
from protoclip_jax.data.sources import open_source
from protoclip_jax.data.start_check import check_start
from protoclip_jax.data.tokenizer import Tokenizer
from protoclip_jax.data.unreadable import UnreadableLog
from protoclip_jax.data.walk import PASSES, Section, Walk

CASES = Path(__file__).parents[1] / "cases"
KEYS = ("image", "tokens", "position", "valid", "row")


def case_source(case: str):
    return open_source(str(CASES / case / "pairs.tsv"))


def run(source, **options) -> list[dict]:
    """All batches of `open_batches`."""
    with open_batches(source, **options) as iterator:
        return list(iterator)


def assert_equal_batches(actual: list[dict], expected: list[dict]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one["episode"] == other["episode"]
        for key in KEYS:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)


@pytest.mark.parametrize("kind", ["train", "extract"])
@pytest.mark.parametrize("name", ["none", "clip", "light"])
def test_batches_equal_a_plain_loop(kind, name):
    source = case_source("DIST-01")
    rows_of_episode, tokenizer = Shuffled(13, 13), Tokenizer(16)
    number = 0
    actual = run(source, kind=kind, augmentation=name, episodes=[3, 5])
    for episode in (3, 5):
        rows = rows_of_episode(episode)
        for first in range(0, 12 if kind == "train" else 13, 4):
            batch = actual[number]
            number += 1
            assert batch["episode"] == episode
            assert batch["position"].tolist() == list(range(first, first + 4))
            assert batch["valid"].tolist() == [p < 13 for p in batch["position"]]
            for at in np.flatnonzero(batch["valid"]):
                position = first + int(at)
                data, caption = source.read(int(rows[position]))
                assert batch["row"][at] == rows[position]
                np.testing.assert_array_equal(batch["tokens"][at], tokenizer(caption)[0])
                how = AUGMENTATIONS[name]
                if how is None:
                    expected = evaluation_crop(load(data), SIZE, exact=False)
                else:
                    rng = np.random.default_rng([7, episode, PASSES[kind], position])
                    expected = training_crop(load(data), rng, SIZE, how.scale, how.ratio, how.flip)
                np.testing.assert_array_equal(batch["image"][at], expected)
    assert number == len(actual)


def test_shapes_and_types():
    batch = run(case_source("DIST-01"), share=(1, 2))[0]
    assert set(batch) == {*KEYS, "episode", "kind"}
    assert (batch["image"].shape, batch["image"].dtype) == ((2, SIZE, SIZE, 3), np.uint8)
    assert (batch["tokens"].shape, batch["tokens"].dtype) == ((2, 16), np.int32)
    for key, kind in (("position", np.int64), ("row", np.int64), ("valid", bool)):
        assert (batch[key].shape, batch[key].dtype) == ((2,), kind)
    assert type(batch["episode"]) is int


@pytest.mark.parametrize("kind", ["train", "extract"])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_read_the_global_batch(kind, processes):
    source = case_source("IMG-01")  # with two rows to be replaced
    options = {"kind": kind, "augmentation": "light"}
    whole = run(source, **options)
    parts = [run(source, share=(index, processes), **options) for index in range(processes)]
    joined = []
    for pieces in zip(*parts, strict=True):
        order = np.argsort(np.concatenate([piece["position"] for piece in pieces]))
        joined.append(
            {key: np.concatenate([piece[key] for piece in pieces])[order] for key in KEYS}
        )
        joined[-1]["episode"] = pieces[0]["episode"]
    assert_equal_batches(joined, whole)


@pytest.mark.parametrize("kind", ["train", "extract"])
def test_a_pass_can_begin_anywhere(kind):
    source = case_source("IMG-01")
    whole = run(source, kind=kind, augmentation="light", episodes=[4, 2, 9])
    steps = len(whole) // 3
    for episode in range(3):
        for step in range(steps):
            rest = run(
                source,
                kind=kind,
                augmentation="light",
                episodes=[4, 2, 9],
                start=(episode, step),
            )
            assert_equal_batches(rest, whole[episode * steps + step :])
    assert run(source, kind=kind, episodes=[4, 2, 9], start=(3, 0)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_and_threads_change_nothing(workers):
    source = case_source("IMG-01")
    options = {"kind": "extract", "augmentation": "light", "start": (0, 1)}
    log, same = UnreadableLog(source), UnreadableLog(source)
    expected = run(source, threads=1, unreadable=log, **options)
    assert_equal_batches(run(source, threads=5, **options), expected)
    made = run(source, workers=workers, unreadable=same, **options)
    assert_equal_batches(made, expected)
    assert same.counts == log.counts
    # Arrays of their own, not in grain's shared memory.
    assert all(type(batch[key]) is np.ndarray for batch in made for key in KEYS)


def test_unequal_rows_give_equal_steps():
    """13 rows, 2 processes, batch 4: three steps each; position 12 is extracted, not trained."""
    facts = json.loads((CASES / "DIST-01" / "case.json").read_text())
    source = case_source("DIST-01")
    count, batch = facts["run_with"]["processes"], facts["run_with"]["global_batch"]
    assert len(source) == facts["n_rows"]
    seen = {}
    for kind in ("train", "extract"):
        each = [
            run(
                source,
                kind=kind,
                batch=batch,
                episodes=[0],
                share=(index, count),
            )
            for index in range(count)
        ]
        assert len({len(steps) for steps in each}) == 1
        seen[kind] = [
            int(position)
            for steps in each
            for step in steps
            for position in step["position"][step["valid"]]
        ]
    assert sorted(seen["train"]) == list(range(12))
    assert sorted(seen["extract"]) == list(range(13))


@pytest.mark.parametrize("processes", [1, 4])
def test_extraction_covers_every_position_once(processes):
    """DIST-03; any number of workers gives the same batches, as another test shows."""
    source = case_source("DIST-01")
    seen, steps = [], set()
    for index in range(processes):
        parts = run(
            source,
            kind="extract",
            size=34,
            batch=16,
            episodes=[0],
            share=(index, processes),
        )
        steps.add(len(parts))
        for part in parts:
            seen += part["position"][part["valid"]].tolist()
            assert np.all(part["row"][~part["valid"]] == -1)
            assert np.all(part["image"][~part["valid"]] == 0)
    assert steps == {3}
    assert sorted(seen) == list(range(34))


def test_random_numbers_depend_on_each_ingredient():
    source = case_source("DIST-01")

    def first(**options):
        options = {"episodes": [0], "augmentation": "light", "kind": "train"} | options
        same_rows = {"rows_of_episode": lambda episode: np.zeros(13, int)}
        return run(source, **options, **same_rows)[0]["image"]

    base = first()
    np.testing.assert_array_equal(first(), base)
    assert np.any(base[0] != base[1])  # position
    assert np.any(first(seed=8) != base)
    assert np.any(first(episodes=[1]) != base)
    assert np.any(first(kind="extract") != base)


# Pairs that cannot be read.

BAD = {
    "IMG-01": [TRUNCATED, TRUNCATED],
    "IMG-03": [NOT_AN_IMAGE, NOT_AN_IMAGE],
    "IMG-17": [TOO_MANY_PIXELS],
    "TSV-13": [MISSING, NOT_A_FILE],
}


@pytest.mark.parametrize("case", BAD)
def test_unreadable_pairs_are_replaced_counted_and_listed_once(case, tmp_path):
    source = case_source(case)
    path = tmp_path / "unreadable.tsv"
    log = UnreadableLog(source, path)
    tokenizer = Tokenizer(16)
    for kind in ("extract", "train"):
        for batch in run(source, kind=kind, episodes=[0, 1, 2], batch=3, unreadable=log):
            for at in np.flatnonzero(batch["valid"]):
                data, caption = source.read(int(batch["row"][at]))  # a whole, readable pair
                expected = evaluation_crop(load(data), SIZE, exact=False)
                np.testing.assert_array_equal(batch["image"][at], expected)
                np.testing.assert_array_equal(batch["tokens"][at], tokenizer(caption)[0])
    listed = [line.split("\t") for line in path.read_text().splitlines()]
    rows = [int(row) for row, _, _ in listed]
    assert len(rows) == len(set(rows)) == len(BAD[case]) == len(log)
    assert {int(row): reason for row, _, reason in listed} == dict(
        zip(sorted(rows), BAD[case], strict=True)
    )
    assert all(name == source.where(int(row)) for row, name, _ in listed)
    assert sum(log.counts.values()) == len(BAD[case])


def test_both_passes_use_the_same_substitutes():
    source = case_source("IMG-01")
    trained, extracted = (
        np.concatenate([batch["row"] for batch in run(source, kind=kind, size=40)])
        for kind in ("train", "extract")
    )
    np.testing.assert_array_equal(trained, extracted)
    drawn = np.concatenate([Shuffled(len(source), 40)(episode) for episode in (0, 1)])
    bad = np.isin(drawn, [4, 5])
    np.testing.assert_array_equal(trained[~bad], drawn[~bad])
    assert len(set(trained[bad].tolist())) > 3  # not always the same one
    assert not np.isin(trained, [4, 5]).any()


def test_a_log_goes_on_after_a_restart(tmp_path, caplog):
    source, path = case_source("IMG-01"), tmp_path / "unreadable.tsv"
    run(source, unreadable=UnreadableLog(source, path), episodes=[0], kind="extract")
    listed = path.read_text()
    assert "skipped an unreadable pair: row" in caplog.text
    again = UnreadableLog(source, path)
    assert again.counts == {TRUNCATED: 2}
    run(source, unreadable=again, episodes=[1], kind="extract")
    assert path.read_text() == listed
    path.write_text(listed + "7\tcut li")  # a line that a kill cut short
    assert len(UnreadableLog(source, path)) >= 2


def missing_list(folder: Path, good: int, bad: int) -> str:
    path = folder / "list.tsv"
    good_rows = [f"{CASES}/DIST-01/images/ok{i:02d}.jpg\tgood" for i in range(good)]
    bad_rows = [f"gone{i}.jpg\tbad" for i in range(bad)]
    path.write_text("\n".join(["filepath\ttitle", *bad_rows, *good_rows]))
    return str(path)


def test_a_run_without_any_readable_pair_ends_with_an_example(tmp_path):
    source = open_source(missing_list(tmp_path, 0, 3))
    with pytest.raises(SourceError, match=r"32 pairs in a row .*gone\d\.jpg \(missing file\)"):
        run(source, size=4)


def test_errors_of_a_worker_reach_the_run(tmp_path):
    source = open_source(missing_list(tmp_path, 0, 3))
    with pytest.raises(SourceError, match=r"32 pairs in a row .*gone\d\.jpg \(missing file\)"):
        run(source, size=4, workers=1)


def test_check_start_shows_the_first_path_when_all_are_missing(tmp_path):
    source = open_source(missing_list(tmp_path, 0, 100))
    with pytest.raises(ValueError, match="none of the 64 pictures") as error:
        check_start(source, limit=1.0)
    assert str(tmp_path / "gone0.jpg") in str(error.value)
    assert "image_root" in str(error.value)
    assert "\n" not in str(error.value)


def test_check_start_stops_above_the_limit(tmp_path):
    source = open_source(missing_list(tmp_path, 10, 30))
    assert check_start(source, limit=0.75) == 0.75
    with pytest.raises(ValueError, match=r"30 of 40 .* of 0.5 .*gone0.jpg \(missing file\)"):
        check_start(source)
    assert check_start(case_source("DIST-01")) == 0
    assert check_start(case_source("IMG-01")) == 0.2


def test_check_start_stops_when_nothing_can_be_read(tmp_path):
    (tmp_path / "a.jpg").write_text("no picture")
    path = tmp_path / "list.tsv"
    path.write_text("filepath\ttitle\na.jpg\tone\nb.jpg\ttwo\n")
    with pytest.raises(ValueError, match="2 of 2 pictures tried cannot be read"):
        check_start(open_source(str(path)), limit=1.0)


# Settings and ends.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "test"}, "kind 'test' is unknown: use one of train, extract"),
        ({"augmentation": "heavy"}, "'heavy' is unknown"),
    ],
)
def test_settings_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        run(case_source("DIST-01"), **options)


def test_closing_early():
    source = case_source("DIST-01")
    iterator = open_batches(source, episodes=range(100))
    assert len(iterator) == 300
    next(iterator)
    assert len(iterator) == 299
    iterator.close()
    iterator.close()
    with pytest.raises(StopIteration):
        next(iterator)


def test_rows_are_drawn_once_an_episode():
    calls = []

    def rows_of_episode(episode):
        calls.append(episode)
        return np.arange(13)

    run(case_source("DIST-01"), rows_of_episode=rows_of_episode, episodes=[0, 1, 2], threads=4)
    assert calls == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["exit", "raise"])
def test_leaving_with_live_workers_is_quiet(tmp_path, way):
    script = tmp_path / "leaves.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        import numpy as np
        from protoclip_jax.data.kept import Keep
        from protoclip_jax.data.pipeline import Batches
        from protoclip_jax.data.reader import Reading
        from protoclip_jax.data.sources import open_source
        from protoclip_jax.data.tokenizer import Tokenizer
        from protoclip_jax.data.walk import Section, Walk

        if __name__ == "__main__":
            source = open_source({str(CASES / "DIST-01" / "pairs.tsv")!r})
            sections = [Section("train", episode, 12) for episode in range(1000)]
            reading = Reading(
                source, Tokenizer(16), lambda episode: np.arange(13), 13, 0, 32, {{"train": None}},
                False, Keep(),
            )
            iterator = Batches(Walk(sections, 4, workers=2), reading, workers=2)
            kept = [next(iterator) for _ in range(3)]
            {"sys.exit(0)" if way == "exit" else "raise ValueError('stop')"}
        """)
    )
    # The script lies elsewhere, and the package need not be installed.
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=120, env=env
    )
    lines = result.stderr.strip().splitlines()
    assert "Exception ignored" not in result.stderr
    assert lines == [] if way == "exit" else lines[-1] == "ValueError: stop"


# Pictures kept between the passes.


def both_passes(episodes, size: int, batch: int = 4, extracted: int | None = None) -> list[Section]:
    """As a run walks: an episode of training alone, then extraction before each training."""
    trained = size // batch * batch
    sections = [Section("train", episodes[0], trained)]
    for episode in episodes[1:]:
        sections.append(Section("extract", episode, size if extracted is None else extracted))
        sections.append(Section("train", episode, trained))
    return sections


class Counted:
    """A source that counts its reads."""

    def __init__(self, source):
        self._source, self.reads = source, []
        self.name, self.fingerprint = source.name, source.fingerprint

    def __len__(self):
        return len(self._source)

    def read(self, row):
        self.reads.append(row)
        return self._source.read(row)


@pytest.mark.parametrize("form", ["pixels", "jpeg"])
@pytest.mark.parametrize("extracted", [61, 21])
def test_a_picture_is_read_once_an_episode(form, extracted):
    source = Counted(case_source("DIST-01"))
    sections = both_passes([0, 1, 2], 61, extracted=extracted)
    run(source, sections=sections, size=61, keep=Keep(form, 256, 10**9))
    # Position 60 is in no batch of training. Two batches are in work at a time, so that at the
    # border of two passes a picture of the second may be read before the first has kept it.
    once = 60 + 2 * max(60, extracted)
    assert once <= len(source.reads) <= once + 4
    twice = Counted(source)
    run(twice, sections=sections, size=61)
    assert len(twice.reads) == 60 + 2 * (60 + extracted)


# Workers take seconds to start: in the fast suite they meet the room that is too small.
@pytest.mark.parametrize("form", ["pixels", "jpeg"])
@pytest.mark.parametrize(
    ("budget", "workers"),
    [(0, 0), (40_000, 0), (10**9, 0), (40_000, 2)]
    + [pytest.param(*both, marks=pytest.mark.slow) for both in ((0, 2), (10**9, 2), (40_000, 3))],
)
def test_room_and_workers_change_no_batch(form, budget, workers):
    source = case_source("IMG-01")  # with two rows to be replaced
    options = {
        "sections": both_passes([3, 0, 1], len(source)),
        "augmentation": "light",
        "threads": 1,
    }
    expected = run(source, keep=Keep(form, 20, 0), **options)
    actual = run(source, keep=Keep(form, 20, budget), workers=workers, **options)
    assert_equal_batches(actual, expected)


def test_kept_pixels_of_small_pictures_change_nothing():
    source = case_source("DIST-01")
    options = {"sections": both_passes([0, 1], 13), "augmentation": "light"}
    assert_equal_batches(
        run(source, keep=Keep("pixels", 4096, 10**9), **options), run(source, **options)
    )


def test_pictures_without_room_are_counted():
    source = case_source("DIST-01")
    sections = both_passes([0, 1], 13)
    for budget, expected in ((10**9, 0), (0, 13)):
        with open_batches(source, sections=sections, keep=Keep("pixels", 256, budget)) as iterator:
            list(iterator)
            assert iterator.roomless == expected


def test_decoding_ahead_leaves_extraction_nothing_to_decode():
    source = Counted(case_source("DIST-01"))
    sections = both_passes([0, 1], 13)
    # One thread and no prefetching beyond two batches: after training's last batch was fetched and
    # the first of extraction, every picture of the next episode has been read.
    with open_batches(
        source, sections=sections, keep=Keep("pixels", 256, 10**9), threads=1
    ) as iterator:
        for _ in range(3):
            next(iterator)
        seen = len(source.reads)
        list(iterator)
    assert seen == len(source.reads) == 12 + 13


def test_a_run_can_go_on_in_the_middle_of_an_episode():
    source = case_source("IMG-01")
    size = len(source)
    keep = Keep("jpeg", 20, 10**9)
    whole = run(source, sections=both_passes([0, 1, 2], size), keep=keep, augmentation="light")
    trained = size // 4 * 4
    rest = [Section("train", 1, trained, 1), *both_passes([1, 2], size)[1:]]
    for workers in (0, 2):
        actual = run(source, sections=rest, keep=keep, augmentation="light", workers=workers)
        assert_equal_batches(actual, whole[-len(actual) :])


def test_steps_of_both_passes_reach_the_same_worker():
    sections = both_passes([0, 1, 2], 37, extracted=21)
    for workers in (1, 2, 3, 5):
        walk = Walk(sections, 4, workers=workers)
        places = [walk.locate(number) for number in range(len(walk))]
        assert walk.batches == sum(place is not None for place in places)
        prepared = []
        for number, place in enumerate(places):
            if place is None:
                continue
            section, step = place
            assert number % workers == step % workers
            upcoming = walk.ahead(number) if section.kind == "train" else None
            if upcoming:
                assert all(ahead % workers == step % workers for ahead in upcoming[1])
                prepared += [(upcoming[0].episode, ahead) for ahead in upcoming[1]]
        # Every batch of extraction is prepared, once.
        assert sorted(prepared) == [(episode, step) for episode in (1, 2) for step in range(6)]


def test_kept_pairs_stay_within_the_budget():
    kept = KeptPairs(Keep("pixels", 8, 2000))
    image = Image.new("RGB", (30, 16))
    picture = kept.form(image)
    assert picture.size == (15, 8)
    pair = Pair(picture, "a", 0)
    held = [kept.put(0, position, pair) for position in range(4)]
    assert held == [True, True, False, False]  # 360 bytes of pixels and 400 around them
    assert kept.bytes <= 2000
    assert kept.take(0, 0) is pair
    assert kept.take(0, 0) is None
    assert kept.put(1, 3, pair)
    kept.forget_before(1)
    assert kept.get(0, 1) is None
    assert kept.get(1, 3) is pair


def test_jpeg_keeps_grey_and_cmyk():
    kept = KeptPairs(Keep("jpeg", 8, 2000))
    for mode in ("L", "CMYK", "RGB"):
        assert opened(kept.form(Image.new(mode, (20, 30)))).mode == mode


def test_pairs_without_a_caption_are_replaced_and_counted():
    captions = [f"number {row}" for row in range(16)]
    captions[3], captions[7] = "&nbsp;", "\u200b"
    with open_batches(Unlooked(captions), episodes=[0]) as iterator:
        batches = list(iterator)
    assert iterator.unreadable.counts == {NO_CAPTION: 2}
    used = np.concatenate([batch["row"] for batch in batches])
    assert set(used) == set(range(16)) - {3, 7}
    tokens = np.concatenate([batch["tokens"] for batch in batches])
    np.testing.assert_array_equal(tokens, Tokenizer(16)([captions[row] for row in used]))
