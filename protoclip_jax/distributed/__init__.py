"""Several processes as one run: joining them, talking, and ending together when one fails.

What a run of one process needs of this does nothing there and costs nothing.
"""

from protoclip_jax.distributed.joining import fail, join, wait_for_cause
from protoclip_jax.distributed.rows import Rows
from protoclip_jax.distributed.talk import barrier, broadcast, exchange, host, met_by_all
from protoclip_jax.distributed.watch import LOST

__all__ = [
    "LOST",
    "Rows",
    "barrier",
    "broadcast",
    "exchange",
    "fail",
    "host",
    "join",
    "met_by_all",
    "wait_for_cause",
]
