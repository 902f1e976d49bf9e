"""Checkpoints: the whole training unit, by Orbax, asynchronous and atomic.

A checkpoint's number is the count of finished steps. Its items are separate so that a reader
takes what it needs: `params`, `batch_stats`, `opt_state`, `meta` (JSON), and inside an episode
`episode`: its prototypes and labels.
"""

import contextlib
import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from protoclip_jax import distributed
from protoclip_jax.config import CheckpointConfig, ConfigError
from protoclip_jax.storage import objects
from protoclip_jax.storage.paths import AnyPath, absolute, check_writable, is_remote, workdir_at
from protoclip_jax.storage.retries import Unreachable, describe, may_pass, retried
from protoclip_jax.training import retention
from protoclip_jax.training.checksum import checksum

ITEMS = ("params", "batch_stats", "opt_state")
DAMAGED = "damaged"  # prefix of the folders that are passed over

_OWN = ("step", "checksum", "metrics")  # JSON values beside the caller's


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or read by one process only; one line for the user."""


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(
        self,
        workdir: str | os.PathLike,
        keep: CheckpointConfig | None = None,
        steps_per_episode: int = 1,
    ):
        """Opens them; nothing is removed before the next save.

        Args:
          workdir: of a run.
          keep: which of them stay at a save; none = as a rule they are only read.
          steps_per_episode: for `keep.keep_every`.

        Raises:
          ConfigError: the folder or the bucket may not be used so.
          Unreachable: remote storage gave no answer for minutes.
        """
        self._directory = workdir_at(absolute(workdir)) / "checkpoints"
        _check_folder(self._directory, written=keep is not None)
        keep = keep or CheckpointConfig()
        self._best = retention.Best(keep.best) if keep.best is not None else None
        options = ocp.CheckpointManagerOptions(
            preservation_policy=retention.policy(keep, steps_per_episode, self._best),
            enable_async_checkpointing=True,
        )
        self._damaged: list[int] = []
        self._unfinished: list[str] = []
        self._manager = self._opened(options)
        self._written = bool(self.all())  # one at least is on disk
        self._started = False  # the save of another
        if self._best is not None:
            for step in self.all():
                self._best.learn(step, self._metrics(step))

    def _opened(self, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
        """Orbax's face of the folder; raises as `__init__`."""
        # Named, so that a fresh process knows what each item is before it reads it.
        handlers = {name: ocp.StandardCheckpointHandler() for name in (*ITEMS, "episode")}
        handlers["meta"] = ocp.JsonCheckpointHandler()
        try:
            return ocp.CheckpointManager(self._directory, options=options, item_handlers=handlers)
        except Exception as error:
            if not is_remote(self._directory) or isinstance(error, ConfigError):
                raise
            text = f"{self._directory} cannot be used for checkpoints: {describe(error)}"
            if self._is_outage(error):
                raise Unreachable(text) from error
            raise ConfigError(
                f"{text}. Needed are the rights to list, read, write and delete objects, and "
                "storage.buckets.get"
            ) from error

    def latest(self) -> int | None:
        """Number of the newest checkpoint, none when there is none; it may turn out damaged."""
        return self._manager.latest_step()

    def all(self) -> list[int]:
        """Numbers of all checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def leftovers(self) -> list[str]:
        """Names of folders that a kill left behind half-written. They are never read."""
        if not is_remote(self._directory):
            found = self._directory.glob("*orbax-checkpoint-tmp*")
            return sorted(path.name for path in found)
        # In a bucket nothing is renamed: a mark is written last, without which it does not count.
        whole = {str(step) for step in self.all()}
        names = objects.folders(str(self._directory))
        return [name for name in names if name.isdecimal() and name not in whole]

    def save(
        self,
        step: int,
        state: dict,
        meta: dict,
        episode: dict | None = None,
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Starts saving; returns as soon as the arrays are copied off the devices.

        Args:
          step: finished steps.
          state: the TrainState.
          meta: JSON values that resume compares (recipe, fingerprints).
          episode: prototypes and labels of an episode that is not over.
          metrics: of an evaluation of this state, for `checkpoint.best`.

        Raises:
          CheckpointError: this one, or the one before, cannot be written.
        """
        self._put_aside()
        trees = {name: state[name] for name in ITEMS if state[name]}
        if episode is not None:
            trees["episode"] = episode
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        sums = {name: checksum(tree).tolist() for name, tree in trees.items()}
        found = {n: float(value) for n, value in (metrics or {}).items() if math.isfinite(value)}
        own = {"step": int(step), "checksum": sums, "metrics": found}
        items["meta"] = ocp.args.JsonSave(meta | own)
        if self._best is not None:
            self._best.learn(step, found)
        self.wait()  # for the one before
        with self._told():
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        self._started = True

    def meta(self, step: int) -> dict:
        """The JSON values saved with a checkpoint.

        Raises:
          ValueError: it is another checkpoint than its folder's name says.
        """
        return {name: value for name, value in self._meta(step).items() if name not in _OWN}

    def _meta(self, step: int) -> dict:
        arguments = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return _of_step(step, self._manager.restore(step, args=arguments).meta)

    def _metrics(self, step: int) -> dict[str, float]:
        """Of a checkpoint's evaluation: none in a damaged one, or one of an earlier version."""
        try:
            found = self._meta(step)["metrics"]
            return {name: float(value) for name, value in found.items()}
        except Exception as error:  # damage shows as anything, and is told where it is read whole
            if self._is_outage(error):  # else the best would be removed
                raise Unreachable(f"{self._directory / str(step)}: {describe(error)}") from error
            return {}

    def newest_whole(
        self, read: Callable[[int], Any], say: Callable[[str], None] = print
    ) -> tuple[int, Any] | None:
        """The newest checkpoint that reads back whole, by its number, and what `read` made of it.

        One that does not is named and passed over. Reading changes nothing in the folder; the next
        `save` gives it another name, and nothing deletes it. What was never finished goes then.

        Args:
          read: takes a number; whatever it raises but ConfigError, or an outage of remote
            storage, means damage.
          say: gets a line for each checkpoint that is passed over.

        Returns:
          None where there was never a checkpoint.

        Raises:
          ConfigError: there are checkpoints, and none of them can be read.
          CheckpointError: this process cannot read one that others can.
          Unreachable: remote storage gave no answer for minutes.
        """
        self._unfinished = self.leftovers()
        for name in self._unfinished:
            say(f"checkpoints/{name} was never finished: passed over")
        self._damaged = []
        for step in reversed(self.all()):
            try:
                found = step, read(step)
            except (ConfigError, Unreachable):
                raise
            except Exception as error:  # damage shows as anything: KeyError, ValueError, OSError
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                if self._is_outage(error):  # which says nothing of the checkpoint
                    raise Unreachable(f"{self._directory / str(step)}: {reason}") from error
                # What some can read must not be passed over by the others alone.
                if not distributed.met_by_all(f"damaged/{step}"):
                    raise CheckpointError(
                        f"{self._directory / str(step)} cannot be read by this process, though "
                        f"others can ({reason}). If that does not pass, rename the folder, and "
                        "the same command goes on from the one before"
                    ) from error
                say(f"checkpoints/{step} cannot be read: passed over ({reason})")
                self._damaged.append(step)
            else:
                return found
        if self._damaged:
            raise ConfigError(
                f"none of the {len(self._damaged)} checkpoints in {self._directory} can be read: "
                "the run cannot go on. Restore the folder from a copy, or start in a new --workdir"
            )
        return None

    def _put_aside(self) -> None:
        """Renames what was found damaged: a save of the same step must find its place free.

        Removes what a kill left half-written, which would else pile up.
        """
        steps, self._damaged = self._damaged, []
        unfinished, self._unfinished = self._unfinished, []
        if jax.process_index() == 0:
            for name in unfinished:
                with contextlib.suppress(OSError):  # a save that succeeds is worth more
                    path = self._directory / name
                    retried(str(path), functools.partial(epath.Path(path).rmtree, missing_ok=True))
            for step in steps:
                target = self._directory / f"{DAMAGED}-{step}"
                while target.exists():
                    target = target.with_name(target.name + "-again")
                (self._directory / str(step)).rename(target)
        if steps:
            distributed.barrier()  # they are put aside
            self._manager.reload()

    def restore(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """Reads items onto the devices.

        Args:
          step: which checkpoint.
          like: the TrainState or parts of it: arrays, or `jax.ShapeDtypeStruct`s, with the wanted
            shardings.

        Raises:
          ValueError: what was read is not what was written.
        """
        like = jax.tree.map(_abstract, like)
        items = {
            name: tree for name, tree in like.items() if name in ITEMS and jax.tree.leaves(tree)
        }
        restored = self._read(step, items)
        state = like | restored
        if "step" in like:  # the checkpoint's own number
            state["step"] = jax.device_put(np.int32(step), like["step"].sharding)
        return state

    def episode(self, step: int, sharding: jax.sharding.Sharding) -> dict | None:
        """Prototypes and labels of the episode that a checkpoint interrupts, if it does."""
        kept = self._manager.item_metadata(step)
        if "episode" not in kept or kept["episode"] is None:
            return None
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            dict(kept["episode"]),
        )
        return self._read(step, {"episode": like})["episode"]

    def _read(self, step: int, items: dict[str, Any]) -> dict[str, Any]:
        arguments = {name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
        arguments["meta"] = ocp.args.JsonRestore()
        restored = self._manager.restore(step, args=ocp.args.Composite(**arguments))
        meta = _of_step(step, restored.meta)
        for name in items:
            wanted = meta["checksum"][name]
            if checksum(restored[name]).tolist() != wanted:
                raise ValueError(f"the numbers of {name} are not those that were saved")
        return {name: restored[name] for name in items}

    def saving(self) -> bool:
        """Whether something is being saved now."""
        return self._manager.is_saving_in_progress()

    def wait(self) -> None:
        """Blocks until what is being saved is on disk.

        Raises:
          CheckpointError: it cannot be written.
        """
        with self._told():
            self._manager.wait_until_finished()
        self._written, self._started = self._written or self._started, False

    def close(self) -> None:
        """Waits and releases the writer.

        Raises:
          CheckpointError: what was being saved cannot be written.
        """
        with self._told():
            self._manager.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turns whatever a writer raises into one line that says what is safe."""
        try:
            yield
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            older = "the older ones are intact; " if self._written else ""
            if self._is_outage(error):
                text = f"no checkpoint could be written to {self._directory}: {reason}; {older}"
                raise Unreachable(text.removesuffix("; ")) from error
            room, what = "", "see to it"
            if not is_remote(self._directory):
                room = f" ({shutil.disk_usage(self._directory).free / 1e9:.1f} GB free)"
                what = "make room"
            again = "goes on from the newest" if self._written else "starts again"
            raise CheckpointError(
                f"cannot write a checkpoint to {self._directory}{room}: {reason}; {older}{what}, "
                f"then the same command {again}"
            ) from error

    def _is_outage(self, error: BaseException | None) -> bool:
        """Whether an error, or one that it comes from, is of remote storage out of reach."""
        while error is not None and is_remote(self._directory):
            # TensorStore has no types of its own.
            if may_pass(error) or "UNAVAILABLE" in str(error) or "DEADLINE_EXCEEDED" in str(error):
                return True
            error = error.__cause__
        return False


def _check_folder(directory: AnyPath, written: bool) -> None:
    """Refuses what is no folder, or none to write to, before anything is trained."""
    if is_remote(directory):
        return
    try:
        if written:
            check_writable(directory)
        elif os.path.lexists(directory) and not directory.is_dir():
            raise ValueError(f"{directory}: it is no folder")
    except ValueError as error:
        raise ConfigError(
            f"checkpoints cannot be kept in {error}. Move it away, or give another --workdir"
        ) from error


def _of_step(step: int, meta: dict) -> dict:
    """The same JSON values, if they are of this step: a folder may have got another name."""
    saved = meta.get("step", step)  # an earlier version did not write it
    if saved != step:
        raise ValueError(f"it is the checkpoint of step {saved}, renamed or copied")
    return meta


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def differences(stored: dict, wanted: dict) -> list[str]:
    """Lines `path: stored ..., wanted ...` for every entry of two flat dicts that differs."""
    return [
        f"{path}: stored {json.dumps(stored.get(path))}, wanted {json.dumps(wanted.get(path))}"
        for path in sorted(stored.keys() | wanted.keys())
        if stored.get(path) != wanted.get(path)
    ]
