"""Checkpoints: the newest that reads back whole, whatever happened to the others."""

import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from protoclip_jax.config import CheckpointConfig, ConfigError
from protoclip_jax.training.checkpoint import CheckpointError, Checkpoints
from protoclip_jax.training.checksum import checksum

pytestmark = pytest.mark.core

ROOT = Path(__file__).parents[2]


def state_of(number: int) -> dict:
    """A small TrainState whose numbers say which it is."""
    rng = np.random.default_rng(number)
    return {
        "step": jnp.int32(number),
        "params": {
            "a": jnp.asarray(rng.normal(size=(64, 40)).astype(np.float32)),
            "b": jnp.arange(7) + number,
        },
        "batch_stats": {"mean": jnp.full(5, number, jnp.float32)},
        "opt_state": {"mu": jnp.asarray(rng.normal(size=(64, 40)).astype(np.float32))},
    }


def save_all(workdir: Path, steps, keep: int = 10, **options) -> Checkpoints:
    checkpoints = Checkpoints(workdir, CheckpointConfig(keep=keep, **options))
    for step in steps:
        checkpoints.save(step, state_of(step), {"recipe": {}, "number": step})
    checkpoints.wait()
    return checkpoints


def newest(checkpoints: Checkpoints, said: list[str] | None = None):
    """Number and state of the newest whole checkpoint."""
    lines = [] if said is None else said
    found = checkpoints.newest_whole(
        lambda step: checkpoints.restore(step, state_of(0)), lines.append
    )
    return found and (found[0], jax.device_get(found[1]))


def assert_state(state, number: int):
    jax.tree.map(np.testing.assert_array_equal, state, jax.device_get(state_of(number)))


def largest_file(folder: Path) -> Path:
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )


def truncate(folder: Path):
    file = largest_file(folder)
    file.write_bytes(file.read_bytes()[:100])


def flip_a_bit(folder: Path):
    """Not noticed by the file format: the value it holds is another one."""
    file = largest_file(folder / "params")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def rewrite_meta(folder: Path, change):
    file = folder / "meta" / "metadata"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def empty(folder: Path):
    shutil.rmtree(folder)
    folder.mkdir()


def lose_meta(folder: Path):
    shutil.rmtree(folder / "meta")
    (folder / "_CHECKPOINT_METADATA").unlink()


def lose_an_item(folder: Path):
    shutil.rmtree(folder / "opt_state")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty, lose_meta, lose_an_item])
def test_damaged_checkpoint_is_named_passed_over_and_kept(tmp_path, damage):
    """CKPT-01."""
    save_all(tmp_path, [10, 20]).close()
    damage(tmp_path / "checkpoints" / "20")
    remains = sorted(p.name for p in (tmp_path / "checkpoints" / "20").rglob("*"))
    checkpoints, said = Checkpoints(tmp_path, CheckpointConfig(keep=10)), []
    step, state = newest(checkpoints, said)
    assert step == 10
    assert_state(state, 10)
    assert [line for line in said if line.startswith("checkpoints/20 cannot be read: passed over")]
    # Reading changes nothing; a save frees the number, and keeps what was there.
    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in (folder / "20").rglob("*")) == remains
    checkpoints.save(20, state_of(20), {"recipe": {}})
    checkpoints.wait()
    assert sorted(p.name for p in (folder / "damaged-20").rglob("*")) == remains
    step, state = newest(checkpoints)
    assert step == 20
    assert_state(state, 20)
    checkpoints.close()


@pytest.mark.parametrize("way", [shutil.move, shutil.copytree])
@pytest.mark.parametrize(("step", "name"), [(20, 500), (20, 21), (5, 30)])
def test_one_under_another_number_is_passed_over_and_kept(tmp_path, way, step, name):
    save_all(tmp_path, [5, 10, 20]).close()
    folder, left = tmp_path / "checkpoints", [5, 10, 20]
    way(folder / str(step), folder / str(name))
    if way is shutil.move:
        left.remove(step)
    checkpoints, said = Checkpoints(tmp_path, CheckpointConfig(keep=10)), []
    for read in (checkpoints.meta, lambda step: checkpoints.restore(step, state_of(0))):
        with pytest.raises(ValueError, match=f"it is the checkpoint of step {step}, renamed or"):
            read(name)
    number, state = newest(checkpoints, said)
    assert number == left[-1]
    assert_state(state, number)
    reason = f"(ValueError: it is the checkpoint of step {step}, renamed or copied)"
    assert said == [f"checkpoints/{name} cannot be read: passed over {reason}"]
    checkpoints.save(40, state_of(40), {})
    checkpoints.wait()
    assert checkpoints.all() == [*left, 40]
    assert (folder / f"damaged-{name}" / "params").is_dir()
    checkpoints.close()


