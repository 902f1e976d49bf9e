"""Joining the processes of a run, and ending together when one of them fails."""

import atexit
import dataclasses
import os
import sys
import threading
from collections.abc import Callable

import jax

from protoclip_jax.config import ConfigError
from protoclip_jax.distributed import cluster, talk
from protoclip_jax.distributed.relay import Relay, wait_for
from protoclip_jax.distributed.watch import LOST, Watch

JOIN_SECONDS = 300  # that a process waits for the others at the start
_JAX_HEARTBEAT = 100  # the watch is faster; this is for the case that it cannot run

_watch: Watch | None = None


def join(
    coordinator: str | None,
    count: int | None,
    index: int | None,
    *,
    search: bool = False,
    over: Callable[[], str | None] = lambda: None,
) -> bool:
    """Joins the processes of a run, from flags or the environment; call it before any JAX.

    Args:
        coordinator: host:port of process 0.
        count: Processes of the run; 1 by itself runs alone.
        index: This process's number.
        search: Look for the hosts of a Cloud TPU slice where the environment names none.
        over: Asked where the others do not come: words that the run is over, in which case this
            process ends with 0, or None. A scheduler may start one process again that died after
            the others had ended; it would come back without end.

    Returns:
        Whether there are several processes.

    Raises:
        ConfigError: Some of the three are given and some are not, or the others do not come.
    """
    global _watch
    member, notes = cluster.find(coordinator, count, index, search=search)
    for note in notes:
        _say(note)
    if member is None:
        return False
    member = _located(member)
    relay = None if member.index == 0 else Relay(member.coordinator)
    _connect(member, relay, over)
    hosts = _hosts(member.count, member.index)
    _watch = Watch(talk.client(), member.index, hosts, relay)
    atexit.register(_watch.close)
    return True


def _located(member: cluster.Member) -> cluster.Member:
    """Fills in what JAX reads of the environment: address of process 0, numbers."""
    from jax._src import clusters

    address, count, index, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        member.coordinator, member.count, member.index, [], None, JOIN_SECONDS
    )
    if address is None or count is None or index is None:
        raise ConfigError(
            "the other processes of this run cannot be found: give --coordinator, "
            "--num_processes and --process_id, or --num_processes=1 to run alone"
        )
    return dataclasses.replace(member, coordinator=address, count=count, index=index)


def _connect(member: cluster.Member, relay: Relay | None, over: Callable[[], str | None]) -> None:
    """Starts JAX's coordination; says what is waited for, and gives up in a line."""
    rest = member.count - 1
    others = "the other process" if rest == 1 else f"the other {rest} processes"

    def waiting(seconds: float) -> None:
        _say(
            f"process {member.index} of {member.count} waits for {others} ({seconds:.0f} of "
            f"{JOIN_SECONDS} s), which {member.found} named; process 0 is at "
            f"{member.coordinator}. --num_processes=1 runs alone."
        )

    if relay is not None and not wait_for(relay, JOIN_SECONDS, waiting):
        _give_up(member, others, over)
    # Ours is the only handler of SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    _reach_relay_without_proxy()
    with _Patience(JOIN_SECONDS, waiting, lambda: _give_up(member, others, over)):
        jax.distributed.initialize(
            relay.address if relay else member.coordinator,
            member.count,
            member.index,
            # An empty list is all GPUs; None would be one, under Slurm and Open MPI.
            local_device_ids=list(member.local_devices),
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=_JAX_HEARTBEAT,
            initialization_timeout=2 * JOIN_SECONDS,
        )


def _reach_relay_without_proxy() -> None:
    """Keeps gRPC from sending what goes to this machine through a proxy."""
    env, name = os.environ, "no_grpc_proxy"
    if any(env.get(proxy) for proxy in ("grpc_proxy", "https_proxy", "http_proxy")):
        env[name] = ",".join(filter(None, [env.get(name) or env.get("no_proxy"), "127.0.0.1"]))


class _Patience:
    """Inside the `with`: calls `waiting` now and then, and `give_up` when the time is over."""

    def __init__(self, seconds: float, waiting, give_up):
        self._seconds, self._waiting, self._give_up = seconds, waiting, give_up

    def __enter__(self):
        self._over = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        waited = 0.0
        while not self._over.wait(5 if not waited else 15):
            waited += 15 if waited else 5
            if waited >= self._seconds:
                self._give_up()
            self._waiting(waited)

    def __exit__(self, *_):
        self._over.set()


def _give_up(member: cluster.Member, others: str, over: Callable[[], str | None]) -> None:
    if text := over():
        _say(text)
        os._exit(0)
    _say(
        f"{others} did not come to {member.coordinator} within {JOIN_SECONDS} s. Start the same "
        "command on all of them, or --num_processes=1 to run alone"
    )
    os._exit(LOST)


def _hosts(count: int, index: int) -> list[str]:
    """The name of every process's host."""
    client = talk.client()
    client.key_value_set(f"{talk.PREFIX}/host/{index}", talk.host())
    return [
        client.blocking_key_value_get(f"{talk.PREFIX}/host/{process}", 60_000)
        for process in range(count)
    ]


def fail(error: BaseException, code: int) -> None:
    """Tells the other processes that this one cannot go on, and ends it; alone: does nothing.

    Args:
        error: What went wrong; its text is what they say too.
        code: Exit code of all processes.
    """
    if _watch is not None:
        text = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
        _watch.fail(text, code)


def wait_for_cause() -> None:
    """After an error of JAX's runtime: ends here if another process turns out to be lost.

    A lost process shows first as an error of a collective operation, in words of the network. It
    takes the watch up to half a minute to know. Alone: does nothing.
    """
    if _watch is not None:
        _watch.wait_for_cause()


def _say(text: str) -> None:
    print(f"protoclip_jax: {text}", file=sys.stderr, flush=True)
