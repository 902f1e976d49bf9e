"""What a source does not offer: counts by reason, with a few examples."""

import dataclasses
import re

_EXAMPLES = 5
_LONGEST = 200  # characters of an example
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def shown(name: str) -> str:
    r"""A foreign name as every output can show it, on one line.

    Bytes that are no UTF-8 are written as \xe9, control characters as \x1b.
    """
    if name.isascii() and name.isprintable():
        return name
    data = name.encode(errors="surrogateescape" if _escaped_only(name) else "surrogatepass")
    return _CONTROLS.sub(
        lambda found: ascii(found[0])[1:-1], data.decode(errors="backslashreplace")
    )


def _escaped_only(name: str) -> bool:
    """Whether all lone surrogates stand for bytes, as in names of files."""
    return not re.search("[\ud800-\udc7f\udd00-\udfff]", name)


@dataclasses.dataclass
class LeftOut:
    """Entries left out for one reason: how many, and what the first are called."""

    count: int = 0
    examples: list[str] = dataclasses.field(default_factory=list)

    def add(self, name: str) -> None:
        """Counts one more."""
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            name = shown(name)
            if len(name) > _LONGEST:
                name = f"{name[: _LONGEST // 2]}...{name[-_LONGEST // 2 :]}"
            self.examples.append(name)

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.examples) else ""
        return f"{self.count} ({', '.join(self.examples)}{more})"
