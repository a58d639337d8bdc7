"""What may go to a terminal of text that others wrote: all that is to be seen, and nothing that a terminal obeys."""

from __future__ import annotations

import re
from typing import Final

_COLOUR: Final = r"\x1b\[[0-9;:]{0,32}m"
"""A sequence that sets colours and the like (SGR, ECMA-48 8.3.117), as Jupyter's log has them; no other is let through."""
_UNSEEN: Final = re.compile(rf"({_COLOUR}|\r(?=\n))|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_LAST_COLOUR: Final = re.compile(rf"({_COLOUR})((?:(?!{_COLOUR}).)*)$", re.MULTILINE)
_RESETS: Final = frozenset({"\x1b[m", "\x1b[0m"})


def visible(text: str) -> str:
    r"""Write control characters as `\x1b`, but for tabs, ends of lines, and colours, which end with their line."""
    if text.isprintable():
        return text
    shown = _UNSEEN.sub(lambda found: found[1] or f"\\x{ord(found[0]):02x}", text)
    return _LAST_COLOUR.sub(_closed, shown) if "\x1b" in shown else shown


def visible_line(text: str) -> str:
    r"""Write the same of what is to be one line: ends of lines and tabs as `\x0a` and `\x09`, too."""
    return "".join(letter if letter not in "\t\r\n" else f"\\x{ord(letter):02x}" for letter in visible(text))


def _closed(found: re.Match[str]) -> str:
    return found[0] if found[1] in _RESETS else f"{found[0]}\x1b[0m"
