"""A part of `check`, in its own process: python -m protoclip_jax.benchmark.check_part NAME RESULT.

It imports what it needs, and waits for a line of JSON with its settings before it touches a
device: so it can be started while another part still runs. Numbers go to the file RESULT, also
those of a part that is ended before its end.
"""

import importlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from protoclip_jax.benchmark.check_plan import PartFailure, Settings, part_named
from protoclip_jax.storage import atomic


def main(arguments: Sequence[str]) -> int:
    """Runs the part; returns 0, or 1 when it failed."""
    name, result = arguments
    missing = module = None
    try:
        module = importlib.import_module(f"protoclip_jax.benchmark.{part_named(name).module}")
    except ImportError as error:
        missing = error
    told = sys.stdin.readline()
    if not told:
        return 1  # whoever started this is gone
    threading.Thread(target=_end_with_parent, daemon=True).start()
    found: dict[str, Any] = {"numbers": {}, "failure": None}

    def save(numbers: dict[str, Any]) -> None:
        found["numbers"] = numbers
        atomic.write_json(Path(result), found)

    try:
        if missing is not None:
            raise missing
        from protoclip_jax import compilation_cache

        compilation_cache.turn_on()
        save(module.run(Settings(**json.loads(told)), save))
    except (Exception, SystemExit) as error:
        if not isinstance(error, PartFailure):
            traceback.print_exc()
        found["failure"] = reason(error)
        save(found["numbers"])
        return 1
    return 0


def reason(error: BaseException) -> str:
    """What went wrong, in a line."""
    if isinstance(error, PartFailure):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"needs {error.name.partition('.')[0]}, which is not installed"
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _end_with_parent() -> None:
    """Ends this process and what it started when the one that started it is gone."""
    # Not by sys.stdin, whose lock would still be held when the interpreter ends.
    while os.read(0, 1):
        pass
    if os.getpgrp() == os.getpid():  # a group of its own, as check_runner.py starts it
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
