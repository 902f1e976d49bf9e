"""What a teacher file says of itself, in a small JSON beside it: which pairs it was made for."""

import dataclasses
import json
import os
from pathlib import Path

from protoclip_jax.data.sources import PairSource
from protoclip_jax.storage import objects
from protoclip_jax.storage.atomic import write_json

FORMAT = "protoclip_jax teacher"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class TeacherNote:
    """Where the numbers of a teacher file come from.

    Attributes:
      source: name of the pairs, for people.
      source_fingerprint: of the pairs and their order, limit and seed included.
      pairs: how many.
      encoder: what made the features.
      dimensions: numbers in a row.
      numbers: fingerprint of the file's content, so that another file beside it is noticed.
    """

    source: str
    source_fingerprint: str
    pairs: int
    encoder: str
    dimensions: int
    numbers: str

    def check(self, path: str | Path, numbers: str, source: PairSource | None) -> None:
        """Compares with the file beside it, and with the pairs that it is to be used for.

        Raises:
          ValueError: another file, or other pairs; names both.
        """
        if self.numbers != numbers:
            raise ValueError(
                f"{path} is not the file that {os.path.basename(note_path(path))} was written for "
                f"(its numbers are {numbers}, and were {self.numbers}): make the teacher again, or "
                "remove the note if you know that its rows are these pairs in their order"
            )
        if source is not None and self.source_fingerprint != source.fingerprint:
            raise ValueError(
                f"{path} was made for {self.source} ({self.pairs} pairs, fingerprint "
                f"{self.source_fingerprint}), and this run has {source.name} ({len(source)} pairs, "
                f"fingerprint {source.fingerprint}): make it again for these pairs, with the same "
                "limit and seed"
            )


def note_path(path: str | Path) -> str:
    """Where the note of a local or remote teacher file lies."""
    return f"{path}.json"


def write_note(path: str | Path, note: TeacherNote) -> None:
    """Writes the note of a local teacher file at once."""
    write_json(
        Path(note_path(path)), {"format": FORMAT, "version": VERSION, **dataclasses.asdict(note)}
    )


def read_note(path: str | Path) -> TeacherNote | None:
    """The note of a teacher file; None where there is none, as beside files made elsewhere.

    Raises:
      ValueError: it is damaged, or of another version.
    """
    place = note_path(path)
    try:
        content = json.loads(objects.read_text(place))
        known = content.pop("format"), content.pop("version")
        note = _checked(TeacherNote(**content)) if known == (FORMAT, VERSION) else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{place} is damaged, or no note of a teacher: make the teacher again, or remove it"
        ) from error
    if note is None:
        raise ValueError(f"{place} is {known[0]!r} version {known[1]}, wanted {FORMAT!r} {VERSION}")
    return note


def _checked(note: TeacherNote) -> TeacherNote:
    """A note as it is; TypeError where a value is of another type than it should be."""
    for field in dataclasses.fields(note):
        value = getattr(note, field.name)
        if not isinstance(value, field.type) or isinstance(value, bool):
            raise TypeError(f"{field.name} is {value!r}")
    return note
