"""What counts as a caption: something to see is left of it once it is cleaned."""

import re
import unicodedata

from protoclip_jax.data.tokenizer import END, START, clean

# A visible ASCII character settles it, which spares nearly every caption the cleaning; unless it is
# part of an entity, or the text holds what cleaning or the text tower cut.
_VISIBLE = re.compile(r"[!-~]")
_ENTITIES = re.compile(r"&\S*")
_CUTS = re.compile("\x1b|start_of_text|end_of_text", re.IGNORECASE)
# Blank, though Unicode does not count them among controls, formats and spaces: joiners, fillers,
# variation selectors, the braille cell without dots, and what stands for a lost character.
_BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\ufff0-\ufff8\ufffd\U000e0000-\U000e0fff]"
)


def is_caption(text: str) -> bool:
    """Whether a text says anything.

    It does not where cleaning leaves nothing to see before its first end token: white space,
    control and zero-width characters, also written as HTML entities or in a broken encoding. The
    text tower would see such a text as the empty one, or as noise.
    """
    if _VISIBLE.search(_ENTITIES.sub("", text)) and not _CUTS.search(text):
        return True
    seen = clean(text).partition(END)[0].replace(START, "")
    return any(unicodedata.category(c)[0] != "Z" and _drawn(c) for c in seen)


def _drawn(character: str) -> bool:
    # Unassigned ones (Cn) may be the emoji of a newer Unicode than Python's, and are seen.
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs") and not _BLANK.match(character)
