"""What a source does not offer: counts by reason, with a few examples."""

import dataclasses

_EXAMPLES = 5


@dataclasses.dataclass
class LeftOut:
    """Entries left out for one reason: how many, and what the first are called."""

    count: int = 0
    examples: list[str] = dataclasses.field(default_factory=list)

    def add(self, name: str) -> None:
        """Counts one more."""
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(name)

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.examples) else ""
        return f"{self.count} ({', '.join(self.examples)}{more})"