def test_the_best_under_another_number_is_not_the_best(tmp_path):
    assert save_measured(tmp_path, {1: 0.9, 2: 0.5, 3: 0.1}, keep=3) == [1, 2, 3]
    shutil.move(tmp_path / "checkpoints" / "1", tmp_path / "checkpoints" / "0")
    assert save_measured(tmp_path, {4: 0.2}) == [2, 4]


def test_one_of_an_earlier_version_says_no_number_and_is_read(tmp_path):
    save_all(tmp_path, [5]).close()
    rewrite_meta(
        tmp_path / "checkpoints" / "5", lambda meta: {"checksum": meta["checksum"], "number": 5}
    )
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.meta(5) == {"number": 5}
    number, state = newest(checkpoints)
    assert number == 5
    assert_state(state, 5)
    checkpoints.close()


def test_half_written_checkpoint_is_named_and_no_obstacle(tmp_path):
    save_all(tmp_path, [10]).close()
    whole = tmp_path / "checkpoints" / "10"
    shutil.copytree(whole, whole.with_name("20.orbax-checkpoint-tmp"))
    said = []
    checkpoints = Checkpoints(tmp_path)
    assert newest(checkpoints, said)[0] == 10
    assert said == ["checkpoints/20.orbax-checkpoint-tmp was never finished: passed over"]
    checkpoints.save(20, state_of(20), {})
    checkpoints.wait()
    assert newest(checkpoints)[0] == 20
    checkpoints.close()


def test_none_readable_stops_and_loses_nothing(tmp_path):
    save_all(tmp_path, [10, 20]).close()
    for step in ("10", "20"):
        truncate(tmp_path / "checkpoints" / step)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(ConfigError, match=r"none of the 2 checkpoints in .* can be read"):
        newest(checkpoints)
    checkpoints.close()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"10", "20"}


def test_newest_is_the_largest_number_and_stray_names_are_ignored(tmp_path):
    """CKPT-09."""
    save_all(tmp_path, [9, 10, 100]).close()
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "9", folder / "10_backup")
    shutil.copytree(folder / "9", folder / "best")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.all() == [9, 10, 100]
    assert newest(checkpoints)[0] == 100
    checkpoints.close()


def test_empty_workdir_has_none(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert newest(checkpoints) is None
    checkpoints.close()


def a_file(place: Path):
    place.write_text("")


def a_link_to_nothing(place: Path):
    place.symlink_to(place.with_name("nothing"))


def a_link_to_a_file(place: Path):
    place.with_name("file").write_text("")
    place.symlink_to(place.with_name("file"))


@pytest.mark.parametrize("make", [a_file, a_link_to_nothing, a_link_to_a_file])
@pytest.mark.parametrize("keep", [None, CheckpointConfig()])
def test_what_is_no_folder_is_refused_at_the_start(tmp_path, make, keep):
    make(tmp_path / "checkpoints")
    with pytest.raises(ConfigError, match=r"kept in .*checkpoints: .* is no folder\. Move") as told:
        Checkpoints(tmp_path, keep)
    assert "\n" not in str(told.value)


def test_a_folder_that_cannot_be_written_is_refused_for_a_run_and_read(tmp_path, monkeypatch):
    save_all(tmp_path, [10]).close()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match="checkpoints cannot be written"):
        Checkpoints(tmp_path, CheckpointConfig())
    checkpoints = Checkpoints(tmp_path)
    assert newest(checkpoints)[0] == 10
    checkpoints.close()


