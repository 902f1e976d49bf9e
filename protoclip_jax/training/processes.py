"""Several processes as one run: joining them, talking, and ending together when one fails."""

import atexit
import contextlib
import json
import os
import sys
import threading
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from protoclip_jax.config import ConfigError

# Seconds without a sign of life after which the others end a run.
HEARTBEAT = 40

_FAILURE = "protoclip_jax/failure"
_POLL_MS = 1_000
_over = threading.Event()


def join(
    coordinator: str | None, count: int | None, index: int | None, *, search: bool = False
) -> bool:
    """Joins the processes of a run, from flags or the environment; call it before any JAX.

    Slurm, Open MPI and TPU pods are found in the environment by JAX itself.

    Args:
      coordinator: host:port of process 0.
      count: processes of the run.
      index: this process's number.
      search: let JAX look for the others even where the environment names none: the hosts of a
        Cloud TPU slice know each other from its metadata.

    Returns:
      Whether there are several processes.

    Raises:
      ConfigError: some of the three are given and some are not.
    """
    given = [value is not None for value in (coordinator, count, index)]
    if any(given) and not all(given):
        raise ConfigError("--coordinator, --num_processes and --process_id go together")
    if not (any(given) or search or in_cluster()):
        return False
    jax.distributed.initialize(
        coordinator, count, index, heartbeat_timeout_seconds=HEARTBEAT, initialization_timeout=300
    )
    watcher = threading.Thread(target=_watch, daemon=True)
    watcher.start()
    atexit.register(_leave, watcher)
    return True


def _leave(watcher: threading.Thread) -> None:
    """Ends the watcher before the client that it waits on goes away."""
    _over.set()
    watcher.join(5 * _POLL_MS / 1000)


def in_cluster(environment: dict[str, str] | None = None) -> bool:
    """Whether the environment says that this is one of several processes."""
    env = os.environ if environment is None else environment

    def number(name: str) -> int:
        text = env.get(name, "")
        return int(text) if text.isdecimal() else 1

    if number("SLURM_NTASKS") > 1 and "SLURM_PROCID" in env:
        return True
    if number("OMPI_COMM_WORLD_SIZE") > 1:
        return True
    return len(env.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1


def fail(error: BaseException, code: int) -> None:
    """Tells the other processes that this one cannot go on, and ends it; alone: does nothing.

    Args:
      error: what went wrong; its text is what they say too.
      code: exit code of this process.
    """
    client = _client()
    if client is None:
        return
    message = f"process {jax.process_index()}: {type(error).__name__}: {error}"
    with contextlib.suppress(Exception):  # the first failure counts, the others follow from it
        client.key_value_set(_FAILURE, message)
    time.sleep(2 * _POLL_MS / 1000)  # process 0 keeps the store until the others have read it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # an ordinary end would wait for the others


def met_by_all(event: str, seconds: float = 30) -> bool:
    """Whether every process comes here with the same event within so many seconds.

    It waits without the devices, which a process elsewhere may be waiting for. An event is asked
    about once in a run.
    """
    client = _client()
    if client is None or jax.process_count() == 1:
        return True
    try:
        client.wait_at_barrier(f"protoclip_jax/{event}", int(1000 * seconds))
    except Exception as error:
        if "DEADLINE_EXCEEDED" in str(error):
            return False
        raise
    return True


def from_first(value: Any) -> Any:
    """What process 0 gives, on every process; JSON values."""
    if jax.process_count() == 1:
        return value
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    block = np.zeros(length, np.uint8)
    if jax.process_index() == 0:
        block[:] = data
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(block))))


def _watch() -> None:
    """Ends this process with the message of the one that failed."""
    client, mine = _client(), f"process {jax.process_index()}:"
    while client is not None and not _over.is_set():
        try:
            message = client.blocking_key_value_get(_FAILURE, _POLL_MS)
        except Exception as error:
            if "DEADLINE_EXCEEDED" in str(error):
                continue
            return  # the coordinator is gone: the heartbeat ends the process
        if not message.startswith(mine):
            print(f"\nprotoclip_jax: {message}; this process ends too", file=sys.stderr, flush=True)
            if jax.process_index() == 0:  # it keeps the store: the others end first
                time.sleep(4 * _POLL_MS / 1000)
            os._exit(1)  # the main thread may hang in a collective operation
        return


def _client():
    from jax._src import distributed  # JAX has no public way to the key-value store

    return distributed.global_state.client
