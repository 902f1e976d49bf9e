"""launch/local.sh: several processes here, started again or not by their exit codes."""

import os
import pty
import signal
import socket
import subprocess
import time

import pytest
from launch_hosts import EXIT_CODES, Machine, alive, descendants, finished, other


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def local(machine, *arguments, **options):
    return machine.run("bash", "launch/local.sh", *arguments, **options)


@pytest.mark.parametrize(("code", "again"), EXIT_CODES.items())
def test_exit_codes(machine, code, again):
    machine.plans(other(code), f"{code}, 0")
    result = local(machine, 2)
    assert machine.starts(0) == machine.starts(1) == (2 if again else 1), result.stderr
    assert result.returncode == (0 if again else code)
    assert result.stderr.count("all start again") == again


@pytest.mark.parametrize(
    ("codes", "decides", "again"),
    [
        ((1, 76), 1, False),
        ((137, 2), 2, False),
        ((130, 137), 130, False),
        ((76, 137), 137, True),
        ((75, 76), 76, True),
        ((0, 76), 76, True),
        ((0, 3), 3, False),
    ],
)
def test_one_code_decides_for_all(machine, codes, decides, again):
    machine.plans(*codes)
    result = local(machine, 2, RESTARTS=0)
    assert result.returncode == decides
    assert ("gave up" in result.stderr) == again


def test_restarts_are_bounded_and_told(machine):
    machine.plans("76, 76, 76, 76, 0", "137, 137, 137, 137, 0")
    result = local(machine, 2, RESTARTS=2)
    assert machine.starts(1) == 3
    assert result.returncode == 137
    assert result.stderr.count("process 1 was ended by signal 9") == 3
    assert "(2 of at most 2 times)" in result.stderr
    assert "gave up after 2 restarts" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_own_signal_reaches_each_once_and_nothing_starts_again(machine, number):
    machine.plans("wait, 0", "wait, 0")
    process = machine.start("bash", "launch/local.sh", 2)
    machine.wait_for_start(0, 1)
    process.send_signal(number)
    result = finished(process)
    assert result.returncode == 75, result.stderr
    assert machine.starts(0) == machine.starts(1) == 1
    name = "INT" if number == signal.SIGINT else "TERM"
    assert machine.signals(0) == machine.signals(1) == [name]


def typed(machine, *presses: float):
    """Runs local.sh in a terminal, and presses Ctrl-C after these seconds each."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", "bash", "launch/local.sh", "2"],
        cwd=machine.checkout,
        env=machine.environment,
        stdin=follower,
        stdout=follower,
        stderr=follower,
    )
    os.close(follower)
    machine.wait_for_start(0, 1)
    try:
        for seconds in presses:
            time.sleep(seconds)
            os.write(leader, b"\x03")
        return process.wait(60)
    finally:
        if process.poll() is None:
            for number in [process.pid, *descendants(process.pid)]:
                os.kill(number, signal.SIGKILL)
        os.close(leader)


def test_ctrl_c_of_a_terminal(machine):
    """The terminal signals its whole group: still each process hears of it once."""
    machine.plans("wait, 0", "wait, 0")
    assert typed(machine, 0) == 75
    assert machine.signals(0) == machine.signals(1) == ["INT"]
    assert machine.starts(0) == 1


def test_second_ctrl_c_ends_at_once(machine):
    machine.plans("wait, 0", "wait, 0")
    machine.environment["LINGER"] = "200"
    assert typed(machine, 0, 0.3) == 130
    assert machine.signals(0) == ["INT", "INT"]
    assert machine.starts(0) == 1


def test_signal_after_a_loss_is_not_forgotten(machine):
    """One has left with 76, the other hangs, and SIGTERM comes: nothing starts again."""
    machine.plans("76, 0", "deaf, 0")
    process = machine.start("bash", "launch/local.sh", 2, GRACE=1)
    machine.wait_for_start(0, 1)
    process.send_signal(signal.SIGTERM)
    result = finished(process)
    assert machine.starts(0) == 1, result.stderr
    assert result.returncode == 137


def test_process_that_does_not_leave_is_ended(machine):
    machine.plans("76, 0", "deaf, 0")
    result = local(machine, 2, GRACE=1)
    assert result.returncode == 0, result.stderr
    assert "process 1 is still there 1 s after another failed" in result.stderr
    assert machine.starts(1) == 2


def test_others_have_time_to_leave(machine):
    machine.plans("137, 0", "after go 76, 0")
    process = machine.start("bash", "launch/local.sh", 2)
    machine.wait_for_start(0, 1)
    time.sleep(0.5)
    assert machine.starts(0) == 1
    (machine.plan / "go").touch()
    assert finished(process).returncode == 0
    assert machine.starts(0) == machine.starts(1) == 2


def test_children_of_a_killed_process_do_not_live_on(machine):
    machine.plans("76, 0", "child 137, 0")
    assert local(machine, 2).returncode == 0
    child = int((machine.plan / "child-1-1").read_text())
    assert not alive(child)


def test_arguments_and_folder(machine, tmp_path):
    """Arguments with spaces and quotes; from another folder; relative paths: see the head."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    arguments = ["--config=a b.py", "--workdir=runs/two", "--config.x='$HOME' \"*\"", ""]
    script = machine.checkout / "launch" / "local.sh"
    result = machine.run("bash", script, 2, *arguments, folder=elsewhere)
    assert result.returncode == 0, result.stderr
    folder, coordinator, count, index, *rest = machine.told(1)
    assert folder == str(machine.checkout)
    assert [count, index] == ["--num_processes=2", "--process_id=1"]
    assert coordinator == machine.told(0)[1]
    assert rest == arguments


@pytest.mark.parametrize("count", ["", "two", "0", "-1", "--config=x.py"])
def test_how_many_processes(machine, count):
    result = local(machine, count, "--config=x.py")
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "local.sh: how many processes? bash launch/local.sh N [trainer arguments]"
    ]


def test_missing_environment_is_told(machine):
    del machine.environment["PYTHON"]
    result = local(machine, 2)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert ".venv/bin/python is missing" in result.stderr


def test_port_in_use(machine):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = local(machine, 2, PORT=port)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        f"local.sh: port {port} is in use: another run? PORT=... names a free one"
    ]
    assert machine.starts(0) == 0


def test_two_runs_at_the_same_time_use_two_ports(machine):
    with socket.socket() as taken:
        try:
            taken.bind(("127.0.0.1", 29400))
            taken.listen()
        except OSError:
            pass  # somebody else has it, which is as good
        assert local(machine, 2).returncode == 0
    port = int(machine.told(0)[1].rpartition(":")[2])
    assert 29400 < port <= 29500


def test_one_gpu_each(machine):
    wrapper = machine.bin / "shows"
    wrapper.write_text('#!/bin/sh\necho "gpu $CUDA_VISIBLE_DEVICES"\n')
    wrapper.chmod(0o755)
    result = local(machine, 3, PYTHON=wrapper, ONE_GPU_EACH=1)
    assert sorted(result.stdout.split("\n")) == ["", "gpu 0", "gpu 1", "gpu 2"]
