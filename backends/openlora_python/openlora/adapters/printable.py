"""Words of strangers, made fit for messages, logs and terminals."""

from __future__ import annotations

LONGEST = 600


def printable(text: str, longest: int = LONGEST) -> str:
    """`text` with an escape in place of each character that is not printable, at most `longest` characters of it.

    Control characters could steer a terminal or forge a line of a log, lone surrogates can't be encoded, and what
    changes the direction of writing makes a line read as another one.
    """
    shown = "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in text[: longest + 1]
    )
    return shown if len(shown) <= longest else f"{shown[: longest - 1]}…"
