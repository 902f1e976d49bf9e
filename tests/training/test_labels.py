"""A label is one pair's own: where training reads another pair, it has none."""

import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import (
    final_state,
    metrics,
    small_config,
    tiny_models,  # noqa: F401 (a fixture)
    untimed,
    write_pairs,
)

from protoclip_jax.data.decoding import NO_ACCESS, UnreadableImage
from protoclip_jax.data.reader import BatchReader
from protoclip_jax.episodes.sampling import episode_rows
from protoclip_jax.training import loop, requests
from protoclip_jax.training.checkpoint import Checkpoints
from protoclip_jax.training.labels import EpisodeLabels

pytestmark = [pytest.mark.usefixtures("tiny_models")]

TEACHERS = ("image", "text", "external")
PAIRS, SIZE = 40, 24
FAILING = 2, 11, 17  # positions of an episode, one in each batch


def made(extracted: int = 6, size: int = 8) -> EpisodeLabels:
    labels = {
        name: np.arange(extracted, dtype=np.int32) + 10 * number
        for number, name in enumerate(TEACHERS)
    }
    return EpisodeLabels(labels, 100 + np.arange(extracted), size)


def test_labels_of_the_pairs_that_were_extracted():
    labels = made().of(np.array([3, 0, 7]), np.array([103, 100, 55]))
    assert {name: found.tolist() for name, found in labels.items()} == {
        "image": [3, 0, -1],
        "text": [13, 10, -1],
        "external": [23, 20, -1],
    }
    assert all(found.dtype == np.int32 for found in labels.values())


def test_another_pair_has_no_label_of_any_teacher():
    episode = made()
    labels = episode.of(np.array([3, 4, 5, 6]), np.array([103, 103, 5, 9]))
    for name, number in zip(TEACHERS, (0, 10, 20), strict=True):
        assert labels[name].tolist() == [3 + number, -1, -1, -1]
    assert episode.other == 2, "a position that was not extracted has no label to lose"
    episode.of(np.array([0, 1]), np.array([101, 100]))
    assert episode.other == 4
    assert episode.of(np.array([0]), np.array([100]))["image"].tolist() == [0]


def test_each_process_compares_its_own_part():
    """Rows of the episode are those of all processes, rows of a batch this one's."""
    parts = [np.arange(start, 8, 2) for start in (0, 1)]
    rows = np.array([100, 1, 102, 103, 104, 105, 7, 8])
    whole, found = made(), np.zeros(8, int)
    whole_labels = whole.of(np.arange(8), rows)
    others = 0
    for part in parts:
        episode = made()
        found[part] = episode.of(part, rows[part])["text"]
        others += episode.other
    np.testing.assert_array_equal(found, whole_labels["text"])
    assert others == whole.other == 1


def test_what_a_checkpoint_keeps_comes_back(tmp_path):
    big = 2**33 + 5  # rows of a data set beyond 32 bits
    episode = EpisodeLabels({"image": np.array([4, 5], np.int32)}, np.array([big, 7]), 3)
    arrays = jax.tree.map(jax.numpy.asarray, episode.arrays())
    restored = EpisodeLabels.restored(arrays)
    assert restored.checked
    for labels in (episode, restored):
        found = labels.of(np.arange(3), np.array([big, 8, 9]))["image"]
        assert found.tolist() == [4, -1, -1]
        assert labels.other == 1


def test_a_checkpoint_without_rows_gives_its_labels():
    old = {"labels": made().arrays()["labels"]}
    restored = EpisodeLabels.restored(old)
    assert not restored.checked
    assert restored.of(np.array([2, 7]), np.array([1, 1]))["text"].tolist() == [12, -1]
    assert restored.other == 0
    assert EpisodeLabels.restored(restored.arrays()).checked is False


class Flaky:
    """A source of which some rows cannot be read in one of the two passes."""

    def __init__(self, source, rows: set[int], kind: str, now: threading.local):
        self.source, self.rows, self.kind, self.now = source, rows, kind, now
        self.name, self.fingerprint = source.name, source.fingerprint

    def __len__(self):
        return len(self.source)

    def read(self, row):
        if row in self.rows and self.now.kind == self.kind:
            raise UnreadableImage(NO_ACCESS, "Input/output error")
        return self.source.read(row)


