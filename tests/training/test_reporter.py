"""What a stranger reads in the log when something is wrong."""

import functools
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import small_config

from protoclip_jax.data.image_warnings import NOTES
from protoclip_jax.data.pair_list import PairList
from protoclip_jax.data.sources import open_source
from protoclip_jax.data.teacher import open_teacher
from protoclip_jax.data.unreadable import UnreadableLog, odd_code
from protoclip_jax.episodes.kmeans import Clusters
from protoclip_jax.training import reporter as module
from protoclip_jax.training.logging import Meter, MetricLog
from protoclip_jax.training.phases import phase_of
from protoclip_jax.training.progress import Progress
from protoclip_jax.training.reporter import STUCK_STEPS, Reporter, cluster_numbers
from protoclip_jax.training.stopwatch import Stopwatch

CASES = Path(__file__).parents[1] / "cases"
GOOD = {
    "loss/total": 1.0,
    "loss/clip": 1.0,
    "geometry/image_std": 0.09,
    "geometry/text_std": 0.09,
    "grad_norm": 1.0,
    "skipped": 0.0,
}


class Told(Progress, MetricLog):
    """Stands for the bar and for the log."""

    def __init__(self):
        self.lines, self.written, self.shown = [], [], {}

    def say(self, text):
        self.lines.append(text)

    def show(self, values):
        self.shown = values

    def write(self, step, episode, phase, values):
        self.written.append((step, values))


@pytest.fixture
def told():
    return Told()


on_device = functools.cache(jnp.float32)  # thousands of arrays of few values


def report(told, rows: list[dict], **settings) -> Told:
    config = small_config("pairs.tsv", **({"optimizer__batch": 16} | settings))
    reporter, recent = Reporter(config, 100, told, told), Meter()
    for row in rows:
        recent.add({name: on_device(value) for name, value in row.items()})
    reporter.steps(len(rows), 0, phase_of(config, 0), recent, Meter(), flops=1e9)
    return told


def warnings(told) -> list[str]:
    return [line for line in told.lines if "warning" in line]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"loss/clip": math.log(16) * 0.995}, "within 1 % of ln"),
        ({"geometry/image_std": 0.0049}, "image features have collapsed"),
        ({"geometry/text_std": 0.0049}, "text features have collapsed"),
    ],
)
def test_model_that_does_not_learn_is_told_once_after_a_stated_time(told, row, words):
    """NUM-07."""
    stuck = [GOOD | row] * (STUCK_STEPS - 1)
    assert warnings(report(told, stuck)) == []
    (line,) = warnings(report(Told(), stuck + stuck))
    assert words in line
    assert f"at step {STUCK_STEPS}" in line
    assert warnings(report(Told(), [*stuck, GOOD, *stuck])) == []  # in a row


def test_skipped_steps_are_named_counted_and_left_out_of_the_means(told):
    bad = GOOD | {"loss/total": math.nan, "loss/clip": math.nan, "skipped": 1.0}
    report(told, [GOOD, bad, GOOD | {"loss/total": 3.0}])
    assert told.lines == [
        "  step 2: not finite: loss/clip, loss/total; the update was skipped (1 so far)"
    ]
    (step, values) = told.written[0]
    assert step == 3
    assert values["train/loss/total"] == 2
    assert values["train/skipped"] == pytest.approx(1 / 3)


def test_too_many_skipped_in_a_row_stop_the_run(told):
    bad = GOOD | {"grad_norm": math.inf, "skipped": 1.0}
    report(told, [bad, bad, GOOD, bad, bad], optimizer__max_skipped=3)
    with pytest.raises(
        FloatingPointError, match=r"3 steps in a row, the last is step 4: grad_norm"
    ):
        report(told, [GOOD, bad, bad, bad], optimizer__max_skipped=3)


