"""Two processes of two devices over loopback against one process of four."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_run import SMALL, metrics, untimed, write_pairs

from protoclip_jax.config import ConfigError

ROOT = Path(__file__).parents[2]
RECIPE = SMALL | {
    "model.batch_norm_group": "none",
    "optimizer.clip_norm": "none",
    "optimizer.epsilon": "1e-2",
    "episode.locked": "0",
    "episode.redos": "1",
    "episode.size": "40",
    "episode.count": "2",
    "episode.warmup": "1",
    "episode.prototypes": "5",
    "optimizer.batch": "8",
    "data.augmentation": "light",
    "objective.external": "1",
    "log.every": "1",
}
# float32 sums over devices in another order. With an epsilon above the rounding of vanishing
# gradients, Adam does not turn that rounding into whole steps.
CLOSE = {"rtol": 1e-3, "atol": 1e-5}


def command(pairs: Path, out: Path, devices: int, settings: dict) -> list[str]:
    options = RECIPE | {"data.train": str(pairs)} | settings
    return [
        sys.executable,
        str(ROOT / "tests" / "tiny_process.py"),
        str(devices),
        str(out),
        f"--config={ROOT / 'configs' / 'cc3m.py'}",
        f"--workdir={out / 'run'}",
        *(f"--config.{name}={value}" for name, value in options.items()),
    ]


def start(arguments: list[str], log: Path, **environment) -> subprocess.Popen:
    env = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"} | environment
    with log.open("w") as file:
        return subprocess.Popen(arguments, stdout=file, stderr=file, env=env, cwd=ROOT)


def start_two(pairs: Path, out: Path, settings: dict, **environment) -> list[subprocess.Popen]:
    """Two processes of two devices; their logs are out/0.log and out/1.log."""
    out.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for index in range(2):
        environment["PYTHONHASHSEED"] = str(index + 1)  # no order may depend on it
        flags = [
            f"--coordinator=127.0.0.1:{port}",
            "--num_processes=2",
            f"--process_id={index}",
        ]
        arguments = command(pairs, out, 2, settings) + flags
        started.append(start(arguments, out / f"{index}.log", **environment))
    return started


def finish(started: list[subprocess.Popen], logs: list[Path], seconds: float) -> list[int]:
    """Exit codes; what still runs after the time is killed, and the test fails."""
    end = time.monotonic() + seconds
    try:
        return [one.wait(max(1.0, end - time.monotonic())) for one in started]
    except subprocess.TimeoutExpired:
        tails = "\n".join(log.read_text()[-2000:] for log in logs)
        pytest.fail(f"not over after {seconds} s:\n{tails}")
    finally:
        for one in started:
            if one.poll() is None:
                one.kill()
                one.wait()


def run_one(pairs: Path, out: Path, settings: dict) -> None:
    out.mkdir(parents=True)
    process = start(command(pairs, out, 4, settings), out / "0.log")
    assert finish([process], [out / "0.log"], 400) == [0], (out / "0.log").read_text()[-3000:]


def run_two(pairs, out: Path, settings: dict) -> None:
    logs = [out / "0.log", out / "1.log"]
    codes = finish(start_two(pairs, out, settings), logs, 400)
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)


def teacher(folder: Path, rows: int) -> Path:
    path = folder / "teacher.npy"
    np.save(path, np.random.default_rng(1).normal(size=(rows, 5)).astype(np.float32))
    return path


def assert_same_run(one: Path, two: Path, steps: int) -> None:
    states = [np.load(out / "state.npz") for out in (one, two)]
    assert states[0].files == states[1].files
    for name in states[0].files:
        np.testing.assert_allclose(states[1][name], states[0][name], **CLOSE, err_msg=name)
    lines = [[untimed(line) for line in metrics(out / "run")] for out in (one, two)]
    assert lines[0][-1]["step"] == steps
    for left, right in zip(*lines, strict=True):
        assert left.keys() == right.keys()
        assert left.pop("phase") == right.pop("phase")
        for name in left:
            if not name.startswith(("clusters/", "accuracy", "train/accuracy")):
                assert right[name] == pytest.approx(left[name], rel=1e-3, abs=1e-5), name


def assert_same_labels(one: Path, two: Path, episode: int) -> None:
    """Where the nearest centroid is nearer than the second by more than 1e-4."""
    left, right = (np.load(out / f"labels-{episode}.npz") for out in (one, two))
    for name in ("image", "text"):
        distances = np.linalg.norm(left[name][:, None] - left[f"{name}_centroids"][None], axis=2)
        nearest = np.sort(distances, axis=1)
        clear = nearest[:, 1] - nearest[:, 0] > 1e-4
        assert np.mean(clear) > 0.5
        labels = [found[f"{name}_labels"] for found in (left, right)]
        np.testing.assert_array_equal(labels[1][clear], labels[0][clear])
    # The teacher's rows are the same numbers: so are their labels.
    np.testing.assert_array_equal(right["external_labels"], left["external_labels"])


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Tiny ViT, ten steps of two episodes: parameters, metrics, labels."""
    pairs = write_pairs(tmp_path / "data", 40)
    settings = {"data.teacher": teacher(tmp_path, 40)}
    run_one(pairs, tmp_path / "one", settings)
    run_two(pairs, tmp_path / "two", settings)
    assert_same_run(tmp_path / "one", tmp_path / "two", 10)
    assert_same_labels(tmp_path / "one", tmp_path / "two", 1)
    # DIST-05: every process has the same parameters, at the start and after each episode.
    hashes = [(tmp_path / "two" / f"hashes-{index}.txt").read_text() for index in range(2)]
    assert hashes[0] == hashes[1]
    assert len(set(hashes[0].splitlines())) == 3
    # One process tells the story and writes the files.
    assert "episode 2/2" in (tmp_path / "two" / "0.log").read_text()
    assert "episode 2/2" not in (tmp_path / "two" / "1.log").read_text()


