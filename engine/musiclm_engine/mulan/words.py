"""Words as captions and prompts are compared: which of a prompt's words no caption held."""

import re
import unicodedata
from collections.abc import Iterable

# A metre is one word, and a note with its sharp; a hyphen parts words and an apostrophe does not.
_WORD = re.compile(r"\d+/\d+|\d+|\b[a-g]#|[^\W\d_]+(?:'[^\W\d_]+)*")


def words(text: str) -> list[str]:
    """The words of a text in order, NFKC-normalised and lower-case as the tokenizer reads them.

    `words("Slow F# minor hymn, in 3/4")` is `["slow", "f#", "minor", "hymn", "in", "3/4"]`.
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower().replace("’", "'"))


def vocabulary(captions: Iterable[str]) -> list[str]:
    """Every word of the captions, once, sorted."""
    return sorted({word for caption in captions for word in words(caption)})