def test_few_used_prototypes_and_missing_room_are_told_once(told):
    config = small_config("pairs.tsv")
    reporter = Reporter(config, 100, told, told)
    numbers = {"clusters/image_used": 2.0, "clusters/text_used": 6.0}
    for _ in range(2):
        reporter.prototypes(numbers, roomless=24)
    assert len(told.lines) == 2
    assert "no room for 24 of an episode's 24 pictures" in told.lines[0]
    assert "only 33% of the image prototypes have members" in told.lines[1]


@pytest.mark.parametrize("name", ["image", "text", "external"])
@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"used": 1.0}, "1 of 6 {} prototypes has members"),
        ({"used": 0.0}, "0 of 6 {} prototypes has members"),
        ({"used": 2.0}, "only 33% of the {} prototypes have members"),
        ({"nonfinite_rows": 5.0}, "5 of 24 {} features are not finite"),
    ],
)
def test_clusters_that_say_nothing_are_told_once(told, name, own, words):
    numbers = {}
    for kind in ("image", "text", "external"):
        found = {"used": 6.0, "nonfinite_rows": 0.0} | (own if kind == name else {})
        numbers |= {f"clusters/{kind}_{what}": value for what, value in found.items()}
    reporter = Reporter(small_config("pairs.tsv"), 100, told, told)
    for _ in range(2):
        reporter.prototypes(numbers, roomless=0)
    (line,) = told.lines
    assert words.format(name) in line


def test_a_single_prototype_that_is_used_is_as_it_should_be(told):
    given = {"objective__prototype": 0, "objective__external": 1, "data__teacher": "t.npy"}
    config = small_config(
        "pairs.tsv", episode__prototypes=1, episode__external_prototypes=6, **given
    )
    numbers = {"clusters/image_used": 1.0, "clusters/text_used": 1.0, "clusters/external_used": 6.0}
    Reporter(config, 100, told, told).prototypes(numbers, roomless=0)
    assert not told.lines


def test_empty_rows_of_a_teacher_are_told(told, tmp_path):
    source = open_source(str(CASES / "DIST-01" / "pairs.tsv"))
    rows = np.random.default_rng(0).normal(size=(13, 4))
    for empty in (0, 2):
        rows[:empty] = 0
        np.save(tmp_path / "t.npy", rows)
        told.lines.clear()
        opened = open_teacher(tmp_path / "t.npy", 13)
        Reporter(small_config("pairs.tsv"), 100, told, told).source(source, opened)
        assert [" 2 of 13 rows of " in line for line in warnings(told)] == [True] * (empty > 0)


