"""`quickstart-…` of the check: the quickstart's three phases, step by step, beside a CPU's.

The CPU's numbers lie in quickstart_phases.json. This makes them again, on a CPU:

    JAX_PLATFORMS=cpu python -m protoclip_jax.benchmark.check_phases
"""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import jax

from protoclip_jax.benchmark import machine
from protoclip_jax.benchmark.check_plan import ROOT, PartFailure, Save, Settings
from protoclip_jax.recipe import configured
from protoclip_jax.storage import atomic
from protoclip_jax.training import loop
from protoclip_jax.training.logging import read_metrics

RECIPE = "configs/quickstart.py"
RECORDED = Path(__file__).with_name("quickstart_phases.json")
# One short episode of each phase. Nothing else of the recipe is changed, the model and the batch
# least of all.
SETTINGS = {
    "episode.count": "3",
    "episode.warmup": "1",
    "episode.locked": "1",
    "episode.size": "640",
    "episode.prototypes": "64",
    "optimizer.warmup_steps": "5",
    "evaluation.suite": "",
    "checkpoint.every": "3",
    "log.every": "1",
    "log.tensorboard": "false",
    "log.progress": "false",
}
LOSSES = ("loss/total", "loss/clip", "loss/prototype", "loss/external")
GRADIENT = "grad_norm"
# Largest relative deviations from the CPU's float32 run. The first step is one forward and one
# backward pass from the same weights: float32 products differ in the order of their sums (1e-7 on
# one and eight devices of a CPU), bfloat16 ones in their rounding (1e-4 and 4e-3 on a CPU).
# Afterwards AdamW turns rounding into steps of full length: within 15 steps another order of sums
# has moved CLIP's loss by 8e-5, bfloat16 by 2e-3. k-means then turns rounding into jumps: a point
# on the border of two clusters takes the other one, and both prototypes move. On two CPUs of one
# kind that was 7e-4 of the prototype loss, in bfloat16 3e-3. Each bound leaves five times that or
# more.
FIRST_LOSS, FIRST_GRADIENT, LATER_LOSS = "first loss", "first gradient norm", "later losses"
CLUSTERED_LOSS = "losses of clusters"
BOUNDS = {
    "float32": {FIRST_LOSS: 1e-5, FIRST_GRADIENT: 1e-3, LATER_LOSS: 5e-4, CLUSTERED_LOSS: 5e-3},
    "bfloat16": {FIRST_LOSS: 1e-3, FIRST_GRADIENT: 2e-2, LATER_LOSS: 1e-2, CLUSTERED_LOSS: 2e-2},
}


def run(settings: Settings, save: Save) -> dict[str, Any]:
    """Trains in one compute type, and compares.

    Raises:
      PartFailure: a number is further from the CPU's than rounding explains.
    """
    dtype = settings.argument
    steps = trained(dtype)
    numbers = {"dtype": dtype, "recorded": json.loads(RECORDED.read_text())["machine"]}
    numbers["steps"] = steps
    save(numbers)
    numbers |= compared(steps, json.loads(RECORDED.read_text())["steps"], BOUNDS[dtype])
    save(numbers)
    wrong = [name for name, one in numbers["deviations"].items() if not one["within"]]
    if wrong:
        told = (described(name, numbers["deviations"][name]) for name in wrong)
        raise PartFailure("not the CPU's numbers: " + "; ".join(told))
    return numbers


def trained(dtype: str) -> list[dict[str, Any]]:
    """Phase, losses and gradient norm of every step of a short run.

    Float32 products are full ones, where an accelerator would round their factors by itself.
    """
    given = SETTINGS | {"model.dtype": dtype}
    overrides = [f"--config.{path}={text}" for path, text in given.items()]
    config = configured(str(ROOT / RECIPE), overrides, jax.device_count())
    precision = "highest" if dtype == "float32" else None
    with tempfile.TemporaryDirectory() as folder, jax.default_matmul_precision(precision):
        loop.train(config, Path(folder))
        lines = read_metrics(Path(folder))
    return [
        {"phase": line["phase"]}
        | {name: line[f"train/{name}"] for name in (*LOSSES, GRADIENT) if f"train/{name}" in line}
        for line in lines
        if "train/loss/total" in line
    ]


def compared(
    steps: list[dict[str, Any]], recorded: list[dict[str, Any]], bounds: dict[str, float]
) -> dict[str, Any]:
    """The largest deviation of each bound's numbers, and of each phase's losses.

    Returns:
      deviations: by bound: "deviation", relative; "step" (from 1) and "term" where it is; "bound";
        "within".
      phases: largest deviation of a loss by phase.
    """
    if [set(step) for step in steps] != [set(step) for step in recorded]:
        raise PartFailure(
            f"{len(steps)} steps and their terms are not the {len(recorded)} that were recorded"
        )
    found = dict.fromkeys(bounds, (0.0, 0, ""))
    phases: dict[str, float] = {}
    for number, (step, other) in enumerate(zip(steps, recorded, strict=True), 1):
        for term in set(step) - {"phase"}:
            if term == GRADIENT and number > 1:
                continue  # where the loss is flat it is all rounding
            name = bound_of(term, number, step["phase"])
            far = deviation(step[term], other[term])
            found[name] = max(found[name], (far, number, term))
            if term != GRADIENT:
                phases[step["phase"]] = max(far, phases.get(step["phase"], 0.0))
    return {
        "deviations": {
            name: {
                "deviation": far,
                "step": number,
                "term": term,
                "bound": bounds[name],
                "within": far <= bounds[name],
            }
            for name, (far, number, term) in found.items()
        },
        "phases": phases,
    }


def bound_of(term: str, number: int, phase: str) -> str:
    """Name of the bound for a term of a step (from 1)."""
    if term == GRADIENT:
        return FIRST_GRADIENT
    if number == 1:
        return FIRST_LOSS
    if phase == "prototype" and term != "loss/clip":
        return CLUSTERED_LOSS
    return LATER_LOSS


def deviation(value: float | None, recorded: float) -> float:
    """Relative distance; infinite for what is no number (null in the log)."""
    if value is None or not math.isfinite(value):
        return math.inf
    return abs(value - recorded) / abs(recorded)


def described(name: str, one: dict[str, Any]) -> str:
    """A deviation in words."""
    return (
        f"{name}: {one['deviation']:.1e} of {one['term']} at step {one['step']}, "
        f"more than {one['bound']:.0e}"
    )


def record() -> None:
    """Writes the CPU's numbers.

    Raises:
      SystemExit: this is no CPU.
    """
    if jax.default_backend() != "cpu":
        raise SystemExit("the numbers to compare with are a CPU's: JAX_PLATFORMS=cpu")
    found = {"machine": machine.describe(), "settings": SETTINGS, "steps": trained("float32")}
    del found["machine"]["load"]
    atomic.write_json(RECORDED, found)
    print(f"wrote {RECORDED}")


if __name__ == "__main__":
    record()
