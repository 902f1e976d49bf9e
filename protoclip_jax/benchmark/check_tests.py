"""`tests` of the check: those whose outcome depends on the device."""

import re
import subprocess
import sys
from typing import Any

from protoclip_jax.benchmark.check_plan import ROOT, PartFailure, Save, Settings

COMMAND = ("-m", "pytest", "-m", "accelerator", "-vv", "--color=no", "--tb=short", "-rfE")
SMALL = ("tests/objectives/test_info_nce.py",)
_OUTCOME = re.compile(r"^(\S+?::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b")
_REASON = re.compile(r"^(?:FAILED|ERROR) (\S+?::.+?) - (.+)$")
_LONGEST = 160


def run(settings: Settings, save: Save) -> dict[str, Any]:
    """Runs the tests marked `accelerator`.

    Raises:
      PartFailure: some fail, or there are none.
    """
    where = SMALL if settings.small else ()
    with subprocess.Popen(
        [sys.executable, *COMMAND, *where],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        numbers = follow(process.stdout, save)
    wrong = numbers["failed"]
    if wrong:
        told = "; ".join(f"{name}: {why or 'failed'}" for name, why in list(wrong.items())[:5])
        raise PartFailure(f"{len(wrong)} of {len(wrong) + numbers['passed']} fail: {told}")
    if process.returncode or not numbers["passed"]:
        raise PartFailure(f"pytest ended with exit code {process.returncode}")
    return numbers


def follow(lines, save: Save) -> dict[str, Any]:
    """Counts outcomes while pytest tells them; passes its lines on to the log.

    Returns:
      passed, skipped: numbers of tests.
      failed: the reason by the test's name.
    """
    numbers: dict[str, Any] = {"passed": 0, "skipped": 0, "failed": {}}
    for line in lines:
        print(line, end="", flush=True)
        if outcome := _OUTCOME.match(line):
            name, what = outcome.groups()
            if what in ("PASSED", "SKIPPED"):
                numbers[what.lower()] += 1
            else:
                numbers["failed"].setdefault(name, "")
            save(numbers)
        elif (why := _REASON.match(line)) and why[1] in numbers["failed"]:
            numbers["failed"][why[1]] = why[2].strip()[:_LONGEST]
            save(numbers)
    return numbers
