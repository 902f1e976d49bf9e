"""Machines for the launch scripts: a checkout, a trainer that does as planned, and fake commands.

The scripts are the real ones and really start processes; what is made up is in `launch/hosts`.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
HOSTS = Path(__file__).parent / "launch" / "hosts"


def readme_codes() -> dict[int, bool]:
    """The README's table of exit codes: codes, ..., and at last "Start again": yes or no."""
    table, found = False, {}
    for line in (ROOT / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            table = False
        elif cells[0] == "Exit code":
            table = True
            assert cells[-1] == "Start again"
        elif table and cells[0][0].isdigit():
            assert cells[-1] in ("yes", "no"), line
            found |= {int(code): cells[-1] == "yes" for code in cells[0].split(",")}
    return found


# Exit code of a process -> whether the launchers start again.
EXIT_CODES = readme_codes()


def other(code: int) -> int:
    """What the other process of a run leaves with, where one left with this code."""
    return code if code in (0, 1, 2, 75) else 76


def environment(**changes) -> dict[str, str]:
    """The environment less what the machine that runs the tests may have set."""
    ours = ("SLURM_", "JAX_", "XLA_", "PORT", "PYTHON", "RESTARTS", "VENV", "RUNS")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | {name: str(value) for name, value in changes.items()}


class Machine:
    """A checkout with the stand-in for the trainer, and what its processes are to do."""

    def __init__(self, folder: Path):
        self.folder, self.checkout, self.plan = folder, folder / "check out", folder / "plan"
        self.bin, self.python = folder / "bin", HOSTS / "python"
        for path in (
            self.checkout / "protoclip_jax",
            self.checkout / "configs",
            self.plan,
            self.bin,
        ):
            path.mkdir(parents=True)
        shutil.copytree(LAUNCH, self.checkout / "launch")
        (self.checkout / "protoclip_jax" / "main.py").touch()
        (self.checkout / "requirements.txt").touch()
        self.environment = environment(
            PLAN=self.plan, PYTHON=self.python, PATH=f"{self.bin}:{os.environ['PATH']}"
        )

    def plans(self, *processes: str) -> None:
        """What each process does, start by start, with commas between: words of `hosts/python`."""
        for process, starts in enumerate(processes):
            lines = [word.strip() for word in str(starts).split(",")]
            (self.plan / f"plan-{process}").write_text("\n".join(lines) + "\n")

    def start(self, *command, folder: Path | None = None, **changes) -> subprocess.Popen:
        return subprocess.Popen(
            [str(word) for word in command],
            cwd=folder or self.checkout,
            env=self.environment | {name: str(value) for name, value in changes.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *command, **options) -> subprocess.CompletedProcess:
        return finished(self.start(*command, **options))

    def starts(self, process: int) -> int:
        return len(list(self.plan.glob(f"started-{process}-*")))

    def told(self, process: int, start: int = 1) -> list[str]:
        """The folder and the arguments of a start."""
        return (self.plan / f"started-{process}-{start}").read_text().splitlines()

    def signals(self, process: int, start: int = 1) -> list[str]:
        file = self.plan / f"signals-{process}-{start}"
        return file.read_text().split() if file.exists() else []

    def wait_for_start(self, *processes: int, start: int = 1) -> None:
        for process in processes:
            # It says so once its handlers are there or a moment before: see `settle`.
            wait_for(self.plan / f"started-{process}-{start}")
        time.sleep(0.15)


def wait_for(path: Path, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.02)


def finished(process: subprocess.Popen, seconds: float = 60) -> subprocess.CompletedProcess:
    """Waits for a launcher; ends it, and what it started, where it does not end by itself."""
    try:
        out, error = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, error = process.communicate()
        raise AssertionError(f"it did not end; it said:\n{out}\n{error}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def alive(number: int) -> bool:
    """Whether there is a process of this number that is more than a zombie."""
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def python_command(path: Path, *, module_arguments: str = '"$@"') -> Path:
    """A command that is the Python of these tests, wherever it is called."""
    path.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" {module_arguments}\n')
    path.chmod(0o755)
    return path
