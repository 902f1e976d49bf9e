"""Machines for the launch scripts: a checkout, a trainer that does as planned, and fake commands.

The scripts are the real ones and really start processes; what is made up is in `launch/hosts`.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

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


# What a batch script of two nodes finds in its environment.
SLURM = {
    "SLURM_JOB_ID": 77,
    "SLURM_NTASKS": 2,
    "SLURM_JOB_NUM_NODES": 2,
    "SLURM_NTASKS_PER_NODE": 1,
    "SLURM_CPUS_PER_TASK": 64,
}


class Slurm(Machine):
    """Runs the batch script as Slurm does: a copy of it, in the folder of the submission."""

    def __init__(self, folder):
        super().__init__(folder)
        self.state = folder / "slurm"
        (self.state / "spool").mkdir(parents=True)
        for command in ("srun", "scancel", "scontrol"):
            (self.bin / command).symlink_to(HOSTS / command)
        self.spooled = self.state / "spool" / "slurm_script"
        shutil.copy(self.checkout / "launch" / "slurm.sbatch", self.spooled)
        names = {name: str(value) for name, value in SLURM.items()}
        self.environment |= names | {
            "FAKE_SLURM": str(self.state),
            "FAKE_SCRIPT": str(self.checkout / "launch" / "slurm.sbatch"),
            "SLURM_SUBMIT_DIR": str(self.checkout),
        }

    def submit(self, *arguments, restart: int = 0, **options):
        variables = {} if restart == 0 else {"SLURM_RESTART_COUNT": restart}
        process = self.start("bash", self.spooled, *arguments, **variables, **options)
        (self.state / "batch").write_text(str(process.pid))
        return process

    def queued_again(self) -> bool:
        requeued = self.state / "requeued"
        there = requeued.exists()
        requeued.unlink(missing_ok=True)
        return there

    def calls(self, command: str) -> list[str]:
        lines = (self.state / "calls").read_text().splitlines()
        return [line for line in lines if line.split()[0] == command]


ARGUMENTS = ["--config=configs/a b.py", "--workdir=/mnt/runs/x", "--config.x='$HOME' \"*\"", ""]


class Cloud(Machine):
    """A checkout under git, and a slice that does not exist yet."""

    def __init__(self, folder):
        super().__init__(folder)
        self.cloud = folder / "cloud"
        self.cloud.mkdir()
        # The interpreter itself, without the time that site-packages take.
        script = f'#!/bin/sh\nexec "{sys.executable}" -I -S "{HOSTS / "gcloud.py"}" "$@"\n'
        (self.bin / "gcloud").write_text(script)
        (self.bin / "gcloud").chmod(0o755)
        (self.checkout / ".gitignore").write_text("runs/\n.venv*/\n")
        (self.checkout / "configs" / "a b.py").touch()
        self.git("init", "--quiet")
        self.git("add", ".")
        self.environment |= {
            "FAKE_CLOUD": str(self.cloud),
            "NAME": "clip",
            "ZONE": "z",
            "TYPE": "v4-16",
            "PAUSE": "0.05",
            "FOLLOW": "5",
        }

    def git(self, *arguments) -> None:
        subprocess.run(["git", *arguments], cwd=self.checkout, check=True)

    def pod(self, *arguments, **options) -> subprocess.Popen:
        return self.start("bash", "launch/tpu_pod.sh", *(arguments or ARGUMENTS), **options)

    def calls(self, verb: str, word: str = "") -> list[str]:
        file = self.cloud / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        return [line for line in lines if line.split()[0] == verb and word in line]

    def goes_wrong(self, what: str, how: object = "") -> None:
        (self.cloud / what).write_text(str(how))

    def home(self, worker: int):
        return self.cloud / f"worker-{worker}"

    def close(self) -> None:
        """Ends what a failed test left on the workers, where each run is a group of its own."""
        for leader in self.cloud.glob("worker-*/protoclip_jax.runs/*/leader"):
            number = int(leader.read_text())
            if "protoclip_jax" in command_line(number):
                os.killpg(number, signal.SIGKILL)

    def run_folders(self, worker: int) -> list:
        return [
            path for path in (self.home(worker) / "protoclip_jax.runs").iterdir() if path.is_dir()
        ]


def command_line(number: int) -> str:
    try:
        return Path(f"/proc/{number}/cmdline").read_text()
    except OSError:
        return ""


def wait_for(path: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.02)


def finished(process: subprocess.Popen, seconds: float = 120) -> subprocess.CompletedProcess:
    """Waits for a launcher; ends it, and what it started, where it does not end by itself."""
    try:
        out, error = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        for number in [process.pid, *descendants(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        out, error = process.communicate()
        raise AssertionError(f"it did not end; it said:\n{out}\n{error}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def descendants(number: int) -> list[int]:
    return [child.pid for child in psutil.Process(number).children(recursive=True)]


def alive(number: int) -> bool:
    """Whether there is a process of this number that is more than a zombie."""
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