class Runs:
    """Tiny runs of one episode with reads that fail in a pass."""

    def __init__(self, folder: Path, monkeypatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        write_pairs(folder / "data", PAIRS)
        rows = np.random.default_rng(1).normal(size=(PAIRS, 5)).astype(np.float32)
        np.save(folder / "teacher.npy", rows)
        self.now, make = threading.local(), BatchReader._made

        def noted(reader, kind, *arguments):
            self.now.kind = kind
            return make(reader, kind, *arguments)

        monkeypatch.setattr(BatchReader, "_made", noted)
        self.rows = episode_rows(PAIRS, SIZE, 0, 0, False)

    def config(self, **overrides):
        settings = {
            "episode__count": 1,
            "episode__warmup": 0,
            "data__keep": "none",
            "data__teacher": self.folder / "teacher.npy",
            "objective__external": 1,
            "log__every": 1,
            "seed": 0,
        }
        pairs = self.folder / "data" / "pairs.tsv"
        return small_config(pairs, num_devices=8, **(settings | overrides))

    def train(self, name: str, kind: str = "train", stop: int | None = None, **overrides) -> dict:
        """Trains in a workdir; returns rows and labels by position, as training met them."""
        trainer = loop.Trainer(self.config(**overrides), self.folder / name)
        failing = {int(self.rows[position]) for position in FAILING}
        trainer.input.source = Flaky(trainer.input.source, failing, kind, self.now)
        inputs, met = trainer.train_inputs, {}

        def noted(batch, labels):
            found = inputs(batch, labels)
            for at, position in enumerate(batch["position"].tolist()):
                own = {teacher: int(found["labels"][teacher][at]) for teacher in TEACHERS}
                met[position] = int(batch["row"][at]), own
            return found

        trainer.train_inputs = noted
        asked = trainer.requests.after_step
        trainer.requests.after_step = lambda: (
            requests.LEAVE if stop is not None and trainer.done == stop else asked()
        )
        try:
            trainer.run()
        finally:
            trainer.close()
        return met

    def log(self, name: str) -> list[dict]:
        return [untimed(line) for line in metrics(self.folder / name)]


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Runs:
    return Runs(tmp_path, monkeypatch)


def test_a_pair_that_takes_anothers_place_trains_without_its_label(runs, capsys):
    met = runs.train("run")
    assert sorted(met) == list(range(SIZE))
    for position, (row, labels) in met.items():
        if position in FAILING:
            assert row != runs.rows[position]
            assert set(labels.values()) == {-1}
        else:
            assert row == runs.rows[position]
            assert min(labels.values()) >= 0
    assert runs.log("run")[-1]["labels/other_pair"] == 3
    told = capsys.readouterr().err
    assert "3 pairs trained without a prototype" in told
    lines = (runs.folder / "run" / "unreadable.tsv").read_text().splitlines()
    assert sorted(int(line.split("\t")[0]) for line in lines) == sorted(
        int(runs.rows[position]) for position in FAILING
    )
    assert {line.split("\t")[2] for line in lines} == {NO_ACCESS}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["train", "extract"])
def test_it_trains_as_if_its_label_were_masked_by_hand(runs, kind, monkeypatch):
    met = runs.train("run", kind)

    def by_hand(labels, positions, rows):
        taken = np.isin(positions, FAILING)
        return {name: np.where(taken, -1, x[positions]) for name, x in labels._labels.items()}

    def unmasked(labels, positions, rows):
        return {name: x[positions] for name, x in labels._labels.items()}

    with monkeypatch.context() as patched:
        patched.setattr(EpisodeLabels, "of", by_hand)
        assert runs.train("masked", kind) == met
        patched.setattr(EpisodeLabels, "of", unmasked)
        shared = runs.train("shared", kind)
    for position, (row, labels) in shared.items():
        if position in FAILING:
            assert min(labels.values()) >= 0
        else:
            assert (row, labels) == met[position]
    logs = {name: runs.log(name) for name in ("run", "masked", "shared")}
    assert [log[-1].pop("labels/other_pair") for log in logs.values()] == [3, 0, 0]
    assert logs["run"] == logs["masked"]
    assert logs["run"] != logs["shared"]
    config = runs.config()
    states = [final_state(config, runs.folder / name) for name in ("run", "masked")]
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.slow
def test_a_run_stopped_inside_such_an_episode(runs):
    """Its checkpoint knows which pairs the labels belong to."""
    whole = runs.train("whole")
    with pytest.raises(requests.Leaving):
        runs.train("broken", stop=1)
    rest = runs.train("broken")
    assert sorted(rest) == list(range(8, SIZE))
    assert rest == {position: whole[position] for position in rest}
    config = runs.config()
    states = [final_state(config, runs.folder / name) for name in ("whole", "broken")]
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert runs.log("broken")[-1]["labels/other_pair"] == 2  # since the start


@pytest.mark.slow
def test_a_checkpoint_of_an_earlier_version_goes_on(runs, monkeypatch, capsys):
    def without_rows(labels):
        return {"labels": labels._labels}

    with monkeypatch.context() as patched:
        patched.setattr(EpisodeLabels, "arrays", without_rows)
        with pytest.raises(requests.Leaving):
            runs.train("run", stop=1)
    capsys.readouterr()
    rest = runs.train("run")
    assert min(label for _, labels in rest.values() for label in labels.values()) >= 0
    assert "checkpoints/1 is of an earlier version" in capsys.readouterr().err
    assert Checkpoints(runs.folder / "run").latest() == 3


@pytest.mark.slow
def test_online_only_the_agreement_counts_them_out(runs, capsys):
    runs.train("run", episode__online=1.0)
    known = [line["train/online/known"] for line in runs.log("run") if "train/loss/total" in line]
    assert known == [7 / 8] * 3
    assert "without a prototype" not in capsys.readouterr().err
