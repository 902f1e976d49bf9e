"""launch/slurm.sbatch under a Slurm of shell scripts: two nodes, one task each."""

import os
import signal

import pytest
from launch_hosts import EXIT_CODES, LAUNCH, SLURM, Slurm, finished, other, wait_for


@pytest.fixture
def slurm(tmp_path):
    return Slurm(tmp_path)


@pytest.mark.parametrize(("code", "again"), EXIT_CODES.items())
def test_exit_codes(slurm, code, again):
    slurm.plans(other(code), f"{code}, 0")
    result = finished(slurm.submit())
    assert result.returncode == code, result.stderr
    assert slurm.queued_again() == again
    if again:
        assert finished(slurm.submit(restart=1)).returncode == 0
        assert not slurm.queued_again()
    assert slurm.starts(0) == slurm.starts(1) == 1 + again


@pytest.mark.parametrize(
    ("codes", "decides", "again"),
    [((1, 76), 1, False), ((137, 2), 2, False), ((130, 137), 130, False), ((76, 137), 137, True)],
)
def test_the_smaller_code_may_decide(slurm, codes, decides, again):
    """srun ends with the largest."""
    slurm.plans(*codes)
    result = finished(slurm.submit())
    assert result.returncode == decides, result.stderr
    assert slurm.queued_again() == again


def test_codes_of_an_earlier_start_do_not_count(slurm):
    """Slurm's numbers come again one day, and a killed script leaves its files."""
    old = slurm.checkout / ".cache" / "slurm" / "77.0"
    old.mkdir(parents=True)
    (old / "exit-5").write_text("1\n")
    slurm.plans("76", "76")
    assert finished(slurm.submit()).returncode == 76
    assert slurm.queued_again()
    assert not old.exists()


def test_without_a_place_for_codes_the_largest_decides(slurm):
    (slurm.checkout / ".cache").write_text("no folder\n")
    slurm.plans("1", "76")
    result = finished(slurm.submit())
    assert result.returncode == 76
    assert "the largest exit code decides" in result.stderr


def test_restarts_are_bounded_by_slurms_count(slurm):
    slurm.plans("76", "137")
    result = finished(slurm.submit(restart=4, RESTARTS=4))
    assert result.returncode == 137
    assert not slurm.queued_again()
    assert "gave up after 4 restarts" in result.stderr


def test_signal_is_handed_on_once_and_the_job_goes_on(slurm):
    """Two minutes before the end Slurm signals the batch script alone."""
    slurm.plans("wait, 0", "wait, 0")
    process = slurm.submit()
    slurm.wait_for_start(0, 1)
    process.send_signal(signal.SIGTERM)
    wait_for(slurm.plan / "signals-0-1")
    process.send_signal(signal.SIGTERM)  # and when it is preempted in these minutes
    result = finished(process)
    assert result.returncode == 75, result.stderr
    assert slurm.signals(0) == slurm.signals(1) == ["TERM"]
    # Not --full: that signals srun, which kills its tasks, and this script, which would go on so.
    assert slurm.calls("scancel") == ["scancel --signal=TERM 77"]
    assert "forcing job termination" not in result.stderr
    assert slurm.queued_again()


def test_signal_to_the_tasks_themselves(slurm):
    """Preemption signals everything: a second SIGTERM changes nothing."""
    slurm.plans("wait, 0", "wait, 0")
    process = slurm.submit()
    slurm.wait_for_start(0, 1)
    for task in (slurm.state / "tasks").read_text().split():
        os.kill(int(task), signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    result = finished(process)
    assert result.returncode == 75, result.stderr
    assert slurm.queued_again()


def test_scancel_is_tried_again(slurm):
    slurm.plans("wait", "wait")
    (slurm.state / "scancel-fails").touch()
    process = slurm.submit()
    slurm.wait_for_start(0, 1)
    process.send_signal(signal.SIGTERM)
    result = finished(process)
    assert result.returncode == 75
    assert "scancel failed (try 1 of 3)" in result.stderr


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING"])
def test_cancelled_job_stays_cancelled(slurm, state):
    slurm.plans("75", "75")
    (slurm.state / "state").write_text(state)
    result = finished(slurm.submit())
    assert result.returncode == 75
    assert not slurm.queued_again()
    assert "not queued again" in result.stderr


def test_command(slurm):
    arguments = ["--config=a b.py", "--workdir=runs/x", "--config.x='$HOME' \"*\"", ""]
    assert finished(slurm.submit(*arguments)).returncode == 0
    folder, *told = slurm.told(1)
    assert (folder, told) == (str(slurm.checkout), arguments)
    (call,) = slurm.calls("srun")
    assert " --kill-on-bad-exit=0 --wait=600 --cpus-per-task=64 bash " in call


@pytest.mark.parametrize("where", ["checkout", "elsewhere"])
def test_where_it_is_submitted(slurm, tmp_path, where):
    folder = slurm.checkout if where == "checkout" else tmp_path / "else where"
    folder.mkdir(exist_ok=True)
    script = str(slurm.checkout / "launch" / "slurm.sbatch").replace(" ", "_")
    # Slurm ends the path of the script at a blank.
    (tmp_path / "check_out").symlink_to(slurm.checkout)
    result = finished(slurm.submit(SLURM_SUBMIT_DIR=folder, FAKE_SCRIPT=script, folder=folder))
    assert result.returncode == 0, result.stderr
    assert slurm.told(0)[0] in (str(slurm.checkout), str(tmp_path / "check_out"))


def test_submission_that_names_no_checkout(slurm, tmp_path):
    options = {"SLURM_SUBMIT_DIR": tmp_path, "FAKE_SCRIPT": "/none/launch/slurm.sbatch"}
    result = finished(slurm.submit(folder=tmp_path, **options))
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "sbatch launch/slurm.sbatch" in result.stderr
    assert not (slurm.state / "calls").read_text().count("srun")


def test_missing_environment_is_told(slurm):
    del slurm.environment["PYTHON"]
    result = finished(slurm.submit())
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert ".venv/bin/python is missing" in result.stderr
    assert not slurm.queued_again()


def test_dry_run_shows_the_command(slurm, tmp_path):
    for name in SLURM:
        del slurm.environment[name]
    script = LAUNCH / "slurm.sbatch"
    result = slurm.run("bash", script, "--config=a b.py", DRY_RUN=1, folder=tmp_path)
    assert result.returncode == 0
    assert result.stdout.split()[:1] == ["srun"]
    assert r"-m protoclip_jax.main --config=a\ b.py" in result.stdout


def test_one_task_a_node():
    """A task drives all GPUs of its node, and the script alone gets the signal, in time to save."""
    head = (LAUNCH / "slurm.sbatch").read_text()
    lines = [line.split()[1] for line in head.splitlines() if line.startswith("#SBATCH")]
    assert {"--ntasks-per-node=1", "--signal=B:TERM@120", "--requeue"} <= set(lines)
