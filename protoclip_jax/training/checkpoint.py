"""Checkpoints: the whole training unit, by Orbax, asynchronous and atomic.

A checkpoint's number is the count of finished steps. Its items are separate so that a reader
takes what it needs: `params`, `batch_stats`, `opt_state`, and `meta` (JSON).
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

ITEMS = ("params", "batch_stats", "opt_state")


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(self, workdir: str | Path, keep: int = 2):
        """Opens them; nothing is removed before the next save."""
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.LatestN(n=keep),
            enable_async_checkpointing=True,
        )
        directory = Path(workdir).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(directory, options=options)

    def latest(self) -> int | None:
        """Number of the newest complete checkpoint, none when there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: dict, meta: dict) -> None:
        """Starts saving; returns as soon as the arrays are copied off the devices.

        Args:
          step: finished steps.
          state: the TrainState.
          meta: JSON values that resume compares (recipe, fingerprints).
        """
        items = {name: ocp.args.StandardSave(state[name]) for name in ITEMS if state[name]}
        items["meta"] = ocp.args.JsonSave(meta)
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def meta(self, step: int) -> dict:
        """The JSON values saved with a checkpoint."""
        return self._manager.restore(
            step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
        ).meta

    def restore(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """Reads items onto the devices.

        Args:
          step: which checkpoint.
          like: the TrainState or parts of it: arrays, or `jax.ShapeDtypeStruct`s, with the wanted
            shardings.
        """
        like = jax.tree.map(_abstract, like)
        items = {
            name: tree for name, tree in like.items() if name in ITEMS and jax.tree.leaves(tree)
        }
        arguments = {name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**arguments))
        state = like | {name: restored[name] for name in items}
        if "step" in like:  # the checkpoint's own number
            state["step"] = jax.device_put(np.int32(step), like["step"].sharding)
        return state

    def wait(self) -> None:
        """Blocks until what is being saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the writer."""
        self._manager.close()


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def differences(stored: dict, wanted: dict) -> list[str]:
    """Lines `path: stored ..., wanted ...` for every entry of two flat dicts that differs."""
    return [
        f"{path}: stored {json.dumps(stored.get(path))}, wanted {json.dumps(wanted.get(path))}"
        for path in sorted(stored.keys() | wanted.keys())
        if stored.get(path) != wanted.get(path)
    ]
