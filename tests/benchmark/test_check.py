"""`check`: parts that fail, hang or lack a package are told; the table; a whole small run."""

import argparse
import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from protoclip_jax.benchmark import (
    check,
    check_part,
    check_plan,
    check_runner,
    check_table,
)
from protoclip_jax.benchmark.__main__ import main

ROOT = Path(__file__).parents[2]

# Stands for check_part.py: what it does depends on the part's name; NOTES is a folder.
FAKE_PART = """
import json, os, pathlib, subprocess, sys, time
name, result = sys.argv[1:]
notes = pathlib.Path(os.environ["NOTES"])
(notes / f"{name}.started").write_text(repr(time.monotonic()))
told = sys.stdin.readline()
if not told:
    sys.exit(1)
began = time.monotonic()
(notes / f"{name}.told").write_text(told)

def write(numbers, failure=None):
    pathlib.Path(result).write_text(json.dumps({"numbers": numbers, "failure": failure}))

machine = json.loads(os.environ["MACHINE"])
write({"so far": 1})
print("a line of", name, flush=True)
if name == "kmeans":
    write({"so far": 2}, "planted: centroids are wrong")
    sys.exit(1)
if name == "step-RN50":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (notes / "child").write_text(str(child.pid))
    time.sleep(60)
if name == "step-ViT-B-16":
    os.kill(os.getpid(), 11)
if name == "episode":
    sys.exit(3)
if "quickstart" in name or name == "tests":
    time.sleep(0.5)
write(machine if name == "devices" else {"part": name})
(notes / f"{name}.times").write_text(json.dumps([began, time.monotonic()]))
"""


# What `devices` finds.
MACHINE = {
    "cpu": "A CPU",
    "cores": 2,
    "memory_gb": 25,
    "platform": "cpu",
    "device": "NVIDIA H100 80GB HBM3",
    "devices": 3,
    "jax": "0.11.2",
    "python": "3.12.3",
    "load": 0.5,
    "kinds": {"NVIDIA H100 80GB HBM3": 3},
    "device_gb": 73.4,
    "driver": ["NVIDIA H100 80GB HBM3, 580.159.04, 81559 MiB"],
    "runtime": "PJRT C API cuda 13000",
    "versions": {"jax": "0.11.2", "flax": "0.12.9", "grain": None, "python": "3.12.3"},
    "commit": "c3a1f04",
    "missing": ["grain", "clu"],
}


@pytest.fixture
def fake_parts(tmp_path, monkeypatch):
    """Runs FAKE_PART for every part; returns the folder of its notes."""
    script = tmp_path / "part.py"
    script.write_text(FAKE_PART)
    monkeypatch.setattr(check_runner, "COMMAND", (sys.executable, str(script)))
    monkeypatch.setenv("NOTES", str(tmp_path))
    monkeypatch.setenv("MACHINE", json.dumps(MACHINE))
    return tmp_path


def outcomes_of(names, tmp_path, *, minutes=6.0, small=False):
    one = check.Check(minutes, small, False)
    found = one.run([check_plan.part_named(name) for name in names], tmp_path)
    return one, found


