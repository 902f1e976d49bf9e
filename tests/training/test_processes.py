"""Two processes of two devices over loopback, as two machines, against one process of four.

The second process sees another boot id, by which XLA tells machines apart: its devices are those of
another host. That needs root and `unshare`; without them both processes are of one machine.
"""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from tiny_run import SMALL, metrics, untimed, write_pairs

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


def start_two(
    pairs: Path,
    out: Path,
    settings: dict,
    *,
    devices: tuple[int, int] = (2, 2),
    second: dict | None = None,
    other_file: tuple[Path, Path] | None = None,
    **environment,
) -> list[subprocess.Popen]:
    """Two processes on two machines; their logs are out/0.log and out/1.log.

    Args:
        pairs: the list.
        out: folder of logs and workdir.
        settings: options of both.
        devices: of each.
        second: options that the second process has otherwise.
        other_file: a file, and what the second machine has in its place.
        environment: variables of both.
    """
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
        own = settings | ((second or {}) if index else {})
        arguments = command(pairs, out, devices[index], own) + flags
        if index:
            arguments = on_another_machine(arguments, out, other_file)
        started.append(start(arguments, out / f"{index}.log", **environment))
    return started


def on_another_machine(
    arguments: list[str], out: Path, other_file: tuple[Path, Path] | None
) -> list[str]:
    """The command as another machine would run it."""
    if os.geteuid() or shutil.which("unshare") is None:
        assert other_file is None, "another machine's files need root and unshare"
        return arguments
    boot = out / "boot_id"
    boot.write_text("11111111-2222-3333-4444-555555555555\n")
    mounts = [(boot, "/proc/sys/kernel/random/boot_id")]
    if other_file:
        mounts.append((other_file[1], other_file[0]))
    lines = [shlex.join(["mount", "--bind", str(real), str(place)]) for real, place in mounts]
    lines.append("exec " + shlex.join(arguments))
    return ["unshare", "-m", "bash", "-c", " && ".join(lines)]


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


def run_two(pairs, out: Path, settings: dict, **options) -> None:
    logs = [out / "0.log", out / "1.log"]
    codes = finish(start_two(pairs, out, settings, **options), logs, 400)
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


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[Path, dict, Path]:
    """A list and settings, and what one process makes of them: ten steps of a tiny ViT."""
    folder = tmp_path_factory.mktemp("alone")
    pairs = write_pairs(folder / "data", 40)
    settings = {"data.teacher": teacher(folder, 40)}
    run_one(pairs, folder / "one", settings)
    return pairs, settings, folder / "one"


@pytest.mark.slow
def test_two_processes_equal_one(alone, tmp_path):
    """Tiny ViT, ten steps of two episodes: parameters, metrics, labels."""
    pairs, settings, one = alone
    run_two(pairs, tmp_path / "two", settings)
    assert_same_run(one, tmp_path / "two", 10)
    assert_same_labels(one, tmp_path / "two", 1)
    # DIST-05: every process has the same parameters, at the start and after each episode.
    hashes = [(tmp_path / "two" / f"hashes-{index}.txt").read_text() for index in range(2)]
    assert hashes[0] == hashes[1]
    assert len(set(hashes[0].splitlines())) == 3
    # One process tells the story and writes the files.
    assert "episode 2/2" in (tmp_path / "two" / "0.log").read_text()
    assert "episode 2/2" not in (tmp_path / "two" / "1.log").read_text()
    assert "4 x cpu: 2 processes on" in (tmp_path / "two" / "0.log").read_text()


@pytest.mark.slow
def test_two_processes_equal_one_with_batch_norm_uneven_data_and_broken_pictures(tmp_path):
    """Tiny ResNet, three steps of 13 rows (DIST-01); then with pictures that cannot be read.

    The devices of the two processes alternate on the mesh, as on most TPU slices.
    """
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
    run_two(pairs, tmp_path / "two", settings, TINY_ORDER="0,2,1,3")
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
    # One total over both, not that of the first.
    episode = [line for line in metrics(workdir) if "data/unreadable" in line]
    assert [(line["data/unreadable"], line["data/left_out"]) for line in episode] == [(5, 0)]


@pytest.mark.slow
def test_run_with_cut_parameters_equals_one_without(alone, tmp_path):
    """The command with mesh.fsdp: extraction, prototypes, training, checkpoints.

    Two devices of different hosts share a copy of the parameters.
    """
    pairs, settings, one = alone
    run_two(pairs, tmp_path / "cut", settings | {"mesh.fsdp": "2"}, TINY_ORDER="3,0,2,1")
    assert_same_run(one, tmp_path / "cut", 10)
    assert_same_labels(one, tmp_path / "cut", 1)


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


def said(log: Path) -> list[str]:
    """The lines that are ours."""
    return [line for line in log.read_text().splitlines() if line.startswith("protoclip_jax: ")]


