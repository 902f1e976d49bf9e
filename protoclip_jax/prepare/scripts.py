"""Writing systems of captions, as Unicode's script property tells them."""

import functools

from fontTools import unicodedata

# Letters of several scripts, such as the long-vowel mark of both kana, or of none.
COMMON = "Common"
_SHARED = ("Zyyy", "Zinh", "Zzzz")


@functools.lru_cache(maxsize=2**16)
def script_of(letter: str) -> str | None:
    """Unicode's name of one character's script; None for what is no letter."""
    if not letter.isalpha():
        return None
    code = unicodedata.script(letter)
    return COMMON if code in _SHARED else unicodedata.script_name(code)


def scripts_of(text: str) -> set[str]:
    """The scripts that occur in a text; `COMMON` only where there is no other."""
    if text.isascii():
        return {"Latin"} if any(map(str.isalpha, text)) else set()
    found = {script for script in map(script_of, text) if script is not None}
    return found - {COMMON} or found
