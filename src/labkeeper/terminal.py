"""Makes text of others safe for a terminal: all is visible, and nothing is obeyed."""

from __future__ import annotations

import re
from typing import Final

_COLOUR: Final = r"\x1b\[[0-9;:]{0,32}m"
"""Colours and the like (SGR, ECMA-48 8.3.117), as in Jupyter's log; no other sequence passes."""
_UNSEEN: Final = re.compile(rf"({_COLOUR}|\r(?=\n))|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_LAST_COLOUR: Final = re.compile(rf"({_COLOUR})((?:(?!{_COLOUR}).)*)$", re.MULTILINE)
_RESETS: Final = frozenset({"\x1b[m", "\x1b[0m"})


def visible(text: str) -> str:
    r"""Write control characters as `\x1b`, except tabs, line ends and colours (reset per line)."""
    if text.isprintable():
        return text
    shown = _UNSEEN.sub(lambda found: found[1] or f"\\x{ord(found[0]):02x}", text)
    return _LAST_COLOUR.sub(_closed, shown) if "\x1b" in shown else shown


def visible_line(text: str) -> str:
    r"""Write text as one line: like `visible`, but with line ends and tabs as `\x0a` and `\x09`."""
    return "".join(
        letter if letter not in "\t\r\n" else f"\\x{ord(letter):02x}" for letter in visible(text)
    )


def printable_line(text: str) -> str:
    r"""Write text as one line of known width: colours and marks of direction, too, as `\u202e`."""
    if text.isprintable():
        return text
    return "".join(
        letter
        if letter.isprintable()
        else f"\\x{ord(letter):02x}"
        if ord(letter) < 0x100  # noqa: PLR2004 - one byte
        else f"\\u{ord(letter):04x}"
        for letter in text
    )


def _closed(found: re.Match[str]) -> str:
    return found[0] if found[1] in _RESETS else f"{found[0]}\x1b[0m"
