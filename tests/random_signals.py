"""A training run of two processes under random signals, started again until it ends.

  python tests/random_signals.py --minutes 30 --seed 0

SIGTERM, SIGINT, SIGKILL, and SIGSTOP with SIGCONT after a while come at random moments, from the
first second on, to one process, to both, or to a process and its workers. Both processes are
started again as the table of exit codes says (protoclip_jax/main.py), until the run ends; then the
parameters must be those of an undisturbed run, bit for bit. Runs follow one another until the time
is over. Prints what was sent and seen as JSON; exits with 1 where anything was not as documented.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny_run import SMALL, write_pairs  # noqa: E402 (found from here on)

AGAIN = (75, 76, 130, -signal.SIGKILL)  # codes after which the same command is started again
BY_DEFAULT = (-signal.SIGTERM, -signal.SIGINT)  # before Python runs the first line
FIRST_LINE = 5.0  # seconds in which it does, on a busy machine
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGSTOP)
WEIGHTS = (3, 3, 2, 2)
WITHIN = 90.0  # seconds in which a process ends after another one of its run
ASKED = 45.0  # and after a scheduler's SIGTERM to what is left
SETTINGS = SMALL | {
    "model.batch_norm_group": "none",
    "optimizer.clip_norm": "none",
    "episode.warmup": "1",
    "episode.locked": "1",
    "episode.redos": "1",
    "data.augmentation": "light",
    "data.workers": "1",
    "objective.external": "1",
    "checkpoint.minutes": "0",  # after every step: signals meet saves
}


@dataclasses.dataclass
class Seen:
    """What was sent, and what came of it."""

    signals: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    codes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    starts: int = 0
    runs: int = 0
    asked: int = 0  # processes that were left over and got a scheduler's SIGTERM
    faults: list[str] = dataclasses.field(default_factory=list)


class Run:
    """One or two processes over one workdir."""

    def __init__(self, folder: Path, pairs: Path, episodes: int, count: int = 2):
        self.folder, self._count = folder, count
        settings = SETTINGS | {
            "data.train": pairs,
            "data.teacher": pairs.parent / "teacher.npy",
            "episode.count": episodes,
        }
        self._command = [
            sys.executable,
            str(ROOT / "tests" / "tiny_process.py"),
            "1",
            str(folder / "out"),
            f"--config={ROOT / 'configs' / 'cc3m.py'}",
            f"--workdir={folder / 'run'}",
            *(f"--config.{name}={value}" for name, value in settings.items()),
        ]
        self.processes: list[subprocess.Popen] = []
        self.began = 0.0
        self.early = False  # whether a signal came before the first line may have run
        folder.mkdir(parents=True)

    def start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.began, self.processes, self.early = time.monotonic(), [], False
        for index in range(self._count):
            flags = [f"--num_processes={self._count}"]
            if self._count > 1:
                flags += [f"--coordinator=127.0.0.1:{port}", f"--process_id={index}"]
            with (self.folder / f"{index}.log").open("w") as log:
                self.processes.append(
                    subprocess.Popen(
                        [*self._command, *flags],
                        stdout=log,
                        stderr=log,
                        cwd=ROOT,
                        start_new_session=True,
                    )
                )

    def newest(self) -> int:
        checkpoints = self.folder / "run" / "checkpoints"
        names = [path.name for path in checkpoints.iterdir()] if checkpoints.exists() else []
        return max([int(name) for name in names if name.isdecimal()], default=0)

    def running(self) -> list[subprocess.Popen]:
        return [process for process in self.processes if process.poll() is None]

    def tail(self) -> str:
        logs = (self.folder / f"{index}.log" for index in range(self._count))
        return "\n".join(log.read_text()[-1500:] for log in logs)

    def end(self) -> None:
        """Ends what is left, workers included."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def state(self) -> dict[str, np.ndarray]:
        with np.load(self.folder / "out" / "state.npz") as file:
            return dict(file)


def written(folder: Path) -> Path:
    """A list of pairs, and a teacher beside it."""
    pairs = write_pairs(folder)
    rows = np.random.default_rng(1).normal(size=(40, 5)).astype(np.float32)
    np.save(pairs.parent / "teacher.npy", rows)
    return pairs


def send(run: Run, chance: random.Random, seen: Seen) -> list[tuple[float, int]]:
    """A random signal to one or both; what is to be woken, and when."""
    number = chance.choices(SIGNALS, WEIGHTS)[0]
    alive = run.running()
    chosen = alive if chance.random() < 0.3 else [chance.choice(alive)]
    group = chance.random() < 0.5  # as Ctrl-C in a terminal does
    run.early |= time.monotonic() - run.began < FIRST_LINE
    wake = []
    for process in chosen:
        seen.signals[number.name] += 1
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(process.pid, number)
        if number == signal.SIGSTOP:
            wake.append((time.monotonic() + chance.uniform(0.2, 45), process.pid))
    return wake


