"""Standard output and error as every command uses them."""

import os
import sys

# For files of names too: what cannot be written is escaped, as in \xe4 or \udce9.
ESCAPED = "backslashreplace"

CUT = 141  # the exit code of a command whose reader has left, as a shell gives it


def show_any_text() -> None:
    """Lets every text be printed, whatever the terminal's encoding: called first by each command.

    Names of files and captions hold letters that an ASCII output has not, and names that are no
    UTF-8 hold what no encoding has; neither is worth a run.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where a notebook stands in
            stream.reconfigure(errors=ESCAPED)
    if not (sys.stderr and sys.stderr.isatty()):
        # Bars of downloads, of a library that is imported later.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def cut_off() -> int:
    """Ends quietly after a `BrokenPipeError` of standard output: `| head` has read enough.

    Returns:
      The exit code.
    """
    # What is left in the buffer would be written, and told of, at the end of the process.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return CUT
