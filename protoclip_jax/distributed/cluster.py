"""How a process finds the others of its run: flags, Slurm, Open MPI, Cloud TPU."""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path

from protoclip_jax.config import ConfigError

# What JAX reads of a Slurm step. An allocation, or a shell inside one, has only some of them.
SLURM_STEP = (
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
)


@dataclasses.dataclass(frozen=True)
class Member:
    """A process's place among the processes of a run.

    Attributes:
        coordinator: host:port of process 0; None lets JAX find it.
        count: Processes of the run; None lets JAX find it.
        index: Number of this process; None lets JAX find it.
        local_devices: Numbers of the GPUs that this process takes of those it sees; empty for all
            of them. JAX's own default under Slurm and Open MPI is one GPU a process.
        found: What named the others, for messages.
        notes: What a person should know, a line each.
    """

    coordinator: str | None
    count: int | None
    index: int | None
    local_devices: tuple[int, ...] = ()
    found: str = "--coordinator, --num_processes and --process_id"
    notes: tuple[str, ...] = ()


def find(
    coordinator: str | None,
    count: int | None,
    index: int | None,
    *,
    search: bool = False,
    environment: Mapping[str, str] | None = None,
    gpus: int | None = None,
) -> tuple[Member | None, tuple[str, ...]]:
    """This process's place in a run of several, from flags or the environment.

    Args:
        coordinator: host:port of process 0.
        count: Processes of the run; 1 alone means a run of one, whatever the environment says.
        index: This process's number.
        search: Let JAX look for the others even where the environment names none: the hosts of a
            Cloud TPU slice know each other from its metadata.
        environment: Variables; the process's own by default.
        gpus: GPUs of this node; counted by default.

    Returns:
        The place, or None for a run of one process; and lines to tell.

    Raises:
        ConfigError: Some of the three flags are given and some are not.
    """
    env = os.environ if environment is None else environment
    if count == 1 and coordinator is None and index in (None, 0):
        return None, ()
    given = [value is not None for value in (coordinator, count, index)]
    if all(given):
        if not 0 <= index < count:
            raise ConfigError(f"--process_id={index} must lie in 0 .. {count - 1}")
        if not re.fullmatch(r".+:\d+", coordinator):
            raise ConfigError(f"--coordinator={coordinator}: write host:port")
        return (None if count == 1 else Member(coordinator, count, index)), ()
    if any(given):
        raise ConfigError(
            "--coordinator, --num_processes and --process_id go together "
            "(--num_processes=1 by itself runs alone)"
        )
    for look in (_slurm, _open_mpi):
        member, notes = look(env, gpus)
        if member or notes:
            return member, notes
    if search or len(env.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1:
        return Member(None, None, None, found="the TPU slice's metadata"), ()
    return None, ()


def _slurm(env: Mapping[str, str], gpus: int | None) -> tuple[Member | None, tuple[str, ...]]:
    tasks = _number(env, "SLURM_STEP_NUM_TASKS") or _number(env, "SLURM_NTASKS") or 1
    if tasks == 1 or "SLURM_PROCID" not in env:
        return None, ()
    missing = [name for name in SLURM_STEP if name not in env]
    if missing:
        note = (
            f"Slurm's variables name {tasks} tasks, but this process is not one that srun started "
            f"({', '.join(missing)} not set): it runs alone. Start it with srun to use them all."
        )
        return None, (note,)
    local = _local_tasks(env.get("SLURM_STEP_TASKS_PER_NODE", ""), _number(env, "SLURM_NODEID"))
    local = local or _number(env, "SLURM_NTASKS_PER_NODE") or 1
    on_node = _number(env, "SLURM_GPUS_ON_NODE")
    chosen, notes = _share(env, int(env["SLURM_LOCALID"]), local, gpus, on_node)
    found = f"Slurm (SLURM_NTASKS={tasks}, SLURM_PROCID={env['SLURM_PROCID']})"
    return Member(None, tasks, int(env["SLURM_PROCID"]), chosen, found, notes), notes


def _open_mpi(env: Mapping[str, str], gpus: int | None) -> tuple[Member | None, tuple[str, ...]]:
    count = _number(env, "OMPI_COMM_WORLD_SIZE") or 1
    if count == 1:
        return None, ()
    if "OMPI_MCA_orte_hnp_uri" not in env or "OMPI_COMM_WORLD_RANK" not in env:
        note = (
            f"Open MPI's variables name {count} processes, but not where the first of them is "
            "(OMPI_MCA_orte_hnp_uri): it runs alone. Start it with mpirun of Open MPI 4, or give "
            "--coordinator, --num_processes and --process_id."
        )
        return None, (note,)
    local = _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE") or 1
    mine = _number(env, "OMPI_COMM_WORLD_LOCAL_RANK") or 0
    chosen, notes = _share(env, mine, local, gpus, None)
    rank = int(env["OMPI_COMM_WORLD_RANK"])
    found = f"Open MPI (OMPI_COMM_WORLD_SIZE={count}, OMPI_COMM_WORLD_RANK={rank})"
    return Member(None, count, rank, chosen, found, notes), notes


def _share(
    env: Mapping[str, str], local: int, tasks: int, gpus: int | None, allocated: int | None
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Which of the GPUs that a task sees are its own: all, or its part of what all tasks see.

    Returns:
        Numbers among the visible GPUs, empty for all; and lines to tell.
    """
    if tasks <= 1:
        return (), ()
    on_node = gpus_of_node() if gpus is None else gpus
    named = env.get("CUDA_VISIBLE_DEVICES")
    visible = on_node if named is None else len([part for part in named.split(",") if part.strip()])
    if not visible:
        return (), ()
    if visible < (allocated or on_node):
        return (), ()  # the scheduler has given each task its own already (--gpus-per-task)
    if visible < tasks:
        return (local % visible,), (
            f"{tasks} tasks share the {visible} GPUs of this node: start one task a node.",
        )
    each = visible // tasks
    rest = visible - each * tasks
    notes = ()
    if rest:
        notes = (
            f"{rest} of this node's {visible} GPUs are not used: {tasks} tasks do not divide them. "
            "Start one task a node, which drives them all.",
        )
    return tuple(range(local * each, (local + 1) * each)), notes


def gpus_of_node() -> int:
    """NVIDIA GPUs that the kernel shows, whatever a process may use of them."""
    return len([path for path in Path("/dev").glob("nvidia*") if path.name[6:].isdecimal()])


def _local_tasks(text: str, node: int | None) -> int | None:
    """Tasks of a node in Slurm's notation: "2(x3),1" is 2, 2, 2, 1."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if found is None:
            return None
        counts += [int(found[1])] * int(found[2] or 1)
    if node is not None and node < len(counts):
        return counts[node]
    return max(counts)


def _number(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name, "")
    return int(text) if text.isdecimal() else None
