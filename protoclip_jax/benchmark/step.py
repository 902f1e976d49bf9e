"""`step`: a training step of a recipe on batches that lie on the devices, against open_clip."""

import argparse
import contextlib
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from protoclip_jax.benchmark import arguments, host, machine, synthetic, timing, torch_peer
from protoclip_jax.benchmark.report import RULE, Report, number, say
from protoclip_jax.config import Config, ConfigError
from protoclip_jax.training import state
from protoclip_jax.training.compiled import peak_flops
from protoclip_jax.training.flops import flops
from protoclip_jax.training.phases import Phase, phase_of
from protoclip_jax.training.step import make_train_step

# Dispatches that are timed in a row: so few that no queue is full, when dispatch would wait.
_QUEUE = 8
# Side of the square matmul that stands for the machine: large enough for its full rate.
_SIDE_CPU, _SIDE = 2048, 8192
_PRODUCTS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `step`."""
    arguments.add_recipe(parser)
    parser.add_argument(
        "--phase", help="warmup, prototype or locked, with commas between; default: the recipe's"
    )
    parser.add_argument("--repeats", type=arguments.above_zero, default=3, help="default: 3")
    parser.add_argument(
        "--steps", type=arguments.above_zero, default=3, help="steps in a repeat; default: 3"
    )
    parser.add_argument(
        "--peer_python",
        help="an interpreter with torch and open_clip, or none; default: this one, if it has them",
    )


def run(options: argparse.Namespace) -> Report:
    """Measures every phase."""
    config = arguments.recipe(options, jax.device_count())
    phases = chosen_phases(config, options.phase)
    mesh = state.make_mesh(config.mesh.fsdp)
    found = machine.describe()
    shared = host.measure(config, mesh, options.repeats)
    runner = Runner(config, mesh)
    cases, notes, versions = [], [], None
    with contextlib.ExitStack() as stack:
        try:
            peer = torch_peer.start(options.peer_python, config, runner.model, found["cores"])
            stack.enter_context(peer)
            versions = peer.versions
        except torch_peer.PeerError as error:
            peer = None
            notes.append(f"No ratio to open_clip: {error}.")
        for episode, phase in phases.items():
            say(f"step of phase {phase.name}")
            case = measure(runner, episode, phase, peer, options.repeats, options.steps)
            if case["peer_error"]:
                peer = None
                notes.append(
                    f"No ratio to open_clip from phase {phase.name} on: {case['peer_error']}."
                )
            cases.append(case)
    numbers = {
        "machine": found,
        "config": options.config,
        "model": config.model.name,
        "dtype": config.model.dtype,
        "batch": config.optimizer.batch,
        **shared,
        "peer": versions,
        "phases": cases,
    }
    return _report(numbers, notes, options)


def chosen_phases(config: Config, names: str | None) -> dict[int, Phase]:
    """The phases of a recipe that are asked for, by the first episode of each.

    Raises:
      ConfigError: the recipe has no such phase.
    """
    first: dict[str, int] = {}
    for episode in range(config.episode.count):
        first.setdefault(phase_of(config, episode).name, episode)
    wanted = list(first) if names is None else names.split(",")
    for name in wanted:
        if name not in first:
            raise ConfigError(f"--phase={name}: the recipe has {', '.join(first)}")
    return {first[name]: phase_of(config, first[name]) for name in wanted}


class Runner:
    """The state of a run that is trained on one batch.

    Attributes:
      config: the recipe; another batch may be set before `prepare`.
      compile_seconds: what compiling the step took.
      operations: floating-point operations of a step over all devices.
      program: the compiled step.
    """

    def __init__(self, config: Config, mesh):
        self.config, self.mesh = config, mesh
        self.model = state.model_of(config)
        self.graphdef, self.state = state.create(config, mesh)

    def prepare(self, episode: int, phase: Phase) -> None:
        """Compiles the step of a phase and makes what it is given."""
        # As the trainer compiles it (training/loop.py).
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        places = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        step = jax.jit(
            make_train_step(self.graphdef, self.config, phase, self.mesh),
            donate_argnums=0,
            out_shardings=(places, everywhere),
        )
        at = jnp.int32(episode * self.config.steps_per_episode)
        self.state["step"] = jax.device_put(at, places["step"])
        batch = synthetic.batch(self.config, self.model, phase, self.mesh)
        self.inputs = batch, synthetic.prototypes(self.config, phase, self.mesh)
        start = time.perf_counter()
        traced = step.trace(self.state, *self.inputs)
        self.program = traced.lower().compile()
        self.compile_seconds = time.perf_counter() - start
        self.operations = flops(traced.jaxpr)

    def run(self, steps: int) -> jax.Array:
        """Trains; returns the last loss, after which the state is there too."""
        for _ in range(steps):
            self.state, metrics = self.program(self.state, *self.inputs)
        return jax.block_until_ready((self.state, metrics))[1]["loss/total"]

    def dispatch_ms(self) -> float | None:
        """What handing over a step takes while the device is busy; None where it is a CPU."""
        if jax.default_backend() == "cpu":
            return None
        times = []
        for _ in range(_QUEUE):
            start = time.perf_counter()
            self.state, _ = self.program(self.state, *self.inputs)
            times.append(time.perf_counter() - start)
        jax.block_until_ready(self.state)
        return 1e3 * statistics.median(times)

    def needed_bytes(self) -> int | None:
        """Memory of a device that the compiled step takes, state and batch included."""
        found = self.program.memory_analysis()
        if found is None:
            return None
        held = found.argument_size_in_bytes + found.output_size_in_bytes
        return held - found.alias_size_in_bytes + found.temp_size_in_bytes

    def renew(self) -> None:
        """Makes the state again where a step that failed has used it up."""
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state)):
            _, self.state = state.create(self.config, self.mesh)


def measure(
    runner: Runner,
    episode: int,
    phase: Phase,
    peer: torch_peer.Peer | None,
    repeats: int,
    steps: int,
) -> dict[str, Any]:
    """Numbers of a phase; those of the peer are None without it."""
    runner.prepare(episode, phase)
    runner.run(2)
    return timed(runner, phase, peer, repeats, steps)


def timed(
    runner: Runner, phase: Phase, peer: torch_peer.Peer | None, repeats: int, steps: int
) -> dict[str, Any]:
    """The numbers of `measure`, of a step that is compiled and warm."""
    config, platform, operations = runner.config, jax.default_backend(), runner.operations
    peer_error = None
    try:
        times, loss = _times(runner, phase, peer, repeats, steps)
    except torch_peer.PeerError as error:
        peer_error = str(error)
        times, loss = _times(runner, phase, None, repeats, steps)
    ours, theirs = times["ours"] / steps, None
    if "peer" in times:
        theirs = times["peer"] / steps
    rate = _PRODUCTS * 2 * _side() ** 3 / times["matmul"].wall * jax.device_count()
    if platform == "cpu":
        rate /= jax.device_count()  # devices of a CPU are the same cores
    peak = peak_of_all()
    return {
        "phase": phase.name,
        "step_ms": 1e3 * ours.wall,
        "cpu_ms": 1e3 * ours.cpu,
        "pairs_per_second": config.optimizer.batch / ours.wall,
        "compile_seconds": runner.compile_seconds,
        "gflop": operations / 1e9,
        "gflops": operations / ours.wall / 1e9,
        "matmul_gflops": rate / 1e9,
        "flop_use": operations / ours.wall / rate,
        "peak_gflops": peak and peak / 1e9,
        "peak_use": peak and operations / ours.wall / peak,
        "dispatch_ms": runner.dispatch_ms(),
        "loss": loss,
        "peer_step_ms": 1e3 * theirs.wall if theirs else None,
        "peer_cpu_ms": 1e3 * theirs.cpu if theirs else None,
        "speedup": theirs.wall / ours.wall if theirs else None,
        "speedup_cpu": theirs.cpu / ours.cpu if theirs else None,
        "peer_error": peer_error,
    }


def _times(
    runner: Runner, phase: Phase, peer: torch_peer.Peer | None, repeats: int, steps: int
) -> tuple[dict[str, timing.Seconds], float]:
    """Median times of `steps` steps, of matmuls and of the peer's steps; and the last loss."""
    side = _side()
    ours = timing.Timed(functools.partial(runner.run, steps))
    contenders = {
        "ours": ours,
        "matmul": timing.matmul(side, side, side, runner.config.model.dtype, _PRODUCTS),
    }
    if peer is not None:
        locked = not phase.train_image
        peer.run(1, locked)  # its first step allocates
        contenders["peer"] = functools.partial(peer.run, steps, locked)
    times = timing.alternating(contenders, repeats)
    return times, float(ours.result)


