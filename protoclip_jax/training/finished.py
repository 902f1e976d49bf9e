"""A mark in the workdir that a run is over, read by a process for which no other one comes.

A scheduler may start one process of a finished run again, when that process died after the others
had ended. It would wait for them in vain, leave with "another process did not come", and be started
again, without end. Where all come, nobody asks for the mark: they look at the checkpoints.
"""

import json

import jax

from protoclip_jax import distributed
from protoclip_jax.config import Config, ConfigError
from protoclip_jax.storage import objects
from protoclip_jax.storage.atomic import write_json
from protoclip_jax.storage.paths import AnyPath
from protoclip_jax.training import record

FILE = "finished.json"


def mark(workdir: AnyPath, config: Config) -> None:
    """Says that all is done and saved; no process goes on before that is written."""
    if jax.process_index() == 0:
        write_json(workdir / FILE, {"steps": config.total_steps, **record.meta(config)})
    distributed.barrier()


def refuse_lost(workdir: AnyPath) -> None:
    """For a run without checkpoints: refuses to begin over one that was over.

    Raises:
      ConfigError: the mark is there, so that there were checkpoints.
    """
    if objects.is_file(workdir / FILE):
        raise ConfigError(
            f"{workdir} is of a finished run, whose checkpoints are gone: to train anew would "
            f"replace its numbers. Give another --workdir, or remove {FILE}"
        )


def is_marked(workdir: AnyPath, config: Config) -> bool:
    """Whether this very run is over: the mark is of this recipe, and its last checkpoint is there.

    A mark that cannot be read is none: the run is looked at as any other.
    """
    try:
        found = json.loads(objects.read_text(workdir / FILE))
        steps, stored = found["steps"], found["recipe"]
        differences = record.changes(stored, record.meta(config)["recipe"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    if steps != config.total_steps or differences:
        return False
    return objects.is_file(workdir / "checkpoints" / str(steps))
