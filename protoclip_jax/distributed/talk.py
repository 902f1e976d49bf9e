"""What processes tell one another, as JSON through JAX's coordination service.

The devices have no part in it: nothing is compiled, and nobody waits for a step.
"""

import itertools
import json
import socket
from typing import Any

import jax

PREFIX = "protoclip_jax/talk"

_calls = itertools.count()  # every process makes the same calls in the same order


def met_by_all(event: str, seconds: float = 30) -> bool:
    """Whether every process comes here with the same event within so many seconds.

    It waits without the devices, which a process elsewhere may be waiting for. An event is asked
    about once in a run.
    """
    if jax.process_count() == 1:
        return True
    try:
        client().wait_at_barrier(f"protoclip_jax/{event}", int(1000 * seconds))
    except Exception as error:
        if "DEADLINE_EXCEEDED" in str(error):
            return False
        raise
    return True


def barrier(seconds: float = 3600) -> None:
    """Waits for all processes, without the devices; every process calls it the same times."""
    if jax.process_count() > 1:
        client().wait_at_barrier(f"{PREFIX}/barrier/{next(_calls)}", int(1000 * seconds))


def exchange(value: Any, seconds: float = 3600) -> list[Any]:
    """What every process gives, by process; JSON values, without the devices."""
    if jax.process_count() == 1:
        return [json.loads(json.dumps(value))]
    store, folder = client(), f"{PREFIX}/exchange/{next(_calls)}"
    store.key_value_set(f"{folder}/{jax.process_index()}", json.dumps(value))
    return [
        json.loads(store.blocking_key_value_get(f"{folder}/{process}", int(1000 * seconds)))
        for process in range(jax.process_count())
    ]


def broadcast(value: Any, seconds: float = 3600) -> Any:
    """What process 0 gives, on every process; JSON values, without the devices."""
    if jax.process_count() == 1:
        return value
    store, key = client(), f"{PREFIX}/broadcast/{next(_calls)}"
    if jax.process_index() == 0:
        store.key_value_set(key, json.dumps(value))
    return json.loads(store.blocking_key_value_get(key, int(1000 * seconds)))


def host() -> str:
    """What this machine is called."""
    return socket.gethostname()


def client():
    """JAX's coordination client; it has no public way to its key-value store."""
    from jax._src import distributed

    return distributed.global_state.client
