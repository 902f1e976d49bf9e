"""What a benchmark returns: a table for people, numbers for programs."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

GAP = "  "


@dataclasses.dataclass(frozen=True)
class Report:
    """A finished measurement.

    Attributes:
      title: lines above the table: what was measured, and on which machine.
      columns: headings of the measured cases.
      rows: (label, a cell for each column); an empty label is a rule.
      notes: lines below the table: what the numbers mean and what is missing.
      numbers: everything, as JSON takes it.
      code: exit code of the command.
    """

    title: Sequence[str]
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    notes: Sequence[str]
    numbers: Any
    code: int = 0

    def text(self) -> str:
        """The table as plain text."""
        first = max(len(label) for label, _ in self.rows)
        widths = [
            max(len(heading), *(len(cells[index]) for _, cells in self.rows if cells))
            for index, heading in enumerate(self.columns)
        ]
        rule = "-" * (first + sum(widths) + len(GAP) * len(widths))

        def line(label: str, cells: Sequence[str]) -> str:
            right = "".join(
                f"{GAP}{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)
            )
            return f"{label:<{first}}{right}".rstrip()

        body = [line(label, cells) if cells else rule for label, cells in self.rows]
        below = ["", *self.notes] if self.notes else []
        return "\n".join([*self.title, "", line("", self.columns), rule, *body, *below])


RULE: tuple[str, Sequence[str]] = ("", ())


def number(value: float | int | None, unit: str = "", digits: int = 3) -> str:
    """A value with so many significant digits; "-" where there is none."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}{unit}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}{unit}"
    shown = f"{value:.{digits}g}"
    if "e" in shown:
        return f"{shown}{unit}"
    # %g drops zeros at the end, which would look like another precision.
    whole, _, _ = shown.lstrip("-").partition(".")
    decimals = digits - len(whole) if whole != "0" else len(shown.partition(".")[2])
    return f"{value:.{decimals}f}{unit}"


def say(text: str) -> None:
    """Tells what goes on, beside the table or JSON."""
    print(text, file=sys.stderr, flush=True)
