"""A run that is stopped anywhere goes on as if nothing had happened."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import psutil
import pytest
from tiny_run import (
    SMALL,
    final_state,
    metrics,
    small_config,
    tiny_models,  # noqa: F401 (a fixture)
    untimed,
    write_pairs,
)

import protoclip_jax
from protoclip_jax.config import ConfigError
from protoclip_jax.training import loop, requests
from protoclip_jax.training.checkpoint import Checkpoints

pytestmark = [pytest.mark.usefixtures("tiny_models")]

ROOT = Path(__file__).parents[2]


def recipe(folder: Path, **overrides):
    """Warm-up, prototype with a teacher, locked; BatchNorm in the heads; three steps each."""
    pairs = folder / "data" / "pairs.tsv"
    if not pairs.exists():
        write_pairs(folder / "data")
        rows = np.random.default_rng(1).normal(size=(40, 5)).astype(np.float32)
        np.save(folder / "teacher.npy", rows)
    settings = {
        "episode__count": 4,
        "episode__warmup": 1,
        "episode__locked": 1,
        "data__teacher": folder / "teacher.npy",
        "data__augmentation": "light",
        "objective__external": 1,
        "checkpoint__keep": 20,
    }
    return small_config(pairs, num_devices=8, **(settings | overrides))


def assert_equal_runs(config, one: Path, two: Path):
    states = (final_state(config, one), final_state(config, two))
    jax.tree.map(np.testing.assert_array_equal, *states)
    # An episode's own line has the mean over what one process trained of it.
    ends = [
        [untimed(line) for line in metrics(workdir) if "train/loss/total" in line]
        for workdir in (one, two)
    ]
    assert ends[0] == ends[1]


class Asked:
    """Stands for `Requests.after_step`: answers by the number of training steps so far."""

    def __init__(self, monkeypatch, answers: dict[int, int]):
        self.trainer, self.answers = None, answers
        run = loop.Trainer.run

        def remembered(trainer):
            self.trainer = trainer
            run(trainer)

        monkeypatch.setattr(loop.Trainer, "run", remembered)
        monkeypatch.setattr(requests.Requests, "after_step", lambda _: self.answer())

    def answer(self) -> int:
        return self.answers.pop(self.trainer.done, 0)


@pytest.mark.core
@pytest.mark.slow
def test_run_stopped_in_every_phase_equals_an_unbroken_one(tmp_path, monkeypatch, capsys):
    """CKPT-07: in a warm-up, at the end of one, twice in one prototype episode, while locked."""
    config = recipe(tmp_path, log__every=1)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    loop.train(config, whole)
    with monkeypatch.context() as patched:
        for stop in (2, 3, 4, 5, 11):
            Asked(patched, {stop: requests.LEAVE})
            with pytest.raises(requests.Leaving) as left:
                loop.train(config, broken)
            assert left.value.step == stop == Checkpoints(broken).latest()
        Asked(patched, {})
        loop.train(config, broken)
    told = capsys.readouterr().err
    assert "Going on after step 5 of 12." in told
    assert "passed over" not in told
    assert_equal_runs(config, whole, broken)


@pytest.mark.slow
def test_stop_during_extraction_keeps_the_state_before_it(tmp_path, monkeypatch):
    config = recipe(tmp_path, log__every=1, checkpoint__every=3)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    loop.train(config, whole)
    with monkeypatch.context() as patched:
        asked = Asked(patched, {})
        patched.setattr(
            asked,
            "answer",
            lambda: requests.LEAVE if asked.trainer.title.startswith("episode 2/") else 0,
        )
        with pytest.raises(requests.Leaving) as left:
            loop.train(config, broken)
        assert left.value.step == 3
    loop.train(config, broken)
    assert_equal_runs(config, whole, broken)


@pytest.mark.slow
def test_online_run_with_workers_stopped_in_an_episode(tmp_path, monkeypatch):
    config = recipe(tmp_path, episode__online=0.5, episode__prototypes=4, log__every=1)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    loop.train(config, whole)
    with monkeypatch.context() as patched:
        Asked(patched, {7: requests.LEAVE})
        with pytest.raises(requests.Leaving):
            loop.train(config, broken)
    loop.train(config, broken)
    assert_equal_runs(config, whole, broken)


@pytest.mark.slow
def test_timed_saves_go_on_without_leaving(tmp_path, monkeypatch):
    config = recipe(tmp_path)
    Asked(monkeypatch, {4: requests.SAVE, 8: requests.SAVE})
    loop.train(config, tmp_path / "run")
    assert Checkpoints(tmp_path / "run").latest() == 12
    assert {3, 4, 6, 8, 9, 12} == set(Checkpoints(tmp_path / "run").all())


def test_clock_and_signals_ask(monkeypatch):
    mesh = loop.state.make_mesh()
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with requests.Requests(minutes=2.0, mesh=mesh) as asked:
        assert asked.after_step() == 0
        now[0] += 121
        assert asked.after_step() == requests.SAVE
        asked.saved()
        assert asked.after_step() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.after_step() == requests.LEAVE
    with requests.Requests(minutes=None, mesh=mesh) as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.after_step() == requests.LEAVE
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
def test_damaged_newest_checkpoint_costs_its_steps_only(tmp_path, capsys):
    config = recipe(tmp_path, episode__count=3, log__every=1)
    workdir, whole = tmp_path / "run", tmp_path / "whole"
    loop.train(config, whole)
    loop.train(config, workdir)
    for item in ("opt_state", "params"):
        (workdir / "checkpoints" / "9" / item).rename(workdir / f"gone-{item}")
    # Looking at the model changes nothing in the folder either.
    names = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    protoclip_jax.load(workdir)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == names
    assert "checkpoints/9 cannot be read: passed over" in capsys.readouterr().err
    loop.train(config, workdir)
    told = capsys.readouterr().err
    assert "checkpoints/9 cannot be read: passed over" in told
    assert "Going on after step 6 of 9." in told
    assert_equal_runs(config, whole, workdir)


@pytest.mark.slow
def test_new_run_starts_from_the_weights_of_another(tmp_path):
    first = recipe(tmp_path, episode__count=2, episode__locked=0)
    loop.train(first, tmp_path / "first")
    second = recipe(tmp_path, episode__count=3, model__weights=tmp_path / "first")
    trainer = loop.Trainer(second, tmp_path / "second")
    expected, state = final_state(first, tmp_path / "first"), jax.device_get(trainer.state)
    trainer.close()
    for name in ("params", "batch_stats"):
        jax.tree.map(np.testing.assert_array_equal, state[name], expected[name])
    assert state["step"] == 0
    assert state["opt_state"]["text"].count == 0
    other = recipe(tmp_path, model__projection_width=10, model__weights=tmp_path / "first")
    with pytest.raises(ConfigError, match=r"(?s)another model.*stored .*12.*wanted .*10"):
        loop.train(other, tmp_path / "third")


def kill_command(folder: Path, workdir: Path) -> list[str]:
    options = SMALL | {
        "data.train": str(folder / "data" / "pairs.tsv"),
        "data.teacher": str(folder / "teacher.npy"),
        "data.augmentation": "light",
        "model.batch_norm_group": "none",
        "episode.count": "32",
        "episode.warmup": "2",
        "episode.locked": "2",
        "episode.redos": "1",
        "objective.external": "1",
        "optimizer.clip_norm": "none",
        "checkpoint.minutes": "0",  # after every step: kills meet saves
    }
    return [
        sys.executable,
        str(ROOT / "tests" / "tiny_process.py"),
        "1",
        str(workdir / "out"),
        f"--config={ROOT / 'configs' / 'cc3m.py'}",
        f"--workdir={workdir / 'run'}",
        *(f"--config.{name}={value}" for name, value in options.items()),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_whole_group_leaves_the_workers_their_work(tmp_path, number):
    """As Ctrl-C in a terminal: the run saves, leaves with 75, and no process stays behind."""
    recipe(tmp_path)  # writes the pairs
    workdir, log = tmp_path / "run", tmp_path / "log"
    command = [*kill_command(tmp_path, workdir), "--config.data.workers=2"]
    with log.open("w") as file:
        process = subprocess.Popen(command, stderr=file, cwd=ROOT, start_new_session=True)
    try:
        end = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < end:
            if _newest(workdir / "run" / "checkpoints") > 1:
                break
            time.sleep(0.01)
        assert process.poll() is None, log.read_text()[-3000:]
        workers = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, number)
        assert process.wait(60) == 75, log.read_text()[-3000:]
        assert not psutil.wait_procs(workers, timeout=20)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert len(workers) >= 2
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("times", [6, pytest.param(20, marks=pytest.mark.long)])
def test_run_killed_many_times_ends_with_the_same_parameters(tmp_path, times):
    """SIGKILL at random moments, saving included; bit for bit the unbroken run."""
    recipe(tmp_path)  # writes the pairs
    # The programs are compiled once, as a user's second start finds them too.
    env = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = {"env": env, "cwd": ROOT, "stdout": subprocess.DEVNULL}
    subprocess.run(kill_command(tmp_path, whole), check=True, timeout=600, **options)
    chance, kills, log = random.Random(0), 0, tmp_path / "log"
    steps = killed / "run" / "checkpoints"
    for _ in range(60):
        if kills == times:
            break
        before = _newest(steps)
        with log.open("a") as file:
            process = subprocess.Popen(kill_command(tmp_path, killed), stderr=file, **options)
        # From the first new checkpoint on, at any moment of the next steps and saves.
        end = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end and _newest(steps) <= before:
            time.sleep(0.005)
        # At most three steps, so that a quick machine does not come to the end before 20 kills.
        end = time.monotonic() + chance.uniform(0, 0.4)
        while process.poll() is None and time.monotonic() < end and _newest(steps) < before + 3:
            time.sleep(0.005)
        if process.poll() is None:
            process.kill()
            kills += 1
        process.wait()
        if process.returncode == 0:
            break
    assert kills == times, log.read_text()[-3000:]
    subprocess.run(kill_command(tmp_path, killed), check=True, timeout=600, **options)
    states = [np.load(folder / "out" / "state.npz") for folder in (whole, killed)]
    assert states[0].files == states[1].files
    for name in states[0].files:
        np.testing.assert_array_equal(states[1][name], states[0][name], err_msg=name)
    assert "Going on after step" in log.read_text()


def _newest(folder: Path) -> int:
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return max([int(name) for name in names if name.isdecimal()], default=0)
