"""launch/tpu_pod.sh with a gcloud whose slice is two folders of this machine."""

import os
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
from launch_hosts import (
    ARGUMENTS,
    EXIT_CODES,
    Cloud,
    alive,
    command_line,
    finished,
    other,
    wait_for,
)


@pytest.fixture
def pod(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    cloud.close()


@pytest.mark.parametrize(("code", "again"), EXIT_CODES.items())
def test_exit_codes(pod, code, again):
    pod.plans(other(code), f"{code}, 0")
    result = finished(pod.pod())
    assert pod.starts(0) == pod.starts(1) == 1 + again, result.stderr
    assert result.returncode == (0 if again else code)
    assert len(pod.calls("create")) == 1
    assert not pod.calls("delete")


@pytest.mark.parametrize(
    ("codes", "decides"), [((1, 76), 1), ((137, 2), 2), ((130, 137), 130), ((76, 137), 137)]
)
def test_one_code_decides_for_all(pod, codes, decides):
    pod.plans(*codes)
    result = finished(pod.pod(RESTARTS=0))
    assert result.returncode == decides, result.stderr
    assert pod.starts(0) == pod.starts(1) == 1


def test_restarts_are_bounded_and_told(pod):
    pod.plans("76, 76, 0", "137, 137, 0")
    result = finished(pod.pod(RESTARTS=1))
    assert result.returncode == 137
    assert pod.starts(1) == 2
    assert "(1 of at most 1 times)" in result.stderr
    assert "gave up after 1 restarts" in result.stderr


def test_arguments_reach_the_trainer(pod, tmp_path):
    """From another folder too."""
    result = finished(
        pod.start("bash", pod.checkout / "launch" / "tpu_pod.sh", *ARGUMENTS, folder=tmp_path)
    )
    assert result.returncode == 0, result.stderr
    for worker in range(2):
        folder, distributed, *arguments = pod.told(worker)
        assert Path(folder).resolve() == (pod.home(worker) / "protoclip_jax").resolve()
        assert [distributed, *arguments] == ["--distributed", *ARGUMENTS]


def test_log_of_worker_0_is_shown(pod):
    result = finished(pod.pod())
    assert result.stdout.splitlines() == ["process 0, start 1"]


def test_lost_connection_neither_ends_nor_doubles_the_run(pod):
    """gcloud itself repeats a command whose connection broke, and then nothing can be reached."""
    pod.plans("after go 0", "after go 0")
    pod.goes_wrong("drop-start", 2)
    pod.goes_wrong("drop-follow", 2)
    process = pod.pod()
    wait_for(pod.plan / "started-0-1")
    wait_for(pod.plan / "started-1-1")
    wait_until(lambda: (pod.cloud / "drop-follow").read_text() == "0")
    pod.goes_wrong("offline", 6)
    os.kill(follower(pod), signal.SIGPIPE)  # as where nobody reads any more
    wait_until(lambda: (pod.cloud / "offline").read_text() == "0")
    (pod.plan / "go").touch()
    result = finished(process)
    assert result.returncode == 0, result.stderr
    assert pod.starts(0) == pod.starts(1) == 1, result.stderr
    assert "asking again" in result.stderr
    # Each line of the log once, whatever was repeated.
    assert result.stdout.splitlines() == ["process 0, start 1"]


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def follower(pod) -> int:
    """The process that shows the log of worker 0."""
    (run,) = pod.run_folders(0)
    found = []

    def there() -> bool:
        for path in os.listdir("/proc"):
            words = command_line(int(path)).split("\0") if path.isdecimal() else [""]
            if words[0] == "tail" and str(run / "log") in words:
                found.append(int(path))
        return bool(found)

    wait_until(there)
    return found[0]


def test_second_start_attaches(pod):
    """After the first script was killed, or beside it."""
    pod.plans("after go 0", "after go 0")
    first = pod.pod()
    wait_for(pod.plan / "started-0-1")
    wait_for(pod.plan / "started-1-1")
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    second, third = pod.pod(), pod.pod()
    wait_until(lambda: len(pod.calls("ssh", "follow")) >= 3)
    (pod.plan / "go").touch()
    for process in (second, third):
        result = finished(process)
        assert result.returncode == 0, result.stderr
        assert "the run is on: following it" in result.stderr
        assert result.stdout.splitlines() == ["process 0, start 1"]
    assert pod.starts(0) == pod.starts(1) == 1
    assert len(pod.calls("scp")) == 1


def test_killed_script_is_taken_over_with_its_exit_code(pod):
    pod.plans("after go 76, 0", "after go 137, 0")
    first = pod.pod()
    wait_for(pod.plan / "started-1-1")
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    second = pod.pod()
    wait_until(lambda: len(pod.calls("ssh", "follow")) >= 2)
    (pod.plan / "go").touch()
    assert finished(second).returncode == 0
    assert pod.starts(0) == pod.starts(1) == 2


def test_two_scripts_at_the_same_time_start_one_run(pod):
    pod.plans("after go 0", "after go 0")
    pod.goes_wrong("state", "READY")
    for worker in range(2):
        pod.home(worker).mkdir()
    processes = [pod.pod(), pod.pod()]
    wait_until(lambda: len(pod.calls("ssh", "follow")) >= 2)
    (pod.plan / "go").touch()
    for process in processes:
        result = finished(process)
        assert result.returncode == 0, result.stderr
    assert pod.starts(0) == pod.starts(1) == 1


def test_another_command_is_not_started_beside_it(pod):
    pod.plans("after go 0", "after go 0")
    first = pod.pod()
    wait_for(pod.plan / "started-1-1")
    result = finished(pod.pod("--config=configs/other.py"))
    assert result.returncode == 2
    assert "clip runs another command; STOP=1" in result.stderr
    (pod.plan / "go").touch()
    assert finished(first).returncode == 0
    assert pod.starts(0) == 1


def test_script_that_died_between_two_starts(pod):
    """Worker 0 runs, worker 1 never heard of it: the second script brings it there."""
    pod.plans("after go 0", "after go 0")
    pod.goes_wrong("unreachable", 1)
    pod.goes_wrong("state", "READY")
    for worker in range(2):
        pod.home(worker).mkdir()
        pod.git("checkout-index", "-a", f"--prefix={pod.home(worker) / 'protoclip_jax'}/")
        (pod.home(worker) / "protoclip_jax.venv" / "bin").mkdir(parents=True)
        (pod.home(worker) / "protoclip_jax.venv" / "bin" / "python").symlink_to(pod.python)
    digest = subprocess.run(
        ["bash", "-c", "printf ' %q' \"$@\" | cksum | cut -d ' ' -f 1", "x", *ARGUMENTS],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    subprocess.run(
        ["bash", "protoclip_jax/launch/worker.sh", "start", f"{digest}-1-0", "--distributed"],
        cwd=pod.home(0),
        env=pod.environment
        | {"HOME": str(pod.home(0)), "TPU_WORKER_ID": "0", "VENV": "../protoclip_jax.venv"},
        check=True,
    )
    (pod.cloud / "unreachable").unlink()
    process = pod.pod()
    wait_for(pod.plan / "started-1-1")
    (pod.plan / "go").touch()
    assert finished(process).returncode == 0
    assert pod.starts(0) == pod.starts(1) == 1


def test_ctrl_c_leaves_the_run_alone(pod):
    pod.plans("after go 0", "after go 0")
    process = pod.pod()
    wait_for(pod.plan / "started-1-1")
    wait_until(lambda: len(pod.calls("ssh", "follow")) >= 1)
    os.killpg(process.pid, signal.SIGINT)
    result = finished(process)
    assert result.returncode == 130
    assert "goes on by itself" in result.stderr
    assert not pod.signals(0)
    (pod.plan / "go").touch()
    assert finished(pod.pod()).returncode == 0


def test_stop(pod):
    """The run saves and leaves; who follows it does not start it again."""
    pod.plans("wait, 0", "wait, 0")
    process = pod.pod()
    pod.wait_for_start(0, 1)
    stopping = finished(pod.pod(STOP=1))
    assert stopping.returncode == 0, stopping.stderr
    assert finished(process).returncode == 75
    assert pod.signals(0) == pod.signals(1) == ["TERM"]
    assert pod.starts(0) == pod.starts(1) == 1
    assert finished(pod.pod()).returncode == 0  # the same command goes on
    assert pod.starts(0) == 2


def test_stop_without_a_slice(pod):
    result = finished(pod.pod(STOP=1))
    assert result.returncode == 2
    assert "nothing to stop" in result.stderr
    assert not pod.calls("create")


@pytest.mark.parametrize("state", ["PREEMPTED", "TERMINATED", None])
def test_preempted_slice_is_made_anew(pod, state):
    """Its workers are gone, with all that was on them."""
    pod.plans("deaf, 0", "deaf, 0")
    process = pod.pod(SPOT=1)
    pod.wait_for_start(0, 1)
    leaders = [int((pod.run_folders(worker)[0] / "leader").read_text()) for worker in range(2)]
    (pod.cloud / "state").unlink() if state is None else pod.goes_wrong("state", state)
    for leader in leaders:
        os.killpg(leader, signal.SIGKILL)
    result = finished(process)
    assert result.returncode == 0, result.stderr
    assert f"clip is {state or 'gone'}" in result.stderr
    assert pod.starts(0) == pod.starts(1) == 2
    creates = pod.calls("create")
    assert len(creates) == 2
    assert all(call.endswith("--spot --zone=z") for call in creates)
    assert len(pod.calls("delete")) == (state is not None)


def test_machine_that_was_restarted(pod):
    """No exit code, and nothing runs there: the run starts again, on the same slice."""
    pod.plans("76, 0", "deaf, 0")
    process = pod.pod()
    pod.wait_for_start(1)
    leader = int((pod.run_folders(1)[0] / "leader").read_text())
    os.killpg(leader, signal.SIGKILL)
    result = finished(process)
    assert result.returncode == 0, result.stderr
    assert pod.starts(0) == pod.starts(1) == 2
    assert len(pod.calls("create")) == 1


def test_worker_that_does_not_leave_is_ended(pod):
    pod.plans("76, 0", "deaf, 0")
    result = finished(pod.pod(GRACE=1))
    assert result.returncode == 0, result.stderr
    assert "some workers still run 1 s after another failed" in result.stderr
    assert pod.starts(0) == pod.starts(1) == 2


def test_children_of_a_killed_process_do_not_live_on(pod):
    pod.plans("76, 0", "child 137, 0")
    assert finished(pod.pod()).returncode == 0
    assert not alive(int((pod.plan / "child-1-1").read_text()))


def test_no_capacity_at_first(pod):
    pod.goes_wrong("create-fails", 3)
    result = finished(pod.pod())
    assert result.returncode == 0, result.stderr
    assert len(pod.calls("create")) == 4


def test_no_capacity_is_given_up(pod):
    pod.goes_wrong("create-fails", 99)
    result = finished(pod.pod(TRIES=2))
    assert result.returncode == 1
    assert len(pod.calls("create")) == 3
    assert "there is no slice" in result.stderr


def test_slice_is_not_made_where_it_cannot_be_asked(pod):
    """No answer is not the answer that there is none."""
    pod.goes_wrong("offline", 3)
    assert finished(pod.pod()).returncode == 0
    assert len(pod.calls("create")) == 1
    assert not pod.calls("delete")


@pytest.mark.parametrize("state", ["REPAIRING", "CREATING"])
def test_slice_that_is_not_ready_yet_is_waited_for(pod, state):
    pod.goes_wrong("state", state)
    for worker in range(2):
        pod.home(worker).mkdir()
    process = pod.pod(TRIES=1000)
    wait_until(lambda: len(pod.calls("list")) >= 2)
    pod.goes_wrong("state", "READY")
    assert finished(process).returncode == 0
    assert not pod.calls("delete")
    assert not pod.calls("create")


def test_stopped_slice_is_left_alone(pod):
    pod.goes_wrong("state", "STOPPED")
    result = finished(pod.pod())
    assert result.returncode == 2
    assert "tpu-vm start clip" in result.stderr


@pytest.mark.parametrize("what", [{"FAKE_PIP": 1}, {"FAKE_OLD_PYTHON": 1}])
def test_failed_install_starts_nothing_and_is_told(pod, what):
    result = finished(pod.pod(**what))
    assert result.returncode == 2
    assert pod.starts(0) == pod.starts(1) == 0
    assert "worker 1 said at last:" in result.stderr
    said = "pip says what is wrong" if "FAKE_PIP" in what else "is no Python 3.11 or later"
    assert said in result.stderr
    assert "could not be installed" in result.stderr


def test_worker_that_cannot_be_reached_starts_nothing(pod):
    pod.goes_wrong("state", "READY")
    for worker in range(2):
        pod.home(worker).mkdir()
    pod.goes_wrong("unreachable", 1)
    result = finished(pod.pod(TRIES=2))
    assert result.returncode == 2
    assert pod.starts(0) == 0
    assert "cannot be reached" in result.stderr


def test_setup_runs_before_the_install(pod):
    setup = "echo mounted > mounted && test ! -e protoclip_jax.venv"
    assert finished(pod.pod(SETUP=setup)).returncode == 0
    assert (pod.home(1) / "mounted").read_text() == "mounted\n"


def packed(pod) -> list[str]:
    (file,) = pod.home(0).glob("*.tar.gz")
    with tarfile.open(file) as archive:
        return sorted(archive.getnames())


def test_only_what_git_tracks_is_copied(pod):
    for name in ("runs/x/log", ".venv/bin/python", "data/1.jpg", "protoclip_jax/notes.py"):
        path = pod.checkout / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (pod.checkout / "protoclip_jax" / "gone.py").touch()
    pod.git("add", "protoclip_jax/gone.py")
    (pod.checkout / "protoclip_jax" / "gone.py").unlink()
    (pod.checkout / "protoclip_jax" / "main.py").write_text("edited = True\n")
    result = finished(pod.pod())
    assert result.returncode == 0, result.stderr
    names = packed(pod)
    assert {"configs/a b.py", "launch/worker.sh", "protoclip_jax/main.py"} <= set(names)
    assert not [name for name in names if name.startswith((".venv", "runs", "data", ".git/"))]
    assert not {"protoclip_jax/notes.py", "protoclip_jax/gone.py"} & set(names)
    assert "git does not track it: protoclip_jax/notes.py" in result.stderr
    main = pod.home(1) / "protoclip_jax" / "protoclip_jax" / "main.py"
    assert main.read_text() == "edited = True\n"


def test_recipe_that_git_does_not_track_is_refused(pod):
    (pod.checkout / "configs" / "mine.py").touch()
    result = finished(pod.pod("--config=configs/mine.py", "--workdir=/mnt/x"))
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "tpu_pod.sh: configs/mine.py is not copied, since git does not track it: "
        "git add configs/mine.py"
    ]
    assert not pod.calls("list")


def test_without_git_the_projects_folders_are_copied(pod):
    subprocess.run(["rm", "-rf", ".git"], cwd=pod.checkout, check=True)
    for name in ("runs/x/log", ".venv/bin/python", "data/1.jpg", "protoclip_jax/__pycache__/a.pyc"):
        path = pod.checkout / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    result = finished(pod.pod())
    assert result.returncode == 0, result.stderr
    assert "no git checkout" in result.stderr
    names = packed(pod)
    assert {"configs/a b.py", "launch/worker.sh", "requirements.txt"} <= set(names)
    assert not [n for n in names if n.startswith((".venv", "runs", "data")) or "pycache" in n]


def test_what_starts_again_is_the_same_code(pod):
    """The checkout is edited while the run is on."""
    pod.plans("after go 76, 0", "after go 76, 0")
    main = pod.checkout / "protoclip_jax" / "main.py"
    main.write_text("first = True\n")
    process = pod.pod()
    wait_for(pod.plan / "started-1-1")
    main.write_text("half edi")
    (pod.plan / "go").touch()
    assert finished(process).returncode == 0
    assert pod.starts(1) == 2
    there = pod.home(1) / "protoclip_jax" / "protoclip_jax" / "main.py"
    assert there.read_text() == "first = True\n"


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("v4-32", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-32", "v2-alpha-tpuv5"),
        ("v6e-16", "v2-alpha-tpuv6e"),
    ],
)
def test_dry_run_shows_the_commands(pod, kind, version):
    """Without asking gcloud."""
    (pod.bin / "gcloud").write_text("#!/bin/sh\nexit 1\n")
    result = finished(pod.pod("--config=configs/a b.py", TYPE=kind, SPOT=1, DRY_RUN=1))
    assert result.returncode == 0, result.stderr
    create, copy, install, train = result.stdout.splitlines()
    assert f"tpu-vm create clip --accelerator-type={kind} --version={version} --spot" in create
    assert " scp " in copy
    assert "worker.sh\\ install" in install
    assert "--worker=all" in train
    assert "--distributed" in train
    assert "configs/a" in train


@pytest.mark.parametrize("missing", ["NAME", "ZONE", "TYPE"])
def test_asks_for_what_it_lacks(pod, missing):
    del pod.environment[missing]
    result = finished(pod.pod())
    assert result.returncode == 2
    assert result.stderr.startswith(f"tpu_pod.sh: {missing}=... is missing")
    assert len(result.stderr.splitlines()) == 1
