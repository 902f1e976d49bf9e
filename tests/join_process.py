"""Joins a run and talks, started by tests.

  python tests/join_process.py WHAT [coordinator count index]

WHAT: talk prints what was heard as JSON; wait sleeps until the watch ends it; fail-N fails with N;
lone waits 2 s for the others, lone-WORD does so in a run that is over.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[1]))


def main(what: str, *flags: str) -> None:
    from protoclip_jax import distributed

    place = (flags[0], int(flags[1]), int(flags[2])) if flags else (None, None, None)
    if what.startswith("lone"):
        from protoclip_jax.distributed import joining

        joining.JOIN_SECONDS = 2
    several = distributed.join(*place, over=lambda: what.partition("-")[2] or None)
    import jax

    index = jax.process_index()
    if what == "talk":
        heard = {
            "several": several,
            "count": jax.process_count(),
            "visible": jax.config._read("jax_cuda_visible_devices"),
            "exchanged": distributed.exchange({"from": index}),
            "broadcast": distributed.broadcast([index, "x"]),
            "met": distributed.met_by_all("both"),
            "alone": index == 0 and not distributed.met_by_all("one", 1) if several else None,
        }
        distributed.barrier()
        print(json.dumps(heard), flush=True)
        return
    print("joined", flush=True)
    if what.startswith("fail"):
        distributed.fail(ValueError("no way"), int(what.partition("-")[2]))
    time.sleep(100)


if __name__ == "__main__":
    main(*sys.argv[1:])
