"""What holds for every launch script, what runs on each worker, and the table of exit codes."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch_hosts import EXIT_CODES, HOSTS, LAUNCH, ROOT, Machine, finished, wait_for

SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]
FAKES = [path for path in sorted(HOSTS.iterdir()) if path.suffix != ".py"]


@pytest.mark.parametrize("script", [*SCRIPTS, *FAKES], ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script):
    checker = shutil.which("shellcheck") or Path(sys.executable).with_name("shellcheck")
    result = subprocess.run([checker, "-x", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_header_says_what_it_needs(script):
    head = script.read_text().splitlines()[:20]
    assert any(line.startswith("# Needs:") for line in head)


def test_table_is_found():
    """All other tests of exit codes take them from there."""
    assert {code for code, again in EXIT_CODES.items() if not again} == {0, 1, 2, 130}
    assert {code for code, again in EXIT_CODES.items() if again} == {75, 76, 134, 137, 139, 143}


def ask(function: str, *words) -> subprocess.CompletedProcess:
    command = f'. launch/exit_codes.sh && {function} "$@"'
    return subprocess.run(
        ["bash", "-u", "-c", command, "ask", *(str(word) for word in words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_every_code_starts_again_or_not():
    """Codes that no table has are final: another start does not mend what nobody knows."""
    again = ask("eval", "for code in {0..255}; do again $code && echo $code; done")
    wanted = [code for code in range(256) if EXIT_CODES.get(code, 128 < code <= 192)]
    assert again.stdout.split() == [str(code) for code in wanted]
    assert not again.stderr


@pytest.mark.parametrize(
    ("codes", "decides"),
    [
        ((), 0),
        ((0, 0), 0),
        ((0, 75), 75),
        ((76, 75, 76), 76),
        ((137, 76), 137),
        ((76, 1, 137), 1),
        ((137, 130), 130),
        ((127, 76), 127),
        ((143, 255), 255),
    ],
)
def test_decisive_code(codes, decides):
    assert ask("decisive", *codes).stdout == f"{decides}\n"


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path)
    venv = machine.checkout / ".venv" / "bin"
    venv.mkdir(parents=True)
    shutil.copy(machine.python, venv / "python")
    return machine


def worker(machine, *arguments, **options):
    return machine.run("bash", "launch/worker.sh", *arguments, **options)


def test_worker_says_how_it_is_called(machine):
    for arguments in ((), ("trian",)):
        result = worker(machine, *arguments)
        assert result.returncode == 2
        assert "worker.sh train" in result.stderr
        assert "# Needs:" in result.stderr


def test_worker_trains_with_the_real_trainer():
    """Here it refuses a recipe that is not there, which is what can be seen without training."""
    environment = str(Path(sys.executable).parents[1])
    result = subprocess.run(
        ["bash", LAUNCH / "worker.sh", "train", "--config=configs/none.py"],
        env=os.environ | {"VENV": environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert "there is no such file" in result.stderr


@pytest.mark.parametrize("action", [("train",), ("start", "1")])
def test_missing_environment_is_told(machine, action):
    shutil.rmtree(machine.checkout / ".venv")
    result = worker(machine, *action, HOME=machine.folder)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "worker.sh install makes it" in result.stderr


@pytest.mark.parametrize("code", EXIT_CODES)
def test_recorded_exit_code(machine, code):
    machine.plans(0, 0, 0, code)
    folder = machine.folder / "code s"
    folder.mkdir()
    command = [machine.python, "-m", "protoclip_jax.main", "--config=a b.py", ""]
    result = worker(machine, "record", folder, *command, SLURM_PROCID=3)
    assert result.returncode == code
    assert (folder / "exit-3").read_text() == f"{code}\n"
    assert not list(folder.glob("*.part"))
    assert machine.told(3)[1:] == ["--config=a b.py", ""]


@pytest.mark.parametrize("times", [1, 3])
def test_recorder_hands_signals_on(machine, times):
    machine.plans("wait")
    machine.environment["LINGER"] = "10"
    command = [machine.python, "-m", "protoclip_jax.main"]
    process = machine.start("bash", "launch/worker.sh", "record", machine.folder, *command)
    machine.wait_for_start(0)
    for _ in range(times):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.15)
    assert finished(process).returncode == 75
    assert (machine.folder / "exit-0").read_text() == "75\n"
    assert len(machine.signals(0)) >= 1


def runs(machine, *arguments) -> str:
    """The answer of a worker, less its mark."""
    result = worker(machine, *arguments, RUNS=machine.folder / "runs")
    assert result.returncode == 0, result.stderr
    return result.stdout.removeprefix("protoclip_jax-run ").strip()


def test_run_is_started_once_and_alone(machine):
    machine.plans("after go 76, 0")
    assert runs(machine, "status") == "- none"
    assert runs(machine, "start", "a", "--x=a b") == "a running"
    assert runs(machine, "start", "a", "--x=a b") == "a running"
    assert runs(machine, "start", "b") == "a running"
    assert runs(machine, "status") == "a running"
    assert runs(machine, "status", "b") == "b none"
    wait_for(machine.plan / "started-0-1")
    (machine.plan / "go").touch()
    wait_for(machine.folder / "runs" / "a" / "exit-0")
    assert runs(machine, "status") == "a 76"
    assert runs(machine, "start", "a") == "a 76"
    assert machine.starts(0) == 1
    assert machine.told(0)[1:] == ["--x=a b"]
    assert runs(machine, "start", "b").startswith("b ")
    wait_for(machine.folder / "runs" / "b" / "exit-0")
    assert runs(machine, "status") == "b 0"
    assert runs(machine, "status", "a") == "a 76"


def test_starts_at_the_same_time(machine):
    machine.plans("after go 0")
    command = ["bash", "launch/worker.sh", "start"]
    options = {"RUNS": machine.folder / "runs"}
    processes = [machine.start(*command, name, **options) for name in ("a", "b", "a", "b")]
    answers = {finished(process).stdout for process in processes}
    assert len(answers) == 1
    assert machine.starts(0) <= 1
    wait_for(machine.plan / "started-0-1")
    (machine.plan / "go").touch()
    assert machine.starts(0) == 1


def test_asking_together_is_no_run(machine):
    """Whoever looks whether the lock is held must not be taken for the run."""
    machine.plans("deaf")
    runs(machine, "start", "a")
    leader = int((machine.folder / "runs" / "a" / "leader").read_text())
    os.killpg(leader, signal.SIGKILL)
    command = ["bash", "launch/worker.sh", "status"]
    options = {"RUNS": machine.folder / "runs"}
    time.sleep(0.1)
    processes = [machine.start(*command, **options) for _ in range(8)]
    assert {finished(p).stdout for p in processes} == {"protoclip_jax-run a 137\n"}


def test_a_run_that_ends_while_it_is_asked_for_did_not_die(tmp_path):
    """Between the look for its exit code and the look at its lock."""
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "last").write_text("a\n")
    flock = tmp_path / "flock"
    flock.write_text(f'#!/bin/sh\n[ "$1" != --nonblock ] || echo 0 >{tmp_path}/runs/a/exit-0\n')
    flock.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    answer = subprocess.run(
        ["bash", "launch/worker.sh", "status"],
        cwd=ROOT,
        env=os.environ | {"PATH": path, "RUNS": str(tmp_path / "runs")},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert answer.stdout == "protoclip_jax-run a 0\n", answer.stderr


def test_log_is_followed_from_a_byte_on(machine):
    machine.plans("after go 0")
    runs(machine, "start", "a")
    log = machine.folder / "runs" / "a" / "log"
    while not log.read_text():
        time.sleep(0.02)
    lines = runs(machine, "follow", "a", 0, 0.5).splitlines()
    assert lines == ["protoclip_jax-log 0", "process 0, start 1"]
    lines = runs(machine, "follow", "a", 9, 0.5).splitlines()
    assert lines == ["protoclip_jax-log 9", ", start 1"]
    (machine.plan / "go").touch()
    begun = time.monotonic()
    runs(machine, "follow", "a", 0, 60)
    assert time.monotonic() - begun < 30