def disturb(run: Run, chance: random.Random, until: float, seen: Seen) -> None:
    """Signals to a started run until a process ends, or the time is over."""
    before, wake = run.newest(), []
    # In one start of three from the first second on; else the run gets somewhere first.
    early = chance.random() < 1 / 3
    due = time.monotonic() + chance.uniform(0, 30)
    while len(run.running()) == 2 and (time.monotonic() < until or wake):
        now = time.monotonic()
        for moment, pid in [one for one in wake if one[0] <= now]:
            wake.remove((moment, pid))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGCONT)
        if not early and run.newest() <= before and now - run.began < 240:
            due = now + chance.uniform(0, 6)
        elif now >= due and now < until:
            wake += send(run, chance, seen)
            due = now + chance.uniform(0, 10)
        time.sleep(0.01)
    for _, pid in wake:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGCONT)


def ended(run: Run, seen: Seen, seconds: float = 3600) -> list[int]:
    """Exit codes of both, as soon as both have ended."""
    end = time.monotonic() + seconds
    while len(run.running()) == 2 and time.monotonic() < end:
        time.sleep(0.05)
    end = time.monotonic() + WITHIN
    while run.running() and time.monotonic() < end:
        time.sleep(0.05)
    for process in run.running():  # it waits for one that was lost before it joined
        seen.asked += 1
        process.terminate()
    end = time.monotonic() + ASKED
    while run.running() and time.monotonic() < end:
        time.sleep(0.05)
    if run.running():
        seen.faults.append(f"hang: {[p.poll() for p in run.processes]}\n{run.tail()}")
    codes = [process.poll() for process in run.processes]
    workers = [
        child
        for process in run.running()
        for child in psutil.Process(process.pid).children(recursive=True)
    ]
    run.end()
    psutil.wait_procs(workers, timeout=5)
    seen.codes.update(str(code) for code in codes)
    return codes


def check(run: Run, codes: list[int], seen: Seen) -> bool:
    """Whether the run is to be started again; notes codes that are in no table."""
    allowed = AGAIN + (BY_DEFAULT if run.early else ())
    wrong = [code for code in codes if code != 0 and code not in allowed]
    if wrong:
        seen.faults.append(f"exit codes {codes}:\n{run.tail()}")
    return any(codes) and not wrong


def disturbed(run: Run, chance: random.Random, until: float, seen: Seen) -> bool:
    """Starts a run again and again until it ends; whether it did."""
    seen.runs += 1
    for number in range(1000):
        run.start()
        seen.starts += 1
        if time.monotonic() < until:
            disturb(run, chance, until, seen)
        codes = ended(run, seen)
        print(
            f"start {number}: {time.monotonic() - run.began:.0f} s, codes {codes}, "
            f"checkpoint {run.newest()}",
            file=sys.stderr,
            flush=True,
        )
        if not check(run, codes, seen):
            return codes == [0, 0]
    return False


def differing(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> list[str]:
    """Names of arrays that are not the same, bit for bit."""
    names = sorted(one.keys() | two.keys())
    return [n for n in names if n not in one or n not in two or not np.array_equal(one[n], two[n])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=24, help="of three steps each")
    parser.add_argument("--folder", type=Path, help="where to work; kept (default: a new one)")
    chosen = parser.parse_args()
    folder = chosen.folder or Path(tempfile.mkdtemp(prefix="random_signals_"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    pairs = written(folder / "data")
    seen, chance, equal = Seen(), random.Random(chosen.seed), []
    whole = Run(folder / "whole", pairs, chosen.episodes)
    whole.start()
    if ended(whole, Seen()) != [0, 0]:
        print(f"the undisturbed run failed:\n{whole.tail()}", file=sys.stderr)
        return 1
    begin = time.monotonic()
    until = begin + 60 * chosen.minutes
    while time.monotonic() < until and not seen.faults:
        run = Run(folder / f"run{seen.runs}", pairs, chosen.episodes)
        if disturbed(run, chance, until, seen):
            different = differing(whole.state(), run.state())
            equal.append(not different)
            if different:
                seen.faults.append(f"{run.folder}: other numbers: {different[:5]}")
    table = {
        "minutes": round((time.monotonic() - begin) / 60, 1),
        "seed": chosen.seed,
        "signals": dict(seen.signals),
        "exit_codes": dict(seen.codes),
        "runs": seen.runs,
        "restarts": seen.starts - seen.runs,
        "asked_to_end": seen.asked,
        "faults": seen.faults,
        "result": "equal" if equal and all(equal) and not seen.faults else "not equal",
    }
    print(json.dumps(table, indent=1))
    return 0 if table["result"] == "equal" else 1


if __name__ == "__main__":
    sys.exit(main())