@pytest.mark.slow
def test_failure_of_one_process_ends_all_within_a_minute(tmp_path):
    pairs = write_pairs(tmp_path / "data", 40)
    settings = {"data.teacher": teacher(tmp_path, 40), "episode.warmup": "0"}
    out = tmp_path / "two"
    started = start_two(pairs, out, settings, TINY_FAULT="1:the disk of this host is gone")
    logs = [out / "0.log", out / "1.log"]
    wait_until(lambda: started[1].poll() is not None, 300)
    codes = finish(started, logs, 60)
    assert codes == [1, 1]  # starting again would not help
    for log in logs:
        assert "the disk of this host is gone" in log.read_text()


def wait_until(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)


def lines_of(out: Path) -> int:
    path = out / "run" / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "number"),
    [(0, signal.SIGKILL), (1, signal.SIGKILL), (0, signal.SIGSTOP)],
    ids=["process 0 killed", "process 1 killed", "process 0 silent"],
)
def test_lost_process_ends_the_others_to_start_again(tmp_path, victim, number):
    """Within a minute, in one line, with the code that means: start again. No worker stays."""
    pairs = write_pairs(tmp_path / "data", 40)
    settings = {
        "data.teacher": teacher(tmp_path, 40),
        "episode.count": "400",
        "data.workers": "1",
        "optimizer.warmup_steps": "2",
    }
    out, logs = tmp_path / "two", [tmp_path / "two" / f"{index}.log" for index in range(2)]
    started = start_two(pairs, out, settings)
    wait_until(lambda: lines_of(out) > 3, 300)
    assert lines_of(out) > 3, logs[0].read_text()
    workers = [
        child for one in started for child in psutil.Process(one.pid).children(recursive=True)
    ]
    assert len(workers) >= 2
    started[victim].send_signal(number)
    survivor = 1 - victim
    begin = time.monotonic()
    code = finish([started[survivor]], [logs[survivor]], 60)
    seconds = time.monotonic() - begin
    started[victim].kill()
    started[victim].wait()
    assert code == [76], logs[survivor].read_text()
    assert seconds < 60
    last = said(logs[survivor])
    assert f"process {victim} on " in last[-1]
    assert "was lost" in last[-1]
    assert "the same command goes on from the last checkpoint" in last[-1]
    assert "Traceback" not in logs[survivor].read_text()
    assert "stack trace" not in logs[survivor].read_text()
    wait_until(lambda: not any(worker.is_running() for worker in workers), 10)
    assert not [worker for worker in workers if worker.is_running()]


@pytest.mark.slow
def test_processes_that_differ_are_refused_before_the_first_step(tmp_path):
    """DIST-09: another list, another recipe, another number of devices, another workdir."""
    pairs = write_pairs(tmp_path / "data", 40)
    lines = pairs.read_text().splitlines()
    other = tmp_path / "other.tsv"
    other.write_text("\n".join([lines[0], *lines[:0:-1]]) + "\n")
    settings = {"data.teacher": teacher(tmp_path, 40)}

    def refused(name: str, **options) -> str:
        out = tmp_path / name
        logs = [out / "0.log", out / "1.log"]
        codes = finish(start_two(pairs, out, settings, **options), logs, 200)
        assert codes == [2, 2], "\n".join(log.read_text() for log in logs)
        assert not (out / "run" / "metrics.jsonl").exists()
        texts = [log.read_text() for log in logs]
        assert not any("Traceback" in text for text in texts)
        return texts[0]

    text = refused("list", other_file=(pairs, other))
    assert "source: process 0 has" in text
    text = refused("recipe", second={"optimizer.learning_rate": "0.1"})
    assert "config.optimizer.learning_rate: process 0 has 0.0005; process 1 has 0.1" in text
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "folder" / "run").mkdir(parents=True)
    text = refused("folder", other_file=(tmp_path / "folder" / "run", tmp_path / "elsewhere"))
    assert "is not one folder for all processes: process 0 on" in text
    text = refused("devices", devices=(2, 1))
    assert 'process 0 has "2 x cpu"; process 1 has "1 x cpu"' in text


@pytest.mark.slow
def test_checkpoint_is_passed_over_by_all_processes_or_by_none(tmp_path):
    pairs = write_pairs(tmp_path / "data", 40)
    out, logs = tmp_path / "two", [tmp_path / "two" / f"{index}.log" for index in range(2)]
    settings = {"data.teacher": teacher(tmp_path, 40), "checkpoint.keep": "5"}
    run_two(pairs, out, settings)
    codes = finish(start_two(pairs, out, settings, TINY_UNREADABLE="1"), logs, 200)
    assert codes == [1, 1]
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
    # Where all is saved and the main thread is busy for long (a slow machine compiles), the process
    # that was asked ends by itself, and the other one is told to start again: nothing is lost.
    assert codes in ([75, 75], [76, 75]), "\n".join(log.read_text()[-3000:] for log in logs)
    run_two(pairs, out, settings)
    assert "Going on after step" in logs[0].read_text()
    assert_same_run(tmp_path / "one", out, 20)