@pytest.mark.slow
def test_two_processes_equal_one_with_batch_norm_uneven_data_and_broken_pictures(tmp_path):
    """Tiny ResNet, three steps of 13 rows (DIST-01); then with pictures that cannot be read."""
    pairs = write_pairs(tmp_path / "data", 13)
    settings = {
        "model.name": "test-rn",
        "episode.size": "13",
        "episode.count": "1",
        "episode.warmup": "0",
        "optimizer.batch": "4",
        "data.teacher": teacher(tmp_path, 13),
    }
    run_one(pairs, tmp_path / "one", settings)
    run_two(pairs, tmp_path / "two", settings)
    assert_same_run(tmp_path / "one", tmp_path / "two", 3)
    for row in (3, 4, 5, 6, 7):
        (tmp_path / "data" / f"{row}.png").write_bytes(b"broken")
    run_two(pairs, tmp_path / "broken", settings)
    workdir = tmp_path / "broken" / "run"
    listed = [
        line.split("\t")[0]
        for name in ("unreadable.tsv", "unreadable.1.tsv")
        if (workdir / name).exists()
        for line in (workdir / name).read_text().splitlines()
    ]
    assert set(listed) == {"3", "4", "5", "6", "7"}


@pytest.mark.slow
def test_run_with_cut_parameters_equals_one_without(tmp_path):
    """The command with mesh.fsdp: extraction, prototypes, training, checkpoints."""
    pairs = write_pairs(tmp_path / "data", 40)
    settings = {"data.teacher": teacher(tmp_path, 40)}
    run_one(pairs, tmp_path / "whole", settings)
    run_one(pairs, tmp_path / "cut", settings | {"mesh.fsdp": "2"})
    assert_same_run(tmp_path / "whole", tmp_path / "cut", 10)


