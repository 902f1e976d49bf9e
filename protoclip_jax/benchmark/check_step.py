"""`step-…` of the check: a training step at the largest batch that fits."""

import dataclasses
import math
from typing import Any

import jax

from protoclip_jax.benchmark import goals, host, step, trace
from protoclip_jax.benchmark.check_plan import ROOT, Save, Settings
from protoclip_jax.benchmark.largest_batch import DoesNotFit, largest
from protoclip_jax.training import state

RECIPE = "configs/cc3m_single_gpu.py"
PHASE = "prototype"
# Bytes of a device for a pair, roughly: where the search for the batch starts.
PER_PAIR = {"RN50": 110e6, "ViT-B-32": 36e6, "ViT-B-16": 110e6}
SMALL_MODELS = {"RN50": "tiny-rn", "ViT-B-32": "tiny-vit", "ViT-B-16": "tiny-vit"}
SMALL = {
    "model.dtype": "float32",
    "model.projection_hidden": "64",
    "model.projection_width": "32",
    "episode.size": "4000",
    "episode.prototypes": "64",
    "episode.count": "200",
    "data.augmentation": "none",
}
# Of the memory that JAX may use: the step's own is one piece, for which there must be a hole.
USABLE = 0.95
MOST, MOST_SMALL, FIRST_SMALL = 8192, 32, 16


def run(settings: Settings, save: Save) -> dict[str, Any]:
    """Finds the batch, times the step, and profiles it where the goal is missed."""
    # Here: the package that recipes are written with may be missing, which is to be told.
    from protoclip_jax.recipe import configured

    name, small, devices = settings.argument, settings.small, jax.device_count()
    given = {"model.name": SMALL_MODELS[name], **SMALL} if small else {"model.name": name}
    given["optimizer.batch"] = str(FIRST_SMALL * devices)
    config = configured(
        str(ROOT / RECIPE), [f"--config.{path}={text}" for path, text in given.items()], devices
    )
    mesh = state.make_mesh(config.mesh.fsdp)
    (episode, phase), *_ = step.chosen_phases(config, PHASE).items()
    runner = step.Runner(config, mesh)
    numbers: dict[str, Any] = {
        "model": config.model.name,
        "dtype": config.model.dtype,
        "prototypes": config.episode.prototypes,
        "devices": devices,
    }
    limit, most = memory_limit(), MOST_SMALL if small else MOST
    first = FIRST_SMALL if small or limit is None else power_of_two(limit / PER_PAIR[name])

    def told(found: dict[str, Any]) -> None:
        numbers["search"] = found
        save(numbers)

    found = largest(
        lambda rows: attempt(runner, episode, phase, rows * devices, limit),
        limit,
        first=min(first, most),
        most=most,
        # The programs are alike, and what follows takes less than compiling one.
        enough_time=lambda seconds: settings.left() > 2 * seconds + 10,
        told=told,
    )
    numbers |= {"batch": found["rows"] * devices, "memory_gb": gigabytes(runner.needed_bytes())}
    repeats, steps = (1, 2) if small else (3, 3)
    numbers |= step.timed(runner, phase, None, repeats, steps)
    numbers["pairs_per_second_per_device"] = numbers["pairs_per_second"] / devices
    numbers["host_ms"] = numbers["dispatch_ms"]
    if numbers["host_ms"] is None:  # a CPU computes with the cores that hand the step over
        numbers["host_ms"] = host.measure(config, mesh, 1, config.model.name)["host_ms"]
    save(numbers)
    part, kind = f"step-{name}", jax.devices()[0].device_kind
    if settings.profile or goals.missed(part, numbers, kind, small):
        numbers["profile"] = trace.profiled(lambda: runner.run(3), runner.program.as_text())
    return numbers


def attempt(runner: step.Runner, episode: int, phase, batch: int, limit: float | None):
    """Compiles and runs the step with a batch; returns the bytes of a device it takes, or None.

    Raises:
      DoesNotFit: they are more than `limit`, or the device said so.
    """
    optimizer = dataclasses.replace(runner.config.optimizer, batch=batch)
    runner.config = dataclasses.replace(runner.config, optimizer=optimizer)
    runner.inputs = None  # the last batch makes room
    failure = None
    try:
        runner.renew()
        runner.prepare(episode, phase)
        needed = runner.needed_bytes()
        if needed is None or limit is None or needed <= limit:
            runner.run(2)
            return needed
        failure = f"{needed / 1e9:.1f} GB as compiled"
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        failure = str(error).partition("\n")[0]
    # Raised out here, where the error no longer holds the frames with the arrays.
    raise DoesNotFit(failure)


def memory_limit() -> float | None:
    """Bytes of a device that a step may take."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return USABLE * stats["bytes_limit"] if "bytes_limit" in stats else None


def power_of_two(rows: float) -> int:
    """The largest one that is not above, at least 1."""
    return 2 ** max(0, math.floor(math.log2(max(rows, 1))))


def gigabytes(size: int | None) -> float | None:
    """Bytes in GB."""
    return None if size is None else size / 1e9
