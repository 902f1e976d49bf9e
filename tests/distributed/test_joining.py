"""Real processes that join by flags and by Slurm's variables, and lose one another."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "join_process.py"
LEFT_OVER = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS_PER_NODE": "1",
}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def start():
    """Starts processes of tests/join_process.py; ends what is left of them."""
    started = []

    def begin(what: str, *flags, **environment) -> subprocess.Popen:
        env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        env |= {"TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONUNBUFFERED": "1"} | environment
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), what, *map(str, flags)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def pair(start, what: str, other: str | None = None) -> list[subprocess.Popen]:
    flags = (f"127.0.0.1:{free_port()}", 2)
    return [start(what, *flags, 0), start(other or what, *flags, 1)]


def heard(processes: list[subprocess.Popen]) -> list[dict]:
    found = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        found.append(json.loads(out.splitlines()[-1]))
    return found


@pytest.mark.core
def test_two_processes_talk(start):
    first, second = heard(pair(start, "talk"))
    for one in (first, second):
        assert one["several"]
        assert one["count"] == 2
        assert one["exchanged"] == [{"from": 0}, {"from": 1}]
        assert one["broadcast"] == [0, "x"]
        assert one["met"]
    assert first["alone"]  # an event to which the other one does not come


@pytest.mark.core
def test_one_task_of_slurm_a_node_sees_all_of_its_devices(start):
    """JAX's own default is the one device of the task's local number."""
    env = LEFT_OVER | {"JAX_COORDINATOR_PORT": str(free_port())}
    processes = [start("talk", **env, SLURM_PROCID=str(index)) for index in range(2)]
    for one in heard(processes):
        assert one["count"] == 2
        assert one["visible"] in (None, "all")


def test_leftover_variables_of_slurm_never_wait_in_silence(start):
    """RUN-12 c: all of a step's variables, and no other task."""
    env = LEFT_OVER | {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
    env["JAX_COORDINATOR_PORT"] = str(free_port())
    process = start("talk", **env)
    line = process.stderr.readline()
    process.kill()
    assert line.startswith("protoclip_jax: process 0 of 4 waits for the other 3 processes")
    assert "SLURM_NTASKS=4" in line
    assert "--num_processes=1 runs alone" in line


@pytest.mark.slow  # nearly all of it waiting for a sign of life
@pytest.mark.parametrize("victim", [0, 1])
def test_lost_process_is_told_in_one_line(start, victim):
    """Outside of any collective operation, where nothing of JAX's would notice for minutes."""
    processes = pair(start, "wait")
    for process in processes:
        assert process.stdout.readline() == "joined\n"
    time.sleep(3)  # signs of life have been exchanged
    processes[victim].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    _, err = processes[1 - victim].communicate(timeout=60)
    assert time.monotonic() - begin < 60
    assert processes[1 - victim].returncode == 76
    assert [line.startswith("protoclip_jax: ") for line in err.splitlines() if line] == [True]
    assert f"process {victim} on " in err
    assert "was lost" in err


def test_failure_is_told_to_all_with_its_code(start):
    first, second = pair(start, "wait", "fail-2")
    _, err = first.communicate(timeout=60)
    assert (first.returncode, second.wait(60)) == (2, 2)
    assert "process 1 on" in err
    assert "ValueError: no way; this process ends too" in err


def test_process_for_which_nobody_comes_is_started_again_unless_the_run_is_over(start):
    """A finished run is seen as such by process 0 and by another one, each alone."""
    lone = [
        start(what, f"127.0.0.1:{free_port()}", 2, index)
        for what, index in (("lone", 0), ("lone", 1), ("lone-finished", 0), ("lone-finished", 1))
    ]
    told = [process.communicate(timeout=120)[1] for process in lone]
    assert [process.returncode for process in lone] == [76, 76, 0, 0], told
    for text in told[:2]:
        assert "did not come to 127.0.0.1:" in text
    for text in told[2:]:
        assert "protoclip_jax: finished" in text
        assert "did not come" not in text