@pytest.mark.slow
def test_evaluation_of_two_processes_equals_that_of_one(tmp_path):
    """Each decodes and encodes its half of the pictures; process 0 measures and writes."""
    pairs = write_pairs(tmp_path / "data", 16)
    settings = {
        "data.teacher": teacher(tmp_path, 16),
        "episode.size": "16",
        "episode.count": "1",
        "episode.warmup": "1",
        "optimizer.warmup_steps": "1",
        "evaluation.suite": "emoji_text",
    }
    run_one(pairs, tmp_path / "one", settings)
    run_two(pairs, tmp_path / "two", settings)
    tables = []
    for name in ("one", "two"):
        lines = metrics(tmp_path / name / "run")
        tables.append([line for line in lines if "zero_shot/top1" in line])
    assert [line["step"] for line in tables[0]] == [0, 2]
    for number, (one, two) in enumerate(zip(*tables, strict=True)):
        assert one.keys() == two.keys()
        left, right = (
            np.load(tmp_path / name / f"features-{number}.npz") for name in ("one", "two")
        )
        assert len(left.files) == 6
        # Row by row; the second evaluation is of parameters that are CLOSE themselves.
        bound = {"atol": 1e-5} if number == 0 else CLOSE
        for name in left.files:
            np.testing.assert_allclose(right[name], left[name], **bound, err_msg=name)
        for name in one:
            if name.startswith("geometry/"):
                assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name
    decoded = [int((tmp_path / "two" / f"decoded-{index}.txt").read_text()) for index in range(2)]
    whole = int((tmp_path / "one" / "decoded-0.txt").read_text())
    assert sum(decoded) == whole
    assert 0.4 * whole < decoded[0] < 0.6 * whole
    logs = [(tmp_path / "two" / f"{index}.log").read_text() for index in range(2)]
    assert ["Zero-shot classification" in log for log in logs] == [True, False]


@pytest.mark.slow
def test_failure_of_one_process_ends_all_within_a_minute(tmp_path):
    pairs = write_pairs(tmp_path / "data", 40)
    settings = {"data.teacher": teacher(tmp_path, 40), "episode.warmup": "0"}
    out = tmp_path / "two"
    started = start_two(pairs, out, settings, TINY_FAULT="1:the disk of this host is gone")
    logs = [out / "0.log", out / "1.log"]
    with contextlib.suppress(subprocess.TimeoutExpired):
        started[1].wait(300)
    codes = finish(started, logs, 60)
    assert all(code != 0 for code in codes)
    for log in logs:
        assert "the disk of this host is gone" in log.read_text()


@pytest.mark.slow
def test_checkpoint_is_passed_over_by_all_processes_or_by_none(tmp_path):
    pairs = write_pairs(tmp_path / "data", 40)
    out, logs = tmp_path / "two", [tmp_path / "two" / f"{index}.log" for index in range(2)]
    settings = {"data.teacher": teacher(tmp_path, 40), "checkpoint.keep": "5"}
    run_two(pairs, out, settings)
    codes = finish(start_two(pairs, out, settings, TINY_UNREADABLE="1"), logs, 200)
    assert all(code != 0 for code in codes)
    for log in logs:
        assert "10 cannot be read by this process, though others can" in log.read_text()
    codes = finish(start_two(pairs, out, settings, TINY_UNREADABLE="0,1"), logs, 200)
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    assert "checkpoints/10 cannot be read: passed over" in logs[0].read_text()
    assert "Going on after step 5 of 10" in logs[0].read_text()


@pytest.mark.slow
def test_signal_to_one_process_saves_and_all_go_on_together(tmp_path):
    pairs = write_pairs(tmp_path / "data", 40)
    settings = {"data.teacher": teacher(tmp_path, 40), "episode.count": "4"}
    run_one(pairs, tmp_path / "one", settings)
    out, logs = tmp_path / "two", [tmp_path / "two" / "0.log", tmp_path / "two" / "1.log"]
    started = start_two(pairs, out, settings)
    lines, end = out / "run" / "metrics.jsonl", time.monotonic() + 300
    while time.monotonic() < end and not (lines.exists() and lines.read_text().count("\n") > 2):
        time.sleep(0.02)
    started[1].send_signal(signal.SIGTERM)
    codes = finish(started, logs, 120)
    assert codes == [75, 75], "\n".join(log.read_text()[-3000:] for log in logs)
    run_two(pairs, out, settings)
    assert "Going on after step" in logs[0].read_text()
    assert_same_run(tmp_path / "one", out, 20)


def test_environment_of_clusters():
    assert not processes.in_cluster({})
    assert not processes.in_cluster({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
    assert not processes.in_cluster({"SLURM_NTASKS": "4"})  # an allocation, not a task of it
    assert processes.in_cluster({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"})
    assert processes.in_cluster({"OMPI_COMM_WORLD_SIZE": "2"})
    assert processes.in_cluster({"TPU_WORKER_HOSTNAMES": "a,b"})
    assert not processes.in_cluster({"TPU_WORKER_HOSTNAMES": "a"})


def test_flags_of_several_processes_go_together():
    with pytest.raises(ConfigError, match="go together"):
        processes.join("127.0.0.1:1", None, 0)
