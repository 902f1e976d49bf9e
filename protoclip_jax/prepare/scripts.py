"""Writing systems of captions, as far as the names of their letters tell."""

import functools
import unicodedata

# The first word of a letter's Unicode name, where it is not the script's usual name.
_NAMES = {"CJK": "Han", "HANGUL": "Hangul", "FULLWIDTH": "Latin", "HALFWIDTH": "Katakana"}


@functools.lru_cache(maxsize=2**16)
def script_of(letter: str) -> str | None:
    """The script of one character; None for what is no letter."""
    if not letter.isalpha():
        return None
    first = unicodedata.name(letter, "unnamed").split()[0]
    return _NAMES.get(first, first.capitalize())


def scripts_of(text: str) -> set[str]:
    """The scripts that occur in a text."""
    if text.isascii():
        return {"Latin"} if any(map(str.isalpha, text)) else set()
    return {script for script in map(script_of, text) if script is not None}
