"""What is written line by line reaches the bucket, and failures end nothing."""

import time
from pathlib import Path

import pytest

from protoclip_jax.config import Config, LogConfig
from protoclip_jax.storage import mirror, objects, retries
from protoclip_jax.storage.mirror import Mirror
from protoclip_jax.storage.paths import as_path
from protoclip_jax.training.logging import MetricLog, read_metrics


@pytest.fixture(autouse=True)
def _folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "machine_folder", lambda kind: made(tmp_path / kind))


def made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def test_a_local_workdir_is_its_own_mirror(tmp_path):
    held = Mirror(tmp_path, ["*.tsv"])
    assert held.local == tmp_path
    (tmp_path / "x.tsv").write_text("x")
    assert held.flush()
    held.close()
    assert [path.name for path in tmp_path.iterdir()] == ["x.tsv"]


def test_what_is_there_is_fetched_and_gone_on_with(bucket):
    workdir = as_path(f"{bucket.url}/run")
    objects.write(f"{workdir}/metrics.jsonl", b"1\n")
    objects.write(f"{workdir}/unreadable.3.tsv", b"a\n")
    objects.write(f"{workdir}/recipe.json", b"{}")
    held = Mirror(workdir, ["metrics.jsonl", "unreadable*.tsv"])
    assert sorted(path.name for path in held.local.iterdir()) == [
        "metrics.jsonl",
        "unreadable.3.tsv",
    ]
    with (held.local / "metrics.jsonl").open("a") as file:
        file.write("2\n")
    before = len(bucket.requests("/upload/"))
    assert held.flush()
    assert held.flush()
    assert objects.read(f"{workdir}/metrics.jsonl") == b"1\n2\n"
    # Of the rest nothing changed, so that nothing was written.
    assert len(bucket.requests("/upload/")) == before + 1
    held.close()
    assert not held.local.exists()


def test_folders_and_growing_files_are_uploaded_in_the_background(bucket):
    held = Mirror(as_path(f"{bucket.url}/run"), seconds=0.05)
    (held.local / "tensorboard").mkdir()
    events = held.local / "tensorboard" / "events"
    for content in ("one", "one two"):
        events.write_text(content)
        end = time.monotonic() + 20
        while time.monotonic() < end and not there(bucket, "run/tensorboard/events", content):
            time.sleep(0.05)
        assert there(bucket, "run/tensorboard/events", content)
    held.close()


def test_what_is_not_whole_or_goes_elsewhere_is_left_out(bucket):
    held = Mirror(as_path(f"{bucket.url}/run"))
    (held.local / "wandb").mkdir()
    for name in ("metrics.jsonl", "metrics.jsonl.1.part", "wandb/run.log"):
        (held.local / name).write_text("x")
    assert held.flush()
    assert bucket.names("run") == ["metrics.jsonl"]
    held.close()


def there(bucket, name: str, content: str) -> bool:
    try:
        return objects.read(f"{bucket.url}/{name}").decode() == content
    except FileNotFoundError:
        return False


def test_failures_are_told_once_and_made_good(bucket, monkeypatch):
    monkeypatch.setattr(retries, "PATIENCE", 0)
    said = []
    held = Mirror(as_path(f"{bucket.url}/run"), say=said.append)
    (held.local / "metrics.jsonl").write_text("1\n")
    with bucket.faults({"contains": "/upload/", "status": 403}):
        assert not held.flush()
        assert not held.flush()
    assert len(said) == 1
    assert "metrics.jsonl cannot be written: the run goes on" in said[0]
    assert held.flush()
    assert "is written again" in said[1]
    assert there(bucket, "run/metrics.jsonl", "1\n")
    held.close()


def test_what_could_not_be_uploaded_stays(bucket):
    said = []
    held = Mirror(as_path(f"{bucket.url}/run"), say=said.append)
    (held.local / "metrics.jsonl").write_text("1\n")
    with bucket.faults({"contains": "/upload/", "status": 403}):
        held.close()
    assert f"are in {held.local} only" in said[-1]
    assert (held.local / "metrics.jsonl").read_text() == "1\n"


def test_folders_of_processes_long_gone_are_removed(bucket, tmp_path, monkeypatch):
    folder = made(tmp_path / "written")
    for name in ("0-gone", "1-alive", "notes"):
        (folder / name).mkdir()
    monkeypatch.setattr(mirror, "_lives", lambda owner: owner == "1")
    Mirror(as_path(f"{bucket.url}/run")).close()
    assert len(list(folder.iterdir())) == 3  # not yet a week old
    monkeypatch.setattr(mirror, "_LEFT", -1)
    Mirror(as_path(f"{bucket.url}/run")).close()
    assert [path.name for path in folder.iterdir()] == ["1-alive"]


def test_metrics_of_later_steps_are_dropped_in_the_bucket_too(bucket):
    config = Config(log=LogConfig(tensorboard=False))
    workdir = as_path(f"{bucket.url}/run")
    held = Mirror(workdir, ["metrics.jsonl"])
    log = MetricLog(held.local, config, 0)
    for step in (1, 2, 3):
        log.write(step, 0, "clip", {"x": float(step)})
    held.flush()
    assert [line["step"] for line in read_metrics(workdir)] == [1, 2, 3]
    # The process is killed, and another goes on after step 2.
    again = Mirror(workdir, ["metrics.jsonl"])
    log = MetricLog(again.local, config, 2)
    log.write(3, 0, "clip", {"x": 30.0})
    again.flush()
    assert [(line["step"], line["x"]) for line in read_metrics(workdir)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]
    again.close()
    held.close()
