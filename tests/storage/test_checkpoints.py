"""Checkpoints in a bucket: whole or passed over, as in a folder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint._src.path import gcs_utils

from protoclip_jax.config import CheckpointConfig, ConfigError
from protoclip_jax.storage.retries import Unreachable
from protoclip_jax.training.checkpoint import Checkpoints


def state_of(number: int) -> dict:
    """A small TrainState whose numbers say which it is."""
    rng = np.random.default_rng(number)
    return {
        "step": jnp.int32(number),
        "params": {"a": jnp.asarray(rng.normal(size=(6, 4)).astype(np.float32))},
        "batch_stats": {},
        "opt_state": {},
    }


def opened(bucket) -> Checkpoints:
    return Checkpoints(f"{bucket.url}/run", CheckpointConfig(keep=10))


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, state_of(step), {"recipe": {}})
    checkpoints.wait()


def newest(checkpoints: Checkpoints, said: list[str]):
    found = checkpoints.newest_whole(
        lambda step: checkpoints.restore(step, state_of(0)), said.append
    )
    return found and (found[0], jax.device_get(found[1]))


def assert_newest(checkpoints: Checkpoints, step: int) -> list[str]:
    said = []
    number, state = newest(checkpoints, said)
    assert number == step
    jax.tree.map(np.testing.assert_array_equal, state, jax.device_get(state_of(step)))
    return said


def test_they_come_back(bucket):
    checkpoints = opened(bucket)
    assert newest(checkpoints, []) is None
    save(checkpoints, 1, 2)
    checkpoints.close()
    checkpoints = opened(bucket)  # as another process opens them
    assert checkpoints.all() == [1, 2]
    assert not assert_newest(checkpoints, 2)
    checkpoints.close()


def test_a_damaged_one_is_put_aside_and_kept(bucket):
    checkpoints = opened(bucket)
    save(checkpoints, 1, 2)
    checkpoints.close()
    folder = f"{bucket.url}/run/checkpoints"
    bucket.files.rm(f"{folder}/2/params", recursive=True)
    remains = bucket.names("run/checkpoints/2")
    checkpoints = opened(bucket)
    assert "checkpoints/2 cannot be read: passed over" in assert_newest(checkpoints, 1)[0]
    assert bucket.names("run/checkpoints/2") == remains
    save(checkpoints, 2)
    assert bucket.names("run/checkpoints/damaged-2") == remains
    assert not assert_newest(checkpoints, 2)
    checkpoints.close()


def test_a_half_written_one_is_named_and_no_obstacle_and_goes(bucket):
    checkpoints = opened(bucket)
    save(checkpoints, 1, 2, 3)
    checkpoints.close()
    for step in (2, 3):
        bucket.files.rm_file(f"{bucket.url}/run/checkpoints/{step}/commit_success.txt")
    before = bucket.names("run")
    checkpoints = opened(bucket)
    assert assert_newest(checkpoints, 1) == [
        "checkpoints/2 was never finished: passed over",
        "checkpoints/3 was never finished: passed over",
    ]
    assert bucket.names("run") == before
    save(checkpoints, 3)  # one in its place, and none in that of the other
    assert not assert_newest(checkpoints, 3)
    assert not bucket.names("run/checkpoints/2")
    checkpoints.close()


def test_an_outage_is_no_damage(bucket, no_waiting):
    """Else a run would go back to an older checkpoint, and put the newest aside."""
    checkpoints = opened(bucket)
    save(checkpoints, 1, 2)
    checkpoints.close()
    checkpoints, said = opened(bucket), []
    with (
        bucket.faults({"method": "GET", "contains": "checkpoints/2/meta", "status": 503}),
        pytest.raises(Unreachable, match=r"checkpoints/2: .*503"),
    ):
        checkpoints.newest_whole(checkpoints.meta, said.append)
    assert not said
    with (
        bucket.faults({"contains": "checkpoints/3/commit_success.txt", "status": 503}),
        pytest.raises(Unreachable, match="no checkpoint could be written to gs://"),
    ):
        save(checkpoints, 3)
    assert assert_newest(checkpoints, 2) == ["checkpoints/3 was never finished: passed over"]
    checkpoints.close()


def test_an_outage_does_not_lose_the_best(bucket, no_waiting):
    url, keep = f"{bucket.url}/run", CheckpointConfig(keep=1, best="top1")
    checkpoints = Checkpoints(url, keep)
    for step, value in ((1, 0.9), (2, 0.1)):
        checkpoints.save(step, state_of(step), {}, metrics={"top1": value})
    checkpoints.close()
    with (
        bucket.faults({"method": "GET", "contains": "checkpoints/1/meta", "status": 503}),
        pytest.raises(Unreachable, match=r"checkpoints/1: .*503"),
    ):
        Checkpoints(url, keep)
    checkpoints = Checkpoints(url, keep)
    save(checkpoints, 3)
    assert checkpoints.all() == [1, 3]
    checkpoints.close()


def test_a_bucket_without_rights_is_told_in_a_line(bucket):
    checkpoints = opened(bucket)
    save(checkpoints, 1)
    checkpoints.close()
    gcs_utils.get_bucket.cache_clear()
    with (
        bucket.faults({"contains": "/b/bucket?", "status": 403}),
        pytest.raises(ConfigError, match=r"gs://.*: Forbidden 403: .* storage.buckets.get") as told,
    ):
        opened(bucket)
    assert "\n" not in str(told.value)


def test_none_readable_stops(bucket):
    checkpoints = opened(bucket)
    save(checkpoints, 1)
    checkpoints.close()
    bucket.files.rm(f"{bucket.url}/run/checkpoints/1/params", recursive=True)
    checkpoints = opened(bucket)
    with pytest.raises(ConfigError, match=r"none of the 1 checkpoints in gs://.* can be read"):
        newest(checkpoints, [])
    checkpoints.close()


def test_checkpoints_are_written_to_gs_only(monkeypatch):
    from protoclip_jax.storage import paths

    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match="checkpoints are written to gs:// or a local folder"):
        Checkpoints("s3://bucket/run")
