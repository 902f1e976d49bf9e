"""What all processes of a run check together before the first step.

Processes that were started alike may still differ: another copy of the data on one host, an older
checkout, a folder that is not shared. Each would train something else, to the end, without a word.
"""

import contextlib
import json
import os
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from protoclip_jax import distributed
from protoclip_jax.config import ConfigError
from protoclip_jax.distributed import cluster
from protoclip_jax.storage.lock import locked
from protoclip_jax.storage.paths import AnyPath

MARKS = ".processes"  # folder in the workdir in which processes look for one another's marks
MARK_SECONDS = 90.0  # network file systems show a new file after up to a minute


def devices() -> str:
    """Compares the processes' devices; returns what there is, in a line.

    Raises:
        ConfigError: The processes have different numbers or kinds of devices.
    """
    local = jax.local_devices()
    mine = {
        "devices": f"{len(local)} x {local[0].device_kind}",
        "host": distributed.host(),
        "gpus": cluster.gpus_of_node(),
    }
    found = distributed.exchange(mine)
    compared = [{"devices": one["devices"]} for one in found]
    refuse_differences("the processes have different devices", compared)
    hosts = Counter(one["host"] for one in found)
    count = jax.device_count()
    line = f"{count} x {local[0].device_kind}"
    if len(found) > 1:
        line += f": {len(found)} processes on {len(hosts)} host(s), {len(local)} devices each"
    return "\n".join([line, *_idle(found, len(local))])


def _idle(found: list[dict], each: int) -> list[str]:
    """Lines about GPUs that no process of the run uses."""
    if jax.default_backend() == "tpu":
        return []
    used = Counter()
    there = {one["host"]: one["gpus"] for one in found}
    for one in found:
        used[one["host"]] += each if jax.default_backend() == "gpu" else 0
    return [
        f"warning: {there[host] - used[host]} of {there[host]} GPUs of {host} are not used: "
        + _why()
        for host in sorted(there)
        if used[host] < there[host]
    ]


def _why() -> str:
    if jax.default_backend() != "gpu":
        return 'JAX found no GPU that it can use (pip install "jax[cuda12]"; JAX_PLATFORMS)'
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return f"CUDA_VISIBLE_DEVICES={named}"
    return "the processes of that host do not see them"


def refuse_differences(what: str, found: list[dict[str, Any]]) -> None:
    """Refuses processes that differ in any entry.

    Args:
        what: the error's first words.
        found: the same entries from every process, as `distributed.exchange` gives them.

    Raises:
        ConfigError: Names each entry that differs, and who has what; the same on every process.
    """
    names = sorted(set().union(*found))
    lines = []
    for name in names:
        groups: dict[str, list[int]] = {}
        for process, entries in enumerate(found):
            groups.setdefault(json.dumps(entries.get(name)), []).append(process)
        if len(groups) > 1:
            has = "; ".join(f"{_numbered(group)} {value}" for value, group in groups.items())
            lines.append(f"{name}: {has}")
    if lines:
        raise ConfigError(f"{what}:\n  " + "\n  ".join(lines))


def _numbered(processes: list[int]) -> str:
    shown = ", ".join(map(str, processes[:8])) + (", ..." if len(processes) > 8 else "")
    return f"process {shown} has" if len(processes) == 1 else f"processes {shown} have"


def compare(what: str, mine: dict[str, Any]) -> None:
    """Exchanges entries with all processes and refuses differences.

    Args:
        what: what differs, for the error.
        mine: this process's entries; "host" is added.

    Raises:
        ConfigError: Names who has what.
    """
    found = distributed.exchange({"host": distributed.host(), "entries": mine})
    try:
        refuse_differences(what, [one["entries"] for one in found])
    except ConfigError as error:
        hosts = ", ".join(f"{number} is on {one['host']}" for number, one in enumerate(found[:16]))
        raise ConfigError(f"{error}\n  (process {hosts})") from None


@contextlib.contextmanager
def in_use(workdir: AnyPath) -> Iterator[None]:
    """Keeps other runs out of a workdir.

    Raises:
      ConfigError: another run is in it.
    """
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            try:
                stack.enter_context(locked(workdir))
            except ValueError as error:
                raise ConfigError(f"--workdir={error}") from error
        yield


def same_folder(workdir: epath.Path) -> None:
    """Makes sure that the workdir is one folder for all processes.

    Raises:
        ConfigError: A process does not see the mark that another one made there.
    """
    if jax.process_count() == 1:
        return
    marks = workdir / MARKS / distributed.broadcast(secrets.token_hex(8))
    marks.mkdir(parents=True, exist_ok=True)
    (marks / str(jax.process_index())).write_text(distributed.host())
    distributed.barrier()
    unseen = _unseen(marks)
    found = distributed.exchange({"host": distributed.host(), "unseen": unseen})
    if jax.process_index() == 0 or any(one["unseen"] for one in found):
        with contextlib.suppress(OSError):  # where it is not one folder, each removes its own
            marks.rmtree()
            (workdir / MARKS).rmdir()
    for process, one in enumerate(found):
        if one["unseen"]:
            other = one["unseen"][0]
            raise ConfigError(
                f"--workdir={workdir} is not one folder for all processes: process {process} on "
                f"{one['host']} does not see what process {other} on {found[other]['host']} "
                "writes there. Put it on a file system that all hosts share, or in a bucket"
            )


def _unseen(marks: epath.Path) -> list[int]:
    """Processes whose mark does not appear here in time."""
    missing, end = list(range(jax.process_count())), time.monotonic() + MARK_SECONDS
    while missing and time.monotonic() < end:
        # A listing asks the server again, where a single name may be remembered as missing.
        names = {path.name for path in marks.iterdir()}
        missing = [process for process in missing if str(process) not in names]
        if missing:
            time.sleep(0.5)
    return missing
