"""Trains ProtoCLIP: starts a run in a workdir, or resumes the one that is there.

  python -m protoclip_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

Any option of a recipe is changed by --config.SECTION.NAME=VALUE, for example
  --config.optimizer.batch=256 --config.data.teacher=none
(protoclip_jax/config.py lists them all). --dry_run shows what would run, without training.
The same command goes on where a run stopped, or says that it is finished.

Several processes (a pod, a cluster) are one run: each starts the same command, and finds the others
by the environment of Slurm, Open MPI or GKE's TPUs, by --distributed on a Cloud TPU slice, or by
--coordinator, --num_processes and --process_id. The workdir must be one folder for all.

Exit codes: 0 done; 1 the run cannot go on (not finite, no checkpoint can be written, its data has
changed or cannot be read, or the machine fails it); 2 this cannot be run; 75 saved and left on
SIGTERM or SIGINT, or stopped by SIGTERM before there was anything to save, or a bucket gave no
answer for minutes: start the same command again; 76 another process of the run was lost, or did not
come: start the same command again; 130 interrupted at once.
"""

from protoclip_jax import signals

if __name__ == "__main__":  # not in the workers that a run starts
    signals.install()  # before all that takes time

import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

# XLA's and orbax's chatter would break the progress bar; errors still show.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags

from protoclip_jax import idle_options, machine_faults
from protoclip_jax.config import Config, ConfigError
from protoclip_jax.recipe import OVERRIDE, configured, option_types
from protoclip_jax.storage.home import at_home
from protoclip_jax.storage.screen import show_any_text
from protoclip_jax.suggestions import no_such_word

LEFT = signals.LEFT
# By name: their modules are imported late.
CANNOT_GO_ON = ("CheckpointError", "SourceError", "SourceChanged")

_CONFIG = flags.DEFINE_string("config", None, "A recipe, for example configs/quickstart.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run, or gs://BUCKET/FOLDER.")
_PROFILE = flags.DEFINE_string("profile", None, "FIRST:LAST, steps to trace to WORKDIR/profile.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join the other hosts of this Cloud TPU slice."
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "This process's number, from 0.")
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Show shapes, memory, schedule, phases, data; no training."
)


def run(argv: Sequence) -> int:
    """Trains, from what `parse` made; returns an exit code of those at the head of this file."""
    try:
        with signals.raised():
            code = _run(argv)
            signals.over(code)
    except KeyboardInterrupt as error:  # between two lines, outside of what `_run` catches
        code = _told(error)
    return code


def _run(argv: Sequence) -> int:
    *_, overrides = argv
    distributed = libraries = None
    try:
        if _CONFIG.value is None:
            raise ConfigError("--config=RECIPE is missing: --config=configs/quickstart.py")
        config = configured(_CONFIG.value, overrides, num_devices=None)
        if too_few := machine_faults.raise_open_files():
            raise ConfigError(too_few)
        if _WORKDIR.value is None and not _DRY_RUN.value:
            raise ConfigError("--workdir=FOLDER is missing, for example --workdir=runs/quickstart")
        workdir = _workdir(_WORKDIR.value)
        # Imported late, so that a wrong option is refused without waiting for JAX.
        import jax

        if jax.config.jax_enable_x64:
            raise ConfigError(
                "JAX_ENABLE_X64 is set: training is in float32 or bfloat16 (model.dtype), and "
                "would be another run. Unset it"
            )
        from protoclip_jax import distributed

        distributed.join(
            _COORDINATOR.value,
            _NUM_PROCESSES.value,
            _PROCESS_ID.value,
            search=_DISTRIBUTED.value,
            over=lambda: _over(config, workdir),
        )
        from protoclip_jax import compilation_cache
        from protoclip_jax.training import agreement, dry_run, loop, messages

        libraries = messages.take_over()
        compilation_cache.turn_on()
        _check_platform()
        devices = agreement.devices()
        config = configured(_CONFIG.value, overrides, jax.device_count())
        if jax.process_index() == 0:
            for line in idle_options.told(config):
                print(f"protoclip_jax: {line}", file=sys.stderr)
        if _DRY_RUN.value:
            # The plan is of use also where the data are not at hand.
            print(dry_run.describe(config), flush=True)
            print(f"\n{dry_run.data(config)}")
        else:
            if jax.process_index() == 0:
                print(f"protoclip_jax: {devices}", file=sys.stderr)
            loop.train(config, workdir, _PROFILE.value, libraries)
    except BaseException as error:
        signals.over()
        if distributed is not None and _of_runtime(error):
            distributed.wait_for_cause()
        code = _told(error, "" if libraries is None else libraries.where())
        if code is None:
            traceback.print_exc()
            code = 1
        signals.over(code)
        # Processes that leave on a signal do so together; of anything else the others are told.
        if distributed is not None and type(error).__name__ != "Leaving":
            distributed.fail(error, code)
        return code
    return 0


