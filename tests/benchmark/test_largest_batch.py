"""The search for the largest batch, on devices that are made up."""

from types import SimpleNamespace

import jax
import pytest

from protoclip_jax.benchmark import check_step, step
from protoclip_jax.benchmark.largest_batch import TRIES, DoesNotFit, largest
from protoclip_jax.config import Config

STATE, PAIR = 1.8e9, 0.11e9


class Device:
    """Takes STATE bytes and PAIR a row; says so or not; fails above `room`."""

    def __init__(self, room: float, tells: bool = True):
        self.room, self.tells, self.attempts = room, tells, []

    def __call__(self, rows: int) -> float | None:
        self.attempts.append(rows)
        needed = STATE + PAIR * rows
        if needed > self.room:
            raise DoesNotFit(f"{needed / 1e9:.0f} GB")
        return needed if self.tells else None


@pytest.mark.parametrize(
    ("room", "first", "rows", "attempts"),
    [
        (80e9, 512, 512, [512]),  # 1024 would take twice the bytes: not compiled
        (80e9, 128, 512, [128, 256, 512]),
        (80e9, 2048, 512, [2048, 1024, 512]),
        (30e9, 512, 256, [512, 256]),
        (2e9, 4, 1, [4, 2, 1]),
    ],
)
def test_a_device_that_tells_is_asked_as_little_as_possible(room, first, rows, attempts):
    device = Device(room)
    found = largest(device, room, first=first, most=8192)
    assert found["rows"] == rows
    assert device.attempts == attempts
    assert list(found["tried"]) == attempts
    assert found["tried"][rows] == STATE + PAIR * rows
    assert found["larger"].startswith(f"{2 * rows:,} ")


def test_a_device_that_does_not_tell_is_tried_until_it_fails():
    device = Device(80e9, tells=False)
    found = largest(device, None, first=256, most=8192)
    assert found["rows"] == 512
    # Tried to the first that fails; the best is the one that lies compiled in the end.
    assert device.attempts == [256, 512, 1024, 512]
    assert found["larger"] == "1,024 do not fit: 114 GB"


def test_what_is_nearly_too_much_is_tried():
    """Twice the bytes of 512 rows are a little more than there is: the state is counted twice."""
    room = STATE + PAIR * 1024 + 0.1e9
    assert room < 2 * (STATE + PAIR * 512)
    assert largest(Device(room), room, first=512, most=8192)["rows"] == 1024


def test_most_and_tries_and_time_bound_the_search():
    found = largest(Device(1e15), 1e15, first=32, most=64)
    assert (found["rows"], found["larger"]) == (64, "more than 64 are not tried")
    found = largest(Device(1e15), 1e15, first=1, most=8192)
    assert len(found["tried"]) == TRIES == 4
    assert (found["rows"], found["larger"]) == (8, "16 not tried: 4 tries are over")
    asked = []
    found = largest(
        Device(1e15), 1e15, first=2, most=99, enough_time=lambda s: asked.append(s) or False
    )
    assert (found["rows"], found["larger"]) == (2, "4 not tried: no time is left")
    assert len(asked) == 1


def test_nothing_fits():
    with pytest.raises(DoesNotFit, match="no batch that was tried fits"):
        largest(Device(1e9), 1e9, first=2, most=8)


def test_each_try_is_told():
    told = []
    largest(Device(80e9), 80e9, first=1024, most=2048, told=lambda x: told.append(dict(x["tried"])))
    assert [len(one) for one in told] == [1, 2]


class Runner(step.Runner):
    """Compiles and computes nothing."""

    def __init__(self, needed, error=None):
        self.config, self.inputs, self.called = Config(), "of the last batch", []
        self._needed, self._error = needed, error

    def needed_bytes(self):
        return self._needed

    def renew(self):
        assert self.inputs is None
        self.called.append("renew")

    def prepare(self, episode, phase):
        self.called.append(("prepare", episode, self.config.optimizer.batch))

    def run(self, steps):
        self.called.append("run")
        if self._error is not None:
            raise self._error


def test_an_attempt_runs_the_step_with_its_batch():
    runner = Runner(7_000)
    assert check_step.attempt(runner, 3, None, 96, 8e3) == 7_000
    assert runner.called == ["renew", ("prepare", 3, 96), "run"]


def test_what_is_too_large_as_compiled_is_not_run():
    runner = Runner(9_000_000_000)
    with pytest.raises(DoesNotFit, match=r"9\.0 GB as compiled"):
        check_step.attempt(runner, 0, None, 96, 8e9)
    assert "run" not in runner.called


def test_a_device_that_is_full_does_not_fit_and_other_errors_pass():
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 9 bytes.\nMore.")
    with pytest.raises(DoesNotFit, match=r"^RESOURCE_EXHAUSTED: Out of memory: 9 bytes\.$"):
        check_step.attempt(Runner(None, full), 0, None, 96, None)
    broken = jax.errors.JaxRuntimeError("INTERNAL: no kernel")
    with pytest.raises(jax.errors.JaxRuntimeError, match="no kernel"):
        check_step.attempt(Runner(None, broken), 0, None, 96, None)


@pytest.mark.parametrize(("rows", "power"), [(0.3, 1), (1.0, 1), (511.9, 256), (512.0, 512)])
def test_power_of_two(rows, power):
    assert check_step.power_of_two(rows) == power


@pytest.mark.parametrize(
    ("stats", "limit"), [(None, None), ({}, None), ({"bytes_limit": 200}, 190)]
)
def test_memory_limit(monkeypatch, stats, limit):
    device = SimpleNamespace(memory_stats=lambda: stats)
    monkeypatch.setattr(check_step.jax, "local_devices", lambda: [device])
    assert check_step.memory_limit() == limit