@pytest.mark.parametrize("before", [[], [1], [1, 2]])
@pytest.mark.parametrize("opened_again", [True, False])
def test_older_ones_are_spoken_of_where_there_are_any(tmp_path, monkeypatch, before, opened_again):
    checkpoints = save_all(tmp_path, before, keep=1)
    if opened_again:
        checkpoints.close()
        checkpoints = Checkpoints(tmp_path)

    def fail(*_, **__):
        raise OSError("no")

    monkeypatch.setattr(checkpoints._manager, "save", fail)
    with pytest.raises(CheckpointError, match="cannot write a checkpoint to ") as told:
        checkpoints.save(3, state_of(3), {})
    assert ("the older ones are intact" in str(told.value)) == bool(before)
    assert str(told.value).endswith("goes on from the newest" if before else "starts again")
    checkpoints.close()


def mesh_of(devices: int):
    return jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])


def placed(state: dict, mesh) -> dict:
    """The state on a mesh, the matrices cut over it."""
    cut, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    return jax.tree.map(lambda leaf: jax.device_put(leaf, cut if leaf.ndim > 1 else whole), state)


@pytest.mark.parametrize("devices", [1, 2])
def test_other_devices_take_over(tmp_path, devices):
    """CKPT-03: saved on eight devices, cut over them; read on fewer."""
    state = placed(state_of(3), mesh_of(8))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state, {})
    checkpoints.wait()
    like = placed(state_of(0), mesh_of(devices))
    restored = checkpoints.restore(3, like)
    assert restored["params"]["a"].sharding == like["params"]["a"].sharding
    assert_state(jax.device_get(restored), 3)
    checkpoints.close()


def test_what_is_given_away_after_the_call_is_saved_as_it_was(tmp_path):
    """DIST-07: the next step reuses the buffers while the writer still writes."""
    move = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=10))
    for step in (1, 2, 3):
        state = state_of(step)
        checkpoints.save(step, state, {})
        jax.block_until_ready(move({name: state[name] for name in ("params", "opt_state")}))
    checkpoints.wait()
    for step in (1, 2, 3):
        assert_state(jax.device_get(checkpoints.restore(step, state_of(0))), step)
    checkpoints.close()


def test_interrupted_episode_comes_back(tmp_path):
    episode = {
        "prototypes": {"image": {"centroids": jnp.ones((4, 3)), "counts": jnp.arange(4)}},
        "labels": {"image": np.arange(9, dtype=np.int32) - 1},
    }
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, state_of(5), {}, episode)
    checkpoints.save(6, state_of(6), {})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)  # as a new process opens them
    here = NamedSharding(mesh_of(2), PartitionSpec())
    found = checkpoints.episode(5, here)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(episode))
    assert checkpoints.episode(6, here) is None
    checkpoints.close()


def test_keep_policy_never_removes_the_newest(tmp_path):
    keep = CheckpointConfig(keep=1, keep_every=2, best="zero_shot/top1")
    checkpoints = Checkpoints(tmp_path, keep, steps_per_episode=10)
    quality = {10: 0.1, 20: 0.2, 30: 0.9, 40: 0.3, 50: 0.2, 55: None, 60: 0.1, 65: None}
    for step, value in quality.items():
        metrics = None if value is None else {"zero_shot/top1": value}
        checkpoints.save(step, state_of(step), {}, metrics=metrics)
        checkpoints.wait()
        assert checkpoints.latest() == step
    # Every second episode, the best, the newest.
    assert checkpoints.all() == [20, 30, 40, 60, 65]
    checkpoints.close()


def test_least_is_best_for_a_metric_with_a_minus(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=1, best="-geometry/modality_gap"))
    for step, value in ((1, 0.5), (2, 0.1), (3, 0.9)):
        checkpoints.save(step, state_of(step), {}, metrics={"geometry/modality_gap": value})
    checkpoints.wait()
    assert checkpoints.all() == [2, 3]
    checkpoints.close()


def save_measured(workdir: Path, values: dict, best: str = "top1", keep: int = 1) -> list[int]:
    """Opens the checkpoints, saves some with a value of the metric `top1`; which are left."""
    checkpoints = Checkpoints(workdir, CheckpointConfig(keep=keep, best=best))
    for step, value in values.items():
        metrics = None if value is None else {"top1": value}
        checkpoints.save(step, state_of(step), {}, metrics=metrics)
    checkpoints.wait()
    kept = checkpoints.all()
    checkpoints.close()
    return kept


