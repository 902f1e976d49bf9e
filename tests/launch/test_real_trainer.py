"""The launchers with the real trainer: a tiny run of two processes that something happens to."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launch_hosts import ROOT, Cloud, Machine, Slurm, finished
from tiny_run import SMALL, metrics, write_pairs

pytestmark = pytest.mark.slow
SETTINGS = SMALL | {
    "model.batch_norm_group": "none",
    "episode.size": "40",
    "episode.count": "3",
    "episode.warmup": "1",
    "episode.locked": "0",
    "episode.redos": "1",
    "objective.external": "0",
    "evaluation.suite": "",
    "log.every": "1",
}
STEPS = 15
# Before the first prototype episode, whose programs take a second at least: there is time to act.
EARLY = 2


@pytest.fixture
def options(tmp_path):
    pairs = write_pairs(tmp_path / "pairs", 40)
    settings = SETTINGS | {"data.train": str(pairs)}
    return [
        f"--config={ROOT / 'configs' / 'cc3m.py'}",
        f"--workdir={tmp_path / 'a run'}",
        *(f"--config.{name}={value}" for name, value in settings.items()),
    ]


def real(machine: Machine) -> None:
    """Puts a Python that trains, with tiny presets, in the place of the stand-in."""
    tiny = f'exec "{sys.executable}" "{ROOT}/tests/tiny_process.py" 1 "{machine.folder}/out"'
    machine.python = machine.folder / "python"
    machine.python.write_text(f"""#!/bin/bash
case "$1 ${{2:-}}" in
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; exit ;;
  "-m pip" | -c*) exit 0 ;;
esac
shift 2
if [ "$1" = --distributed ]; then  # which only a TPU knows how to do
  shift
  set -- "$@" --coordinator="127.0.0.1:$TINY_PORT" --num_processes=2 --process_id="$TPU_WORKER_ID"
fi
{tiny} "$@"
""")
    machine.python.chmod(0o755)
    for name, value in os.environ.items():
        if name.startswith("JAX_"):
            machine.environment[name] = value
    machine.environment["PYTHON"] = str(machine.python)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def steps(workdir: Path) -> list[int]:
    return [line["step"] for line in metrics(workdir) if any(k.startswith("train/") for k in line)]


def wait_for_step(workdir: Path, step: int, launcher: subprocess.Popen) -> None:
    deadline = time.monotonic() + 400
    while not (workdir / "metrics.jsonl").exists() or max(steps(workdir), default=0) < step:
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < deadline, finished(launcher, 0)
        time.sleep(0.05)


def trainer(launcher: subprocess.Popen, number: int) -> int:
    """The process of this number among those that the launcher started."""
    found = []
    for child in psutil.Process(launcher.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if f"--process_id={number}" in child.cmdline():
                found.append(child.pid)
    (process,) = found
    return process


def test_local_goes_on_after_a_process_was_killed(tmp_path, options):
    machine = Machine(tmp_path)
    real(machine)
    launcher = machine.start("bash", "launch/local.sh", 2, *options, PORT=free_port())
    wait_for_step(tmp_path / "a run", EARLY, launcher)
    os.kill(trainer(launcher, 1), signal.SIGKILL)
    result = finished(launcher, 600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "process 1 was ended by signal 9" in result.stderr
    assert result.stderr.count("all start again") == 1
    assert steps(tmp_path / "a run")[-1] == STEPS


def test_slurm_job_saves_and_goes_on(tmp_path, options):
    slurm = Slurm(tmp_path)
    real(slurm)
    # The port is made of it.
    slurm.environment["SLURM_JOB_ID"] = str(random.randrange(10**6, 10**7))
    job = slurm.submit(*options)
    wait_for_step(tmp_path / "a run", EARLY, job)
    job.send_signal(signal.SIGTERM)
    result = finished(job, 300)
    assert result.returncode == 75, result.stderr[-3000:]
    assert slurm.queued_again()
    left = steps(tmp_path / "a run")[-1]
    assert EARLY <= left < STEPS
    result = finished(slurm.submit(*options, restart=1), 600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"Going on after step {left}" in result.stderr
    assert steps(tmp_path / "a run")[-1] == STEPS
    assert not slurm.queued_again()


@pytest.fixture
def pod(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    cloud.close()


def test_tpu_run_goes_on_without_its_script(pod, tmp_path, options):
    real(pod)
    pod.environment["TINY_PORT"] = str(free_port())
    script = pod.pod(*options)
    wait_for_step(tmp_path / "a run", EARLY, script)
    os.killpg(script.pid, signal.SIGKILL)
    script.communicate()
    assert steps(tmp_path / "a run")[-1] < STEPS
    result = finished(pod.pod(*options), 600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "the run is on: following it" in result.stderr
    assert steps(tmp_path / "a run") == list(range(1, STEPS + 1))