def _over(config: Config, workdir) -> str | None:
    """Says so where the run is over: the other processes have ended."""
    from protoclip_jax.training import finished

    if workdir is None or not finished.is_marked(workdir, config):
        return None
    return f"{workdir} is finished: {config.total_steps} steps. The other processes have ended"


def _check_platform() -> None:
    """Wakes the devices up.

    Raises:
      ConfigError: there are none of the kind that the environment asks for.
    """
    import jax

    try:
        jax.local_devices()
    except RuntimeError as error:
        named = os.environ.get("JAX_PLATFORMS")
        if not named:
            raise
        reason = str(error).splitlines()[0][:300]
        raise ConfigError(
            f"JAX_PLATFORMS={named}: {reason}. Unset it to use what there is"
        ) from error


def _of_runtime(error: BaseException) -> bool:
    """Whether an error may come from a collective operation that lost a process."""
    return type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and (
        "RESOURCE_EXHAUSTED" not in str(error)
    )


def _workdir(text: str | None):
    """The path that was named.

    Raises:
      ConfigError: nothing can be written there.
    """
    # Imported late, so that a wrong option is refused at once.
    from protoclip_jax.storage.paths import check_writable, workdir_at

    try:
        if text is None:
            return None
        folder = workdir_at(text)
        check_writable(folder)
        return folder
    except ValueError as error:
        raise ConfigError(f"--workdir={error}") from error


def _told(error: BaseException, more: str = "") -> int | None:
    """Says in a line what ended the run; its exit code, or None where that is a fault of ours.

    Args:
      error: what ended it.
      more: where more is told, for errors that libraries tell of too.
    """
    name = type(error).__name__
    if isinstance(error, ConfigError):
        print(f"protoclip_jax: {error}", file=sys.stderr)
        return 2
    if name == "Unreachable":
        print(
            f"protoclip_jax: {error}; the same command goes on from the last checkpoint",
            file=sys.stderr,
        )
        return LEFT
    if isinstance(error, FloatingPointError) or name in CANNOT_GO_ON:
        print(f"protoclip_jax: {error}{more}", file=sys.stderr)
        return 1
    if name == "Leaving":
        print(f"\nprotoclip_jax: {error}; the same command goes on there", file=sys.stderr)
        return LEFT
    if isinstance(error, KeyboardInterrupt):
        print("\nStopped. The same command goes on from the last checkpoint.", file=sys.stderr)
        return getattr(error, "code", signals.INTERRUPTED)
    if (line := machine_faults.told(error)) is not None:
        print(f"protoclip_jax: {line}", file=sys.stderr)
        return 1
    return None


def parse(argv: Sequence[str]) -> list:
    """Parses flags; what starts with --config. is left for `run`, as one list at the end.

    A word that is no option ends the program with code 2: a long dash or a missing --config. would
    else start another run than the one that was asked for.
    """
    overrides = [text for text in argv if text.startswith(OVERRIDE)]
    rest = [text for text in argv if not text.startswith(OVERRIDE)]
    try:
        program, *words = flags.FLAGS(rest)
        for name in ("config", "workdir"):
            if flags.FLAGS[name].value is not None:
                flags.FLAGS[name].value = _path(name, flags.FLAGS[name].value)
    except flags.UnrecognizedFlagError as error:
        meant = (text for text in rest[1:] if _name(text) == error.flagname)
        _refuse(_no_such_word(next(meant, f"--{error.flagname}")))
    except (flags.Error, ValueError) as error:
        _refuse(str(error).splitlines()[0])
    for override in overrides:
        if "=" not in override:
            _refuse(f"{override}: write {override}={words[0] if words else 'VALUE'}")
    if words:
        _refuse(_no_such_word(words[0]))
    for line in _twice(argv[1:]):
        print(f"protoclip_jax: {line}", file=sys.stderr)
    return [program, overrides]


def _twice(words: Sequence[str]) -> list[str]:
    """A line for each option that is given two values."""
    last, lines = {}, []
    for word in words:
        name, equals, value = word.lstrip("-").partition("=")
        if equals and last.setdefault(name, value) != value:
            lines.append(f"--{name} is given as {last[name]} and as {value}: the latter counts")
        last[name] = value
    return lines


def _name(word: str) -> str:
    return word.lstrip("-").partition("=")[0]


def _path(name: str, text: str) -> str:
    if not text:
        raise ValueError(f"--{name}= is empty")
    return at_home(text)


def _no_such_word(word: str) -> str:
    options = [path for path, _, _ in option_types()]
    here = flags.FLAGS.find_module_defining_flag("workdir")
    ours = [flag.name for flag in flags.FLAGS.get_flags_for_module(here)]
    return no_such_word(word, options, ours)


def _refuse(message: str) -> NoReturn:
    print(f"protoclip_jax: {message}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    """The console entry."""
    show_any_text()
    app.run(run, flags_parser=parse)


if __name__ == "__main__":
    main()
