"""A trained model out of a workdir."""

import sys
from collections.abc import Callable, Sequence

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from protoclip_jax.config import Config, ConfigError
from protoclip_jax.encoder import Encoder
from protoclip_jax.recipe import from_flat
from protoclip_jax.storage import objects
from protoclip_jax.storage.paths import AnyPath
from protoclip_jax.storage.retries import Unreachable
from protoclip_jax.training import record, state
from protoclip_jax.training.checkpoint import Checkpoints, differences

FOLDER = "checkpoints"  # in a workdir


def start_weights(workdir: AnyPath, like: dict, config: Config) -> dict:
    """Parameters and batch statistics of another run, where a new run starts from them.

    Args:
      workdir: of the other run.
      like: the new run's TrainState, for shapes and shardings.
      config: the new run's recipe.

    Raises:
      ConfigError: no run, or one of another model; lists what differs.
    """
    recipe = record.read(workdir)["recipe"]
    theirs = from_flat(recipe)
    _, other = state.shapes(theirs)
    items = ("params", "batch_stats")
    stored, wanted = (
        {
            jax.tree_util.keystr(path): str(leaf.shape)
            for path, leaf in jax.tree_util.tree_leaves_with_path([tree[name] for name in items])
        }
        for tree in (other, like)
    )
    # Of equal shapes may be models that compute something else with them.
    lines = differences(stored, wanted) or differences(_described(theirs), _described(config))
    if lines:
        raise ConfigError(
            f"config.model.weights={workdir} is another model. Differences:\n  "
            + "\n  ".join(lines[:20])
        )
    return _newest(workdir, recipe, {name: like[name] for name in items})


def _described(config: Config) -> dict[str, str]:
    model = state.model_of(config)
    return {"image": str(model.vision), "text": str(model.text), "activation": model.activation}


def _newest(workdir: AnyPath, recipe: dict, like: dict, step: int | None = None) -> dict:
    """Items of a checkpoint of another run, in which nothing is changed.

    Raises:
      ConfigError: there is none, the one that is asked for cannot be read, or it is of another
        model than the workdir's recipe.
    """
    if not objects.is_file(workdir / FOLDER):
        raise ConfigError(f"{workdir} holds no complete checkpoint yet")
    try:
        checkpoints = Checkpoints(workdir)
    except PermissionError as error:
        raise ConfigError(f"{workdir / FOLDER} cannot be read: {error}") from error

    def read(step: int) -> dict:
        _check_model(workdir, step, recipe, checkpoints.meta(step)["recipe"])
        return checkpoints.restore(step, like)

    try:
        if step is not None:
            return _read_one(workdir, checkpoints.all(), step, read)
        found = checkpoints.newest_whole(read, _warn)
    finally:
        checkpoints.close()
    if found is None:
        raise ConfigError(f"{workdir} holds no complete checkpoint yet")
    return found[1]


def _read_one(
    workdir: AnyPath, steps: Sequence[int], step: int, read: Callable[[int], dict]
) -> dict:
    if step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise ConfigError(f"{workdir} holds no checkpoint of step {step}: there are {there}")
    try:
        return read(step)
    except (ConfigError, Unreachable):
        raise
    except Exception as error:  # damage shows as anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise ConfigError(f"{workdir / FOLDER / str(step)} cannot be read ({reason})") from error


def _check_model(workdir: AnyPath, step: int, recipe: dict, own: dict) -> None:
    """Refuses a checkpoint of another model than recipe.json says: one of them was put there."""
    both = [name for name in recipe.keys() & own.keys() if name.startswith("model.")]
    lines = differences({name: recipe[name] for name in both}, {name: own[name] for name in both})
    lines = [line for line in lines if not line.startswith(record.HARMLESS)]
    if lines:
        raise ConfigError(
            f"{workdir / FOLDER / str(step)} is of another model than {record.RECIPE_FILE} says: "
            "one of the two was put there from another run. Differences:\n  " + "\n  ".join(lines)
        )


def _warn(text: str) -> None:
    print(f"protoclip_jax: {text}", file=sys.stderr)


def restore_encoder(workdir: AnyPath, step: int | None = None) -> Encoder:
    """Reads parameters and batch statistics of a checkpoint, whole, onto each of our devices.

    Raises:
      ConfigError: no run, or no such checkpoint, in the folder.
    """
    recipe = record.read(workdir)["recipe"]
    config = from_flat(recipe)
    graphdef, like = state.shapes(config)
    mesh = jax.make_mesh(
        (jax.local_device_count(),), ("data",), (AxisType.Auto,), devices=jax.local_devices()
    )
    here = NamedSharding(mesh, PartitionSpec())
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        {name: like[name] for name in ("params", "batch_stats")},
    )
    restored = _newest(workdir, recipe, wanted, step)
    return Encoder(
        state.model_of(config),
        graphdef,
        restored["params"],
        restored["batch_stats"],
        rows=NamedSharding(mesh, PartitionSpec("data")),
    )
