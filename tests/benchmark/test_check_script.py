"""launch/check.sh: its packages, its Python, its exit code; and a whole small run."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from protoclip_jax.benchmark import check_phases
from protoclip_jax.benchmark.check_plan import PARTS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "check.sh"
# Runs Python, but not the check: that one shows what it was given, and ends with 7.
WRAPPER = f"""#!/bin/sh
if [ "$2" = protoclip_jax.benchmark ]; then
  echo "arguments: $*"
  echo "path: $PYTHONPATH"
  [ -z "$PYTHONPATH" ] || ls "${{PYTHONPATH%%:*}}"
  [ -z "$WAITS" ] || {{ touch "$WAITS"; sleep 30 & wait; }}
  exit 7
fi
exec {sys.executable} "$@"
"""


def wheel(folder: Path, name: str, version: str = "1.0") -> None:
    """A package of one module, as a file."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": f"VERSION = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in files) + f"{info}/RECORD,,\n"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
        archive.writestr(f"{info}/RECORD", record)


@pytest.fixture
def environment(tmp_path):
    """Of a run with the wrapper for a Python, and a temporary folder of its own."""
    python = tmp_path / "python"
    python.write_text(WRAPPER)
    python.chmod(0o755)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    names = {"PYTHON": python, "TMPDIR": temporary, "OUT": tmp_path / "out"}
    found = os.environ | {name: str(value) for name, value in names.items()}
    return {name: value for name, value in found.items() if name != "PYTHONPATH"}


def run(environment: dict, *arguments: str, **changes) -> subprocess.CompletedProcess:
    env = environment | {name: str(value) for name, value in changes.items()}
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def test_arguments_and_exit_code_pass_through(environment, tmp_path):
    found = run(environment, "--small", "--minutes", "2", WHEELS=tmp_path / "none")
    assert found.returncode == 7
    assert found.stdout.splitlines() == [
        f"arguments: -m protoclip_jax.benchmark check --out {tmp_path}/out/check.json --small "
        "--minutes 2",
        "path: ",
    ]


def test_what_is_missing_is_installed_from_the_wheels(environment, tmp_path):
    wheels = tmp_path / "the wheels"
    wheel(wheels, "first_probe", "0.9")
    wheel(wheels, "second_probe")
    wheel(wheels, "numpy", "99.0")  # there is one: it stays
    found = run(environment, WHEELS=wheels, PYTHONPATH="/elsewhere")
    assert found.returncode == 7, found.stderr
    listed = found.stdout.splitlines()
    assert listed[1].startswith(f"path: {tmp_path}/temporary/")
    assert listed[1].endswith(":/elsewhere")
    assert {name for name in listed[2:] if name.endswith(".py")} == {
        "first_probe.py",
        "second_probe.py",
    }
    assert not list((tmp_path / "temporary").iterdir())


def test_wheels_that_do_not_fit_are_told(environment, tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "probe-1.0-cp36-cp36m-win32.whl").write_bytes(b"")
    found = run(environment, WHEELS=tmp_path / "wheels")
    assert found.returncode == 2
    assert "do not fit Python 3." in found.stderr
    assert "arguments:" not in found.stdout


def test_a_signal_reaches_the_check_and_the_packages_go(environment, tmp_path):
    wheel(tmp_path / "wheels", "probe")
    waits = tmp_path / "waits"
    env = environment | {"WHEELS": str(tmp_path / "wheels"), "WAITS": str(waits)}
    process = subprocess.Popen(["bash", str(SCRIPT)], env=env, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not waits.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 128 + signal.SIGTERM
    assert not list((tmp_path / "temporary").iterdir())


def test_an_old_python_is_refused(environment, tmp_path):
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    found = run(environment, PYTHON=old)
    assert found.returncode == 2
    assert "Python 3.11 or later" in found.stderr


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict:
    """The numbers of a whole small run, as it prints and writes them."""
    out = tmp_path_factory.mktemp("check")
    # One device, as most machines have.
    given = {
        "XLA_FLAGS": "",
        "PYTHON": sys.executable,
        "OUT": str(out),
        "WHEELS": str(out / "none"),
    }
    result = subprocess.run(
        ["bash", str(SCRIPT), "--minutes=40", "--profile"],
        env=os.environ | {name: str(value) for name, value in given.items()},
        capture_output=True,
        text=True,
        timeout=2500,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    line, _, table = result.stdout.partition("\n")
    numbers = json.loads(line)
    assert json.loads((out / "check.json").read_text()) == numbers
    return numbers | {"table": table}


@pytest.mark.slow
def test_a_small_run_has_every_part(small):
    assert small["small"]
    assert list(small["parts"]) == [part.name for part in PARTS]
    assert {part["status"] for part in small["parts"].values()} == {"done"}
    assert small["failed"] == small["skipped"] == []
    assert not any(goal["missed"] for goal in small["goals"])
    assert all(goal["value"] > 0 for goal in small["goals"])
    assert small["seconds"] >= sum(part["seconds"] for part in small["parts"].values())
    for heading in ("Devices ", "Tests ", "Quickstart", "k-means", "A training step", "Episode 2"):
        assert heading in small["table"]
    assert small["table"].splitlines()[-1].startswith("All is right; ")


@pytest.mark.slow
def test_shares_of_a_small_run_are_those_of_its_numbers(small):
    found = {name: part["numbers"] for name, part in small["parts"].items()}
    kmeans = found["kmeans"]
    scores = 2 * 4 * kmeans["n"] * kmeans["k"] * (kmeans["iterations"] + 1)
    rate = scores / kmeans["wall_seconds"] / 1e9
    assert kmeans["bandwidth_share"] == pytest.approx(rate / kmeans["copy_gb_per_second"])
    assert kmeans["ms_for_20"] == pytest.approx(
        20e3 * kmeans["wall_seconds"] / kmeans["iterations"]
    )
    for name in ("step-RN50", "step-ViT-B-32", "step-ViT-B-16"):
        step = found[name]
        assert step["pairs_per_second"] == pytest.approx(1e3 * step["batch"] / step["step_ms"])
        assert step["gflops"] == pytest.approx(1e3 * step["gflop"] / step["step_ms"])
        assert step["flop_use"] == pytest.approx(step["gflops"] / step["matmul_gflops"])
        assert step["peak_use"] is None  # of a CPU no peak is known
        assert step["host_ms"] > 0
        assert str(step["batch"]) in step["search"]["tried"]
        assert sum(step["profile"]["kinds"].values()) == pytest.approx(1)
    episode = found["episode"]
    for what, part in (("extracted", "extract"), ("trained", "train")):
        rate = episode["pairs"] / episode["seconds"][part]
        assert episode[f"{what}_per_second"] == pytest.approx(rate)
    assert 0 <= episode["input_wait_share"] <= 1
    assert episode["episodes"] == 2
    assert episode["host_gb"] > 0.1
    assert episode["device_gb"] is None


@pytest.mark.slow
def test_a_small_run_trains_as_recorded(small):
    for dtype, bounds in check_phases.BOUNDS.items():
        found = small["parts"][f"quickstart-{dtype}"]["numbers"]
        assert len(found["steps"]) == 15
        assert {name: one["bound"] for name, one in found["deviations"].items()} == bounds
        assert set(found["phases"]) == {"warmup", "prototype", "locked"}
    # Bits of bfloat16 that float32 has not: the compute type is the one that was asked for.
    assert found["deviations"]["first loss"]["deviation"] > 1e-6
    assert small["parts"]["tests"]["numbers"]["passed"] >= 5
