"""The TrainState: plain nested dicts on a mesh, each array made where it will lie."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from protoclip_jax.config import Config, ConfigError
from protoclip_jax.models import clip, sharding
from protoclip_jax.models.presets import CLIPConfig, ProjectionConfig, preset
from protoclip_jax.training import optimizer, step

BATCH_AXES = ("data", "fsdp")


def make_mesh(fsdp: int = 1) -> Mesh:
    """All devices as (data, fsdp). The batch is spread over both axes."""
    grid = arranged(jax.devices(), fsdp)
    return Mesh(grid, BATCH_AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def arranged(devices: Sequence[Any], fsdp: int) -> np.ndarray:
    """Devices as a (data, fsdp) grid.

    The chips of one TPU slice are laid by topology, so that collective operations run between
    neighbours; that order is not the order of the processes, and need not be. Everything else, and
    several slices, is laid process by process: the copies of a parameter's parts then stay inside a
    host where they fit.
    """
    shape = (len(devices) // fsdp, fsdp)
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if devices[0].platform == "tpu" and len(slices) == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    ordered = sorted(
        devices, key=lambda d: (getattr(d, "slice_index", 0) or 0, d.process_index, d.id)
    )
    return np.array(ordered).reshape(shape)


def model_of(config: Config) -> CLIPConfig:
    """The model of a recipe.

    Raises:
      ConfigError: no such preset; the nearest is named.
    """
    model = config.model
    try:
        chosen = preset(model.name)
    except ValueError as error:
        raise ConfigError(f"config.model.name={model.name}: {error}") from error
    projection = None
    if model.projection is not None:
        projection = ProjectionConfig(
            model.projection, model.projection_hidden, model.projection_width
        )
    return dataclasses.replace(
        chosen, projection=projection, batch_norm_group=model.batch_norm_group
    )


def shapes(config: Config) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """The model's definition, and shapes and types of the TrainState, without allocating it."""
    model, dtype = model_of(config), jnp.dtype(config.model.dtype)
    graphdef, params, stats = jax.eval_shape(lambda: clip.initialise(model, config.seed, dtype))
    return graphdef, jax.eval_shape(lambda p, s: _fresh(config, p, s), params, stats)


def abstract(config: Config, mesh: Mesh) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """The same with the place of every array: what a checkpoint is read into."""
    graphdef, like = shapes(config)
    return graphdef, jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        like,
        shardings(like, mesh),
    )


def create(config: Config, mesh: Mesh) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Initialises model and optimizer.

    Returns:
      graphdef: the model without its arrays.
      state: {"step": int32, "params", "batch_stats", "opt_state"}.
    """
    model, dtype = model_of(config), jnp.dtype(config.model.dtype)

    def fresh():
        _, params, stats = clip.initialise(model, config.seed, dtype)
        return _fresh(config, params, stats)

    graphdef, like = shapes(config)
    return graphdef, jax.jit(fresh, out_shardings=shardings(like, mesh))()


def around(config: Config, mesh: Mesh, weights: dict[str, Any]) -> dict[str, Any]:
    """The TrainState of a new run around weights that are there already: no others are made.

    Args:
      config: of the new run.
      mesh: where they lie.
      weights: "params" and "batch_stats".
    """

    def rest(weights):
        fresh = _fresh(config, weights["params"], weights["batch_stats"])
        return {name: tree for name, tree in fresh.items() if name not in weights}

    places = shardings(weights, mesh)
    places = {name: place for name, place in places.items() if name not in weights}
    return jax.jit(rest, out_shardings=places)(weights) | weights


def shardings(state: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Where every array of a TrainState lies: the model's table, moments beside their weights."""
    whole = PartitionSpec()
    specs = sharding.partition_specs(state["params"], mesh)
    tree = {
        "step": whole,
        "params": specs,
        "batch_stats": jax.tree.map(lambda _: whole, state["batch_stats"]),
        "opt_state": optimizer.state_like(specs, whole),
    }
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), tree)


def _fresh(config: Config, params: dict, batch_stats: dict) -> dict[str, Any]:
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "batch_stats": batch_stats,
        "opt_state": optimizer.init(params, step.optimizer_settings(config)),
    }
