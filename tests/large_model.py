"""Compiles the training step of a large preset on simulated devices, without allocating it.

  python tests/large_model.py PRESET DEVICES

Prints bytes of parameters and optimizer, whole and on the fullest device, and how often devices
exchange something, as JSON.
"""

import json
import math
import os
import re
import sys
from pathlib import Path

PRESET, DEVICES = sys.argv[1], int(sys.argv[2])
# Partitioned as ever; only the machine code, which never runs, is made in less time. Joining the
# many sums over devices would take the CPU's compiler most of its time.
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count={DEVICES} --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true "
    "--xla_disable_hlo_passes=cpu-all-reduce-combiner,all-reduce-combiner"
)
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from protoclip_jax.recipe import apply_override, defaults, resolve
from protoclip_jax.training import state
from protoclip_jax.training.phases import phase_of
from protoclip_jax.training.step import make_train_step


def main() -> None:
    recipe = defaults()
    settings = {
        "model.name": PRESET,
        "model.rematerialise": "true",
        "data.train": "pairs.tsv",
        "optimizer.batch": str(2 * DEVICES),
        "mesh.fsdp": str(DEVICES),
    }
    for path, text in settings.items():
        apply_override(recipe, path, text)
    config = resolve(recipe, DEVICES)
    mesh = state.make_mesh(config.mesh.fsdp)
    graphdef, like = state.shapes(config)
    places = state.shardings(like, mesh)
    size = {
        part: (bytes_of(like[part]), bytes_of(like[part], places[part]))
        for part in ("params", "opt_state")
    }
    model, rows = state.model_of(config), config.optimizer.batch
    by_row = NamedSharding(mesh, PartitionSpec(state.BATCH_AXES))
    side, length = model.vision.image_size, model.text.context_length
    batch = {
        "image": ((rows, side, side, 3), jnp.uint8),
        "tokens": ((rows, length), jnp.int32),
        "position": ((rows,), jnp.int32),
    }
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=by_row)
        for name, (shape, dtype) in batch.items()
    }
    like = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        like,
        places,
    )
    step = make_train_step(graphdef, config, phase_of(config, 0), mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(places, whole))
    program = jitted.lower(like, batch, None).compile()
    used, text = program.memory_analysis(), program.as_text()
    print(
        json.dumps(
            {
                "preset": PRESET,
                "devices": DEVICES,
                **{f"{part}_bytes": total for part, (total, _) in size.items()},
                **{f"{part}_bytes_of_a_device": here for part, (_, here) in size.items()},
                "cut_arrays": sum(
                    not place.is_fully_replicated for place in jax.tree.leaves(places["params"])
                ),
                "arguments_of_a_device": used.argument_size_in_bytes,
                "exchanges": {
                    name: len(re.findall(rf"= .* {name}(?:-start)?\(", text))
                    for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute")
                },
            }
        )
    )


def bytes_of(tree, places=None) -> int:
    leaves = jax.tree.leaves(tree)
    shapes = [leaf.shape for leaf in leaves]
    if places is not None:
        pairs = zip(jax.tree.leaves(places), shapes, strict=True)
        shapes = [place.shard_shape(shape) for place, shape in pairs]
    return sum(
        math.prod(shape) * leaf.dtype.itemsize for shape, leaf in zip(shapes, leaves, strict=True)
    )


if __name__ == "__main__":
    main()