def peak_of_all() -> float | None:
    """Peak FLOP/s of all devices by their data sheet, where it is known."""
    peak = peak_flops(jax.local_devices()[0])
    return None if peak is None else peak * jax.device_count()


def _side() -> int:
    return _SIDE_CPU if jax.default_backend() == "cpu" else _SIDE


def _report(numbers: dict[str, Any], notes: list[str], options: argparse.Namespace) -> Report:
    cases = numbers["phases"]

    def row(label: str, name: str, unit: str = ""):
        return label, [number(case[name], unit) for case in cases]

    rows = [
        row("wall ms a step", "step_ms"),
        row("CPU ms a step", "cpu_ms"),
        row("pairs a second", "pairs_per_second"),
        row("compilation, wall s", "compile_seconds"),
        RULE,
        row("model GFLOP a step", "gflop"),
        row("GFLOP/s", "gflops"),
        row("matmul's GFLOP/s", "matmul_gflops"),
        ("FLOP use", [f"{case['flop_use']:.0%}" for case in cases]),
    ]
    if all(case["peak_use"] is not None for case in cases):
        rows.append(("share of the data sheet's peak", [f"{c['peak_use']:.0%}" for c in cases]))
    if any(case["dispatch_ms"] is not None for case in cases):
        rows += [RULE, row("host ms a step", "dispatch_ms")]
    notes = [
        f"Host: {number(numbers['host_ms'])} ms a step for the {numbers['host_arrays']:,} arrays "
        f"of {numbers['host_model']}'s state, donated, through a",
        "program that only adds 1 to one number in each.",
        *notes,
    ]
    if numbers["peer"]:
        rows += [
            RULE,
            row("open_clip, wall ms a step", "peer_step_ms"),
            row("open_clip, CPU ms a step", "peer_cpu_ms"),
            row("times faster, wall", "speedup"),
            row("times faster, CPU", "speedup_cpu"),
        ]
        notes += [
            f"Peer: {numbers['peer']}; InfoNCE and AdamW on the same",
            "shapes, image tower locked where ours is; without heads, prototypes and augmentation.",
        ]
    title = [
        f"{numbers['model']} in {numbers['dtype']}, batch {numbers['batch']}, of "
        f"{numbers['config']}; {options.repeats} alternating repeats of {options.steps} steps, "
        "medians",
        machine.line(numbers["machine"]),
    ]
    return Report(title, [case["phase"] for case in cases], rows, notes, numbers)
