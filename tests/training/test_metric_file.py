"""metrics.jsonl and TensorBoard events on disks that are torn, damaged, full or not there."""

import errno
import json
import os
from pathlib import Path

import pytest

from protoclip_jax.config import Config, ConfigError
from protoclip_jax.training import events, metric_file, record
from protoclip_jax.training.logging import MetricLog, read_metrics
from protoclip_jax.training.metric_file import MetricFile

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def lines(*steps: int) -> str:
    return "".join(json.dumps({"step": step, "x": 1.5}) + "\n" for step in steps)


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_metrics(folder)]


@pytest.mark.parametrize("torn", ['{"step": 3, "x"', '{"step": 3}', "{", "\0\0\0\0"])
def test_a_torn_last_line_costs_no_other(tmp_path, torn):
    """RUN-08: the next line is not glued to it."""
    (tmp_path / "metrics.jsonl").write_text(lines(2) + torn)
    assert steps(tmp_path) == [2]
    file = MetricFile(tmp_path, 3, print)
    file.write({"step": 4})
    file.write({"step": 6})
    file.close()
    assert steps(tmp_path) == [2, 4, 6]


def test_lines_of_later_steps_are_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(lines(2, 4, 6))
    MetricFile(tmp_path, 4, print).close()
    assert steps(tmp_path) == [2, 4]


@pytest.mark.parametrize(
    "damage",
    [
        b'{"step": 3, "x"\n',
        b'{"step": 3{"step": 4}\n',
        b"[3]\n",
        b'{"x": 3}\n',
        b'{"step": "3"}\n',
        b"\0\0\0\n",
        b"\n",
        b"\xff\xfe\n",
        b"null\n",
    ],
)
def test_a_damaged_line_is_named(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(2).encode() + damage + lines(4).encode())
    for read in (
        lambda: record.check(tmp_path),
        lambda: MetricLog(tmp_path, Config(), 9),
    ):
        with pytest.raises(ConfigError, match=r"metrics\.jsonl is damaged") as caught:
            read()
        assert len(str(caught.value).splitlines()) == 1
    assert path.read_bytes() == lines(2).encode() + damage + lines(4).encode()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"recipe": 3}', "\0" * 9, b"\xff"])
def test_a_damaged_record_is_named(tmp_path, text):
    path = tmp_path / "recipe.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=r"recipe\.json is damaged .*remove it"):
        record.check(tmp_path)
    path.unlink()
    record.check(tmp_path)  # a fresh workdir


@pytest.mark.parametrize("name", ["recipe.json", "metrics.jsonl"])
def test_a_folder_in_a_file_s_place_is_named(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=name):
        record.check(tmp_path)


def test_lines_wait_for_a_full_disk(tmp_path, monkeypatch):
    said, write, room = [], os.write, [10]

    def full(file, data):
        taken = data[: room[0]]
        room[0] -= len(taken)
        if not taken:
            raise FULL
        return write(file, taken)

    log = MetricFile(tmp_path, 0, said.append)
    monkeypatch.setattr(metric_file.os, "write", full)
    log.write({"step": 1})
    log.write({"step": 2})
    assert len(said) == 1
    assert "metrics.jsonl cannot be written (No space left on device): the run goes on" in said[0]
    room[0] = 10**9
    log.write({"step": 3})
    assert "is written again" in said[1]
    room[0] = 0
    log.write({"step": 4})
    log.close()
    assert "1 lines of" in said[-1]
    assert steps(tmp_path) == [1, 2, 3]


def test_a_disk_full_of_events_ends_the_events_only(tmp_path, monkeypatch):
    """/dev/full is such a disk."""
    said = []
    written = events.Events(tmp_path / "tensorboard", 0, said.append)
    (path,) = (tmp_path / "tensorboard").iterdir()
    written.write(1, {"loss/clip": 2.5})
    written.flush()
    assert b"loss/clip" in path.read_bytes()
    written._writer._py_recordio_writer._writer = open("/dev/full", "wb")  # noqa: SIM115
    written.write(2, {"loss/clip": 2.5})
    written.flush()
    written.write(3, {"loss/clip": 2.5})
    written.flush()
    written.close()
    assert len(said) == 1
    assert "no more TensorBoard events" in said[0]


def test_a_log_that_cannot_be_opened_is_refused(tmp_path, monkeypatch):
    def read_only(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "metrics.jsonl")

    monkeypatch.setattr(metric_file.os, "open", read_only)
    with pytest.raises(ConfigError, match=r"Read-only file system.*metrics\.jsonl"):
        MetricLog(tmp_path, Config(), 0)


def test_tensorboard_reads_the_events(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = events.Events(tmp_path, 0, print)
    for step in (1, 2, 3):
        first.write(step, {"loss/clip": float(step)})
    first.close()
    for path in tmp_path.iterdir():
        path.rename(tmp_path / "events.out.tfevents.0000000001.before")
    again = events.Events(tmp_path, 2, print)
    again.write(3, {"loss/clip": 30.0})
    again.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    values = {(event.step, event.value) for event in found.Scalars("loss/clip")}
    assert values == {(1, 1.0), (2, 2.0), (3, 30.0)}  # step 3 of the earlier process is hidden


def test_a_run_that_begins_keeps_no_number_of_an_earlier_start(tmp_path):
    """As one that was killed before its first checkpoint: it measures step 0 again."""
    for step, left in ((0, []), (3, [0, 3])):
        MetricFile(tmp_path, 9, print).close()
        (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {n}}}\n' for n in (0, 3, 6)))
        MetricLog(tmp_path, Config(), step).close()
        assert steps(tmp_path) == left
