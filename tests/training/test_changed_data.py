"""A run whose data is written anew ends with one line and exit code 1."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from tiny_run import SMALL, write_pairs

from protoclip_jax import main
from protoclip_jax.data.seen_files import SourceChanged, SourceError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", [SourceChanged, SourceError])
def test_the_error_is_a_line_and_code_1(kind, capsys):
    assert main._told(kind("pairs.tsv has changed")) == 1
    assert capsys.readouterr().err == "protoclip_jax: pairs.tsv has changed\n"


def test_another_fault_of_a_file_is_ours(capsys):
    assert main._told(OSError("no line for users")) is None


def shorter(path: Path) -> None:
    """As LIST-04: it was a bus error."""
    path.write_text("filepath\ttitle\n0.png\tnew\n")


def other_numbers(path: Path) -> None:
    np.save(path, np.load(path)[::-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fault"),
    [("pairs.tsv", shorter), ("teacher.npy", other_numbers)],
    ids=["list", "teacher"],
)
def test_a_run_with_workers_ends(name, fault, tmp_path):
    data, out, log = tmp_path / "data", tmp_path / "out", tmp_path / "log"
    write_pairs(data)
    np.save(data / "teacher.npy", np.random.default_rng(1).normal(size=(40, 5)))
    options = SMALL | {
        "data.train": str(data / "pairs.tsv"),
        "data.teacher": str(data / "teacher.npy"),
        "data.workers": "2",
        "data.keep": "none",
        "objective.external": "1",
        "model.batch_norm_group": "none",
        "optimizer.clip_norm": "none",
        "episode.count": "4000",
        "episode.warmup": "1",
        "episode.locked": "0",
        "episode.redos": "1",
        "checkpoint.every": "1000",
    }
    command = [
        sys.executable,
        str(ROOT / "tests" / "tiny_process.py"),
        "1",
        str(out),
        f"--config={ROOT / 'configs' / 'cc3m.py'}",
        f"--workdir={out / 'run'}",
        *(f"--config.{option}={value}" for option, value in options.items()),
    ]
    with log.open("w") as file:
        process = subprocess.Popen(command, stderr=file, cwd=ROOT, start_new_session=True)
    try:
        lines, end = out / "run" / "metrics.jsonl", time.monotonic() + 240
        while process.poll() is None and time.monotonic() < end:
            if lines.exists() and lines.read_text().count('"clusters/') >= 1:
                break
            time.sleep(0.05)
        assert process.poll() is None, log.read_text()[-3000:]
        workers = psutil.Process(process.pid).children(recursive=True)
        fault(data / name)
        assert process.wait(120) == 1, log.read_text()[-3000:]
        assert not psutil.wait_procs(workers, timeout=20)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    told = log.read_text()
    assert "Traceback" not in told
    assert f"protoclip_jax: {data / name} has changed under the run (" in told
    assert len(workers) >= 2