def is_gone(pid: int) -> bool:
    """Whether a process has ended; a zombie nobody waits for counts."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


def test_each_way_to_fail_is_told_and_the_others_run(fake_parts, monkeypatch):
    slow = [
        part if part.name != "step-RN50" else check_plan.Part("step-RN50", "", 1.0)
        for part in check_plan.PARTS
    ]
    monkeypatch.setattr(check_plan, "PARTS", tuple(slow))
    names = ["kmeans", "step-RN50", "step-ViT-B-32", "step-ViT-B-16", "episode"]
    _, found = outcomes_of(names, fake_parts)
    told = {name: (outcome.status, outcome.reason) for name, outcome in found.items()}
    assert told == {
        "devices": ("done", None),
        "kmeans": ("failed", "planted: centroids are wrong"),
        "step-RN50": ("timed out", "ended after 1 s"),
        "step-ViT-B-32": ("done", None),
        "step-ViT-B-16": ("failed", "its process ended with signal SIGSEGV"),
        "episode": ("failed", "its process ended with exit code 3"),
    }
    # What a part had found before its end is kept.
    assert found["kmeans"].numbers == {"so far": 2}
    assert found["step-RN50"].numbers == {"so far": 1}
    assert found["step-ViT-B-32"].numbers == {"part": "step-ViT-B-32"}
    assert found["step-RN50"].log == ["a line of step-RN50"]
    assert found["step-ViT-B-32"].log == []
    assert 1 <= found["step-RN50"].seconds < 10
    # With all that it started.
    child = int((fake_parts / "child").read_text())
    deadline = time.monotonic() + 10
    while not is_gone(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert is_gone(child)

    numbers = check.assembled(found, True, 6.0, 12.0)
    assert numbers["failed"] == ["kmeans", "step-RN50", "step-ViT-B-16", "episode"]
    assert check.CheckReport(numbers).code == 1
    last = check_table.text(numbers).splitlines()[-1]
    assert last == "FAILED: kmeans, step-RN50, step-ViT-B-16, episode; 12 s of at most 360"


@pytest.mark.usefixtures("fake_parts")
@pytest.mark.parametrize(
    ("parts", "code"), [("step-ViT-B-32,kmeans", 1), ("step-ViT-B-32", 0), ("episode", 1)]
)
def test_exit_code_of_the_command(parts, code, capsys, tmp_path):
    out = tmp_path / "new folder" / "check.json"
    assert main(["check", f"--parts={parts}", f"--out={out}"]) == code
    printed = capsys.readouterr()
    line = printed.out.splitlines()[0]
    assert json.loads(line) == json.loads(out.read_text())
    assert ("FAILED: " in printed.out) == bool(code)
    assert "step-ViT-B-32 done" in printed.err or parts == "episode"


def test_what_finds_no_time_is_skipped(fake_parts):
    one, found = outcomes_of(["kmeans", "step-ViT-B-32"], fake_parts, minutes=0.01)
    assert {outcome.status for outcome in found.values()} == {"skipped"}
    assert not (fake_parts / "kmeans.told").exists()
    numbers = check.assembled(found, one.small, 0.01, 1.0)
    assert numbers["skipped"] == ["devices", "kmeans", "step-ViT-B-32"]
    assert check.CheckReport(numbers).code == 0
    text = check_table.text(numbers)
    assert "kmeans skipped: no time is left of --minutes=0.01" in text
    assert text.splitlines()[-1] == "All that ran is right; 1 s of at most 1"


def told_to(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.told").read_text())


def test_time_of_a_part_grows_with_the_minutes(fake_parts):
    outcomes_of(["step-ViT-B-32"], fake_parts, minutes=18.0)
    assert told_to(fake_parts, "step-ViT-B-32")["seconds"] == 3 * 75
    assert told_to(fake_parts, "step-ViT-B-32")["argument"] == "ViT-B-32"
    outcomes_of(["step-ViT-B-32"], fake_parts, minutes=0.5)
    assert told_to(fake_parts, "step-ViT-B-32")["seconds"] == 75 / 12


@pytest.mark.parametrize(
    ("platform", "asked", "small"),
    [("cpu", False, True), ("gpu", False, False), ("gpu", True, True), ("tpu", False, False)],
)
def test_sizes_are_small_without_an_accelerator(fake_parts, monkeypatch, platform, asked, small):
    monkeypatch.setenv("MACHINE", json.dumps(MACHINE | {"platform": platform}))
    one, _ = outcomes_of(["step-ViT-B-32"], fake_parts, small=asked)
    assert one.small == told_to(fake_parts, "step-ViT-B-32")["small"] == small


ORDER = ["step-ViT-B-32", "tests", "quickstart-float32"]


def times(folder: Path, name: str) -> tuple[float, float]:
    return tuple(json.loads((folder / f"{name}.times").read_text()))


def test_on_a_gpu_what_is_not_timed_runs_side_by_side(fake_parts, monkeypatch):
    monkeypatch.setenv("MACHINE", json.dumps(MACHINE | {"platform": "gpu", "cores": 16}))
    _, found = outcomes_of(ORDER, fake_parts)
    assert list(found) == ["devices", *ORDER]
    tests, phases, timed = (times(fake_parts, name) for name in (*ORDER[1:], ORDER[0]))
    assert max(tests[0], phases[0]) < min(tests[1], phases[1])
    assert timed[0] >= max(tests[1], phases[1])
    # Its process is there before, waiting.
    started = float((fake_parts / f"{ORDER[0]}.started").read_text())
    assert started < min(tests[1], phases[1])


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_elsewhere_one_part_runs_at_a_time(fake_parts, monkeypatch, platform):
    monkeypatch.setenv("MACHINE", json.dumps(MACHINE | {"platform": platform}))
    outcomes_of(ORDER, fake_parts)
    spans = [times(fake_parts, name) for name in ORDER]
    for before, after in itertools.pairwise(spans):
        assert before[1] <= after[0]
    started = float((fake_parts / f"{ORDER[1]}.started").read_text())
    assert started >= spans[0][1]  # too few cores to start the next one early


@pytest.mark.parametrize("timed", [True, False])
def test_memory_of_a_gpu(tmp_path, monkeypatch, timed):
    script = tmp_path / "part.py"
    script.write_text(
        "import json, os, pathlib, sys; sys.stdin.readline(); pathlib.Path(sys.argv[2])"
        ".write_text(json.dumps({'numbers': dict(os.environ), 'failure': None}))"
    )
    monkeypatch.setattr(check_runner, "COMMAND", (sys.executable, str(script)))
    process = check_runner.Process(check_plan.Part("x", "", 1.0, timed=timed), tmp_path)
    process.go(check_plan.Settings("", True, False, 20.0))
    given = process.wait().numbers
    assert given.get("XLA_PYTHON_CLIENT_MEM_FRACTION") == ("0.92" if timed else None)
    assert given.get("XLA_PYTHON_CLIENT_PREALLOCATE") == (None if timed else "false")


def test_a_signal_ends_the_parts_too(fake_parts):
    """The whole command, as `kill` ends it while a part sleeps."""
    command = (
        "import sys; from protoclip_jax.benchmark import check_runner, __main__ as m; "
        f"check_runner.COMMAND = (sys.executable, {str(fake_parts / 'part.py')!r}); "
        "sys.exit(m.main(['check', '--parts=step-RN50']))"
    )
    process = subprocess.Popen([sys.executable, "-c", command], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (fake_parts / "child").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert is_gone(int((fake_parts / "child").read_text()))


def test_a_part_ends_with_the_one_that_started_it(tmp_path):
    """Its parent is killed without a word: the pipe to it closes."""
    process = check_runner.Process(check_plan.part_named("devices"), tmp_path)
    process._process.stdin.close()
    assert process._process.wait(timeout=60) == 1
    assert not (tmp_path / "devices.json").exists()


def test_missing_package_is_named(tmp_path, monkeypatch):
    """As on a machine with JAX and little else."""
    (tmp_path / "ml_collections.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'ml_collections'\", name='ml_collections')"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = check_runner.Process(check_plan.part_named("quickstart-float32"), tmp_path)
    process.go(check_plan.Settings("float32", True, False, 60.0))
    found = process.wait()
    assert (found.status, found.reason) == (
        "failed",
        "needs ml_collections, which is not installed",
    )
    assert "ModuleNotFoundError" in found.log[-1]


def test_reasons_are_one_line():
    said = check_part.reason
    assert said(check_plan.PartFailure("2 of 9 fail")) == "2 of 9 fail"
    assert said(ValueError("first\nsecond")) == "ValueError: first"
    assert said(MemoryError()) == "MemoryError"
    assert said(ModuleNotFoundError("No module named 'grain.x'", name="grain.x")) == (
        "needs grain, which is not installed"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts=kmeans,steps"], "the check has no part steps"),
        (["--minutes=0"], "0: a number of minutes above 0"),
        (["--minutes=nan"], "nan: a number of minutes"),
        (["--smal"], "check has no option --smal"),
    ],
)
def test_wrong_use(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["check", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_part_named_twice_runs_once():
    parser = argparse.ArgumentParser()
    check.add_arguments(parser)
    parts = parser.parse_args(["--parts=kmeans,episode,kmeans"]).parts
    assert [part.name for part in parts] == ["kmeans", "episode"]
    assert [part.name for part in parser.parse_args([]).parts] == [
        part.name for part in check_plan.PARTS
    ]