def test_the_best_is_known_after_a_restart(tmp_path):
    assert save_measured(tmp_path, {1: 0.9, 2: 0.1, 3: 0.2}) == [1, 3]
    assert save_measured(tmp_path, {4: None}) == [1, 4]
    assert save_measured(tmp_path, {5: 0.95, 6: 0.3}) == [5, 6]
    # Another metric, which none of them has, and the first one again, by its least value.
    assert save_measured(tmp_path, {7: 0.1}, best="other", keep=3) == [5, 6, 7]
    assert save_measured(tmp_path, {8: 0.2}, best="-top1") == [7, 8]
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.meta(7) == {}
    checkpoints.close()


def test_the_best_is_known_after_a_damaged_one_is_put_aside(tmp_path):
    assert save_measured(tmp_path, {1: 0.5, 2: 0.9, 3: 0.1}) == [2, 3]
    truncate(tmp_path / "checkpoints" / "3")
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=1, best="top1"))
    assert newest(checkpoints)[0] == 2
    for step, value in ((3, 0.7), (4, 0.6)):
        checkpoints.save(step, state_of(step), {}, metrics={"top1": value})
    checkpoints.wait()
    assert checkpoints.all() == [2, 4]
    checkpoints.close()


@pytest.mark.parametrize(("best", "finite"), [("top1", 5.0), ("-top1", 0.1)])
def test_one_without_a_finite_value_is_never_the_best(tmp_path, best, finite):
    others = {2: math.nan, 3: math.inf, 4: -math.inf, 5: None}
    assert save_measured(tmp_path, {1: finite} | others, best) == [1, 5]
    assert save_measured(tmp_path, {6: math.nan, 7: 1.0}, best) == [1, 7]


def no_metrics(meta: dict) -> dict:
    return {name: value for name, value in meta.items() if name != "metrics"}


def words_for_metrics(meta: dict) -> dict:
    return meta | {"metrics": {"top1": "many"}}


@pytest.mark.parametrize("change", [no_metrics, words_for_metrics, lambda meta: []])
def test_one_of_an_earlier_version_or_damaged_has_no_metrics_and_opens(tmp_path, change):
    assert save_measured(tmp_path, {1: 0.9, 2: 0.5}, keep=2) == [1, 2]
    rewrite_meta(tmp_path / "checkpoints" / "1", change)
    assert save_measured(tmp_path, {3: 0.1}) == [2, 3]


def test_checksum_sees_a_bit_and_a_place_and_no_sharding():
    values = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    base = checksum({"x": values})
    flipped = values.copy()
    flipped.view(np.uint32)[3, 2] ^= 1
    swapped = values[:, [1, 0, 2, 3, 4]]
    spread = jax.device_put(values, NamedSharding(mesh_of(8), PartitionSpec("data")))
    assert checksum({"x": flipped}) != base
    assert checksum({"x": swapped}) != base
    assert checksum({"x": spread}) == base


def test_full_disk_stops_with_a_message_and_leaves_the_older_checkpoints(tmp_path):
    """A limit on the size of files stands for the full disk."""
    save_all(tmp_path, [10]).close()
    script = textwrap.dedent(
        f"""
        import resource, signal
        import jax
        from protoclip_jax.training.checkpoint import CheckpointError, Checkpoints

        noise = jax.random.normal(jax.random.key(0), (400_000,))
        state = {{"params": {{"a": noise}}, "batch_stats": {{}}, "opt_state": {{}}}}
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        checkpoints = Checkpoints({str(tmp_path)!r})
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            checkpoints.save(20, state, {{}})
            checkpoints.wait()
        except CheckpointError as error:
            print("told:", error)
        """
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert "told: cannot write a checkpoint to" in result.stdout, result.stderr[-2000:]
    assert "the older ones are intact" in result.stdout.lower()
    checkpoints = Checkpoints(tmp_path)
    step, state = newest(checkpoints)
    assert step == 10
    assert_state(state, 10)
    checkpoints.close()
