"""Whole runs with everything in a bucket, by the real command line."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pair_files import write_tar
from tiny_run import SMALL, metrics, untimed, write_pairs
from tiny_run import tiny_models as tiny_models

import protoclip_jax
from protoclip_jax import evaluate

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ROWS, STEPS = 24, 12
RECIPE = SMALL | {
    "model.batch_norm_group": "none",
    "optimizer.clip_norm": "none",
    "optimizer.epsilon": "1e-2",  # processes add in another order: see test_processes
    "episode.redos": "1",
    "episode.count": "4",
    "episode.warmup": "1",
    "episode.locked": "1",
    "objective.external": "1",
    "data.augmentation": "light",
    "checkpoint.keep": "9",
    "checkpoint.minutes": "none",
    "log.every": "1",
}


class Run:
    """A recipe in a workdir, started as often as a test likes."""

    def __init__(
        self, out: Path, workdir: str, train: str, teacher: str, environment: dict, settings=None
    ):
        self.out, self.log = out, out / "log"
        self._workdir, self._environment = workdir, environment
        data = {"data.train": train, "data.teacher": teacher}
        self._settings = RECIPE | data | (settings or {})
        out.mkdir()

    def start(self, *flags: str, devices: int = 2, **environment) -> subprocess.Popen:
        command = [
            sys.executable,
            str(ROOT / "tests" / "tiny_process.py"),
            str(devices),
            str(self.out),
            f"--config={ROOT / 'configs' / 'cc3m.py'}",
            f"--workdir={self._workdir}",
            *(f"--config.{name}={value}" for name, value in self._settings.items()),
            *flags,
        ]
        environment = self._environment | {"TF_CPP_MIN_LOG_LEVEL": "2"} | environment
        with self.log.open("a") as file:
            return subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=ROOT)

    def finish(self, *started: subprocess.Popen) -> list[int]:
        try:
            return [one.wait(300) for one in started]
        finally:
            for one in started:
                one.kill()
                one.wait()

    def told(self) -> str:
        return self.log.read_text()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A list and its pictures, the same pairs in tars, and a teacher."""
    folder = tmp_path_factory.mktemp("data")
    pairs = write_pairs(folder / "list", ROWS)
    broken = folder / "list" / "5.png"
    broken.write_bytes(broken.read_bytes()[:500])
    captions = [line.split("\t")[1] for line in pairs.read_text().splitlines()[1:]]
    for shard in range(2):
        members = {}
        for row in range(shard * ROWS // 2, (shard + 1) * ROWS // 2):
            members[f"{row:05}.png"] = (folder / "list" / f"{row}.png").read_bytes()
            members[f"{row:05}.txt"] = captions[row]
        write_tar(folder / "tars" / f"{shard:05}.tar", members)
    rows = np.random.default_rng(1).normal(size=(ROWS, 5)).astype(np.float32)
    np.save(folder / "teacher.npy", rows)
    return folder


@pytest.fixture(scope="module")
def local(data, tmp_path_factory) -> Path:
    """The unbroken run of one process, all of it in local folders."""
    out = tmp_path_factory.mktemp("local") / "out"
    run = Run(
        out,
        str(out / "run"),
        str(data / "list" / "pairs.tsv"),
        str(data / "teacher.npy"),
        dict(os.environ),
    )
    assert run.finish(run.start("--profile=1:2")) == [0], run.told()[-3000:]
    return out


def fetched(bucket, folder: Path) -> Path:
    bucket.get("run", folder)
    return folder


def visible(folder: Path) -> set[str]:
    """Names of what every run leaves: libraries tell something only where there is trouble."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    return names - {"libraries.log"}


def assert_same_lines(one: Path, two: Path, steps: int, **close) -> None:
    """The same lines of the same steps; those of whole episodes differ where one was stopped."""
    found = []
    for folder in (one, two):
        lines = [untimed(line) for line in metrics(folder)]
        assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
        found.append([line for line in lines if "train/loss/total" in line])
        assert [line["step"] for line in found[-1]] == list(range(1, steps + 1))
        ends = [line["step"] for line in lines if "loss/total" in line]
        assert ends == list(range(3, steps + 1, 3))
    for left, right in zip(*found, strict=True):
        if close:
            assert right["train/loss/total"] == pytest.approx(left["train/loss/total"], **close)
        else:
            assert left == right


def test_run_in_a_bucket_killed_in_a_save_and_stopped_equals_a_local_one(
    bucket, environment, data, local, tmp_path, tiny_models
):
    folder = bucket.put(data)
    workdir = f"{bucket.url}/run"
    run = Run(
        tmp_path / "out",
        workdir,
        f"{folder}/list/pairs.tsv",
        f"{folder}/teacher.npy",
        environment,
    )
    # Killed while the mark that makes the second checkpoint whole is on its way.
    mark = f"{workdir}/checkpoints/6/commit_success.txt".removeprefix("gs://bucket/")
    with bucket.faults({"method": "POST", "contains": mark}):
        process, end = run.start("--profile=1:2"), time.monotonic() + 300
        while time.monotonic() < end and process.poll() is None:
            asked = bucket.requests(mark)  # not those of another test's run
            if any(line.startswith("POST") for line in asked):
                break
            time.sleep(0.05)
        assert process.poll() is None, run.told()[-3000:]
        process.kill()
        process.wait()
    # Stopped in the middle of an episode.
    assert run.finish(run.start(TINY_SIGTERM="8")) == [75], run.told()[-3000:]
    assert "checkpoints/6 was never finished: passed over" in run.told()
    assert "Going on after step 3 of 12" in run.told()
    assert "saved after step 8" in run.told()
    assert run.finish(run.start("--config.data.workers=1")) == [0], run.told()[-3000:]
    assert "Going on after step 8 of 12" in run.told()
    assert "Traceback" not in run.told()
    ours, theirs = (np.load(out / "state.npz") for out in (run.out, local))
    assert ours.files == theirs.files
    for name in theirs.files:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    copy = fetched(bucket, tmp_path / "fetched")
    assert_same_lines(local / "run", copy, STEPS)
    assert visible(copy) == visible(local / "run")
    assert (copy / "unreadable.tsv").read_text().startswith(f"5\t{folder}/list/5.png\t")
    assert len(list((copy / "tensorboard").iterdir())) == 3  # of three starts
    # The model is used from there too.
    captions = ["a picture", "number 3"]
    features = [protoclip_jax.load(path).encode_text(captions) for path in (workdir, local / "run")]
    np.testing.assert_array_equal(*features)
    options = [f"--workdir={workdir}", f"--source={folder}/list/pairs.tsv", "--batch=8"]
    assert evaluate.main(options) == 0
    assert "evaluation.json" in bucket.names("run")


def test_two_processes_share_a_workdir_in_a_bucket(bucket, environment, data, tmp_path):
    """Tars, of which each reads its half; one of them is asked to leave."""
    settings = {"episode.count": "3", "episode.warmup": "3", "episode.locked": "0"}
    settings |= {"objective.external": "0"}
    folder, one, two = bucket.put(data), tmp_path / "one", tmp_path / "two"
    alone = Run(one, str(one / "run"), str(data / "tars"), "none", dict(os.environ), settings)
    assert alone.finish(alone.start()) == [0], alone.told()[-3000:]
    run = Run(two, f"{bucket.url}/run", f"{folder}/tars", "none", environment, settings)
    for stop, code in (("2", 75), ("", 0)):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = [
            run.start(
                f"--coordinator=127.0.0.1:{port}",
                "--num_processes=2",
                f"--process_id={index}",
                devices=1,
                TINY_SIGTERM=stop if index else "",
            )
            for index in range(2)
        ]
        assert run.finish(*started) == [code] * 2, run.told()[-3000:]
    assert "Going on after step 6 of 9" in run.told()
    hashes = [(two / f"hashes-{index}.txt").read_text() for index in range(2)]
    assert hashes[0] == hashes[1]
    ours, theirs = (np.load(out / "state.npz") for out in (two, one))
    for name in theirs.files:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-5, err_msg=name)
    copy = fetched(bucket, tmp_path / "fetched")
    assert_same_lines(one / "run", copy, 9, rel=1e-3)
    listed = [(copy / name).exists() for name in ("unreadable.tsv", "unreadable.1.tsv")]
    assert any(listed)