def test_speed_and_memory_are_logged(told, monkeypatch):
    """Two steps of 16 pairs and 1 GFLOP in 4 seconds on eight devices of 1 GFLOP/s."""
    clock = iter([1.0, 5.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(module.jax, "device_count", lambda: 8)
    monkeypatch.setattr(module, "peak_flops", lambda device: 1e9)
    report(told, [GOOD, GOOD])
    _, values = told.written[0]
    assert values["speed/pairs_per_second_per_device"] == pytest.approx(1.0)
    assert values["speed/teraflops_per_device"] == pytest.approx(2e9 / 4 / 8 / 1e12)
    assert values["speed/flop_use"] == pytest.approx(1 / 16)
    assert 0.01 < values["memory/host_gb"] < 1000
    assert "pairs/s/device" in told.shown


def test_an_episode_line_has_the_shares_of_its_parts(told):
    config, clock = small_config("pairs.tsv", episode__online=0.5), Stopwatch()
    clock.seconds |= {
        "save": 9.0, "sample": 0.25, "extract": 1.0, "cluster": 0.5, "back-translate": 0.25,
        "train": 8.0, "evaluate": 3.0,
    }  # fmt: skip
    numbers = {
        "seconds/input_wait": 2.0, "loss/total": 1.5, "online/known": 0.5,
        "online/same_image": 0.25, "online/same_text": 0.5,
    }  # fmt: skip
    reporter = Reporter(config, 100, told, told)
    reporter.episode(6, 1, phase_of(config, 1), dict(numbers), clock)
    ((step, values),) = told.written
    assert step == 6
    assert values == numbers | {
        f"seconds/{name}": value for name, value in clock.seconds.items()
    } | {
        "share/overhead": 0.25,
        "share/input_wait": 0.25,
        "online/agreement_image": 0.5,
        "online/agreement_text": 1.0,
    }
    assert "episode 2/100 prototype: total 1.500" in told.lines[0]
    assert "overhead 25% of training" in told.lines[0]
    assert "waited for input 25% of the time: raise data.threads=2" in told.lines[1]


def test_numbers_of_clusters_have_their_own_names():
    found = Clusters(
        jnp.zeros((4, 2)), jnp.zeros(9, jnp.int32), jnp.array([3, 0, 6, 0]), jnp.float32(2.5),
        jnp.int32(7), jnp.int32(1),
    )  # fmt: skip
    assert cluster_numbers({"text": found}) == {
        "clusters/text_used": 2.0,
        "clusters/text_objective": 2.5,
        "clusters/text_iterations": 7.0,
        "clusters/text_nonfinite_rows": 1.0,
    }


def test_a_limit_above_the_length_is_told(told):
    source = open_source(str(CASES / "DIST-01" / "pairs.tsv"), limit=14)
    for limit, expected in ((14, 1), (13, 0)):
        told.lines.clear()
        config = small_config("pairs.tsv", data__limit=limit)
        Reporter(config, 100, told, told).source(source, None)
        lines = [line for line in told.lines if "data.limit" in line]
        assert lines == ["  data.limit=14: there are only 13 pairs, and all are used"][:expected]


def test_pairs_that_cannot_be_read_are_told_when_there_are_more(told):
    source = open_source(str(CASES / "DIST-01" / "pairs.tsv"))
    reporter, log = Reporter(small_config("pairs.tsv"), 100, told, told), UnreadableLog(source)
    reporter.losses(log)
    assert not told.lines
    notes = odd_code(NOTES)
    log.add(np.array([[1, 0], [2, 0], [3, 6], [4, notes], [1, 0], [5, notes]]))
    reporter.losses(log)
    reporter.losses(log)
    few, odd = told.lines
    assert "3 pairs could not be read so far, over all processes" in few
    assert "(missing file: 2, truncated image: 1)" in few
    assert f"2 pictures so far have {NOTES}, and are used all the same" in odd
    assert odd.endswith(source.where(4))
    log.add(np.array([[6, 0]]))
    reporter.losses(log)
    assert len(told.lines) == 3


def test_what_a_list_leaves_out_and_repeats_is_told(told, tmp_path):
    rows = ["a.jpg\ta cat", "https://h.example/b.jpg\ta dog", "a.jpg\ta cat", "c.jpg\ta cat"]
    (tmp_path / "pairs.tsv").write_text("\n".join(["filepath\ttitle", *rows]))
    source = open_source(str(tmp_path / "pairs.tsv"))
    Reporter(small_config("pairs.tsv"), 100, told, told).source(source, None)
    assert any("a web address (https://)" in line and "1 (line 3)" in line for line in told.lines)
    (told_of,) = warnings(told)
    assert "1 of 3 pairs repeat an earlier one's picture and caption" in told_of
    assert "negatives" in told_of


def test_start_tells_of_captions_that_are_one_text(told, tmp_path):
    path = tmp_path / "pairs.tsv"
    for captions, count in (
        (["nan"] * 12 + ["a dog"] * 4, 1),
        ([f"dog {n}" for n in range(16)], 0),
    ):
        rows = [f"{number}.png\t{caption}\n" for number, caption in enumerate(captions)]
        path.write_text("filepath\ttitle\n" + "".join(rows))
        lines = module.source_lines(small_config(path), PairList(str(path)), None)
        assert sum("12 of 16 captions looked at are 'nan'" in line for line in lines) == count
