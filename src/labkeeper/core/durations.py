"""Conversion of durations and times from and to text."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from typing import Final

LONGEST: Final = 366 * 86400.0
"""Seconds; a longer duration is most likely in the wrong unit."""
DURATION_RULE: Final = (
    "must be seconds as a number, or a text such as '90m', '2h' or '1d12h', of at most 366 days"
)
LONGEST_TEXT: Final = 64
"""Maximum length of a duration in characters."""
_DURATION: Final = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?")
_UNITS: Final = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def duration(given: object) -> float:
    """Parse a number of seconds, or text such as `90m`, `2h`, `1d12h`. Raises ValueError."""
    seconds = _read(given.replace(" ", "").lower()) if isinstance(given, str) else given
    if (
        isinstance(seconds, bool)
        or not isinstance(seconds, int | float)
        or not (0 <= seconds <= LONGEST)
    ):
        raise ValueError(DURATION_RULE)
    return float(seconds)


def _read(text: str) -> float:
    found = _DURATION.fullmatch(text) if 0 < len(text) <= LONGEST_TEXT else None
    if found is None:
        return math.nan
    sizes = (size for size, _ in _UNITS)
    return sum(
        float(number) * size for number, size in zip(found.groups(), sizes, strict=True) if number
    )


def moment(text: str) -> datetime:
    """Parse a time as RFC 3339 has it. Raises ValueError."""
    found = datetime.fromisoformat(text)
    if found.tzinfo is None:
        raise ValueError("must end with Z or an offset such as +01:00")
    return found


def format_duration(seconds: float) -> str:
    """Format a duration in its two largest units: `2 h 3 min`."""
    left, words = max(0, round(seconds)), list[str]()
    for size, unit in _UNITS:
        count, left = divmod(left, size)
        if count or (words and len(words) < _PLACES):
            words.append(f"{count} {unit}")
    exact = [word for word in words[:_PLACES] if not word.startswith("0 ")]
    return " ".join(exact) or "0 s"


_PLACES: Final = 2


def format_time(at: float) -> str:
    """Format a time in seconds since the epoch as RFC 3339, UTC, with milliseconds."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
