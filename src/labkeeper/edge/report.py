"""What an edge reports to keepers: numbers, which they publish as metrics, and uses of sessions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from labkeeper.edge.access_log import Record
from labkeeper.edge.uses import Use

Answers = Counter[tuple[str, str]]
"""Numbers of answers: by who made them, `edge`, `keeper` or `lab`, and by the class of the status,
such as `2xx`; `none` if the client was gone before."""

_NUMBERS: Final = ("connections", "websockets", "held", "handshakes", "refused")


class ReportError(ValueError):
    """A message is not a report."""


@dataclass(slots=True)
class Report:
    """Present numbers, and counts since the start of an edge."""

    connections: int = 0
    """Of clients, without websockets."""
    websockets: int = 0
    held: int = 0
    """Requests that wait for a keeper."""
    handshakes: int = 0
    """TLS handshakes that wait for their turn."""
    refused: int = 0
    """Connections for which there was no room, so far."""
    answers: Answers = field(default_factory=Answers)
    """So far."""
    uses: list[Use] = field(default_factory=list)
    """Of sessions, since the last report."""
    untold: int | None = None
    """How many uses did not fit in; None: not known."""
    keeper: str = ""
    """The id of the keeper that was told of all other uses."""

    def answered(self, record: Record) -> None:
        """Count a request that has ended."""
        kind = "none" if record.status is None else f"{record.status // 100}xx"
        self.answers[record.to, kind] += 1

    def tells_all(self, keeper: str) -> bool:
        """Whether a keeper has now been told of all uses."""
        return (self.keeper, self.untold) == (keeper, 0)

    def message(self) -> dict[str, Any]:
        """Return it for the control protocol."""
        return {
            **{name: getattr(self, name) for name in _NUMBERS},
            "answers": [[to, kind, count] for (to, kind), count in self.answers.items()],
            "uses": [list(use) for use in self.uses],
            "untold": self.untold,
            "keeper": self.keeper,
        }

    @classmethod
    def parse(cls, message: object) -> Report:
        """Read a report from a message's object; what it does not say is 0. Raises ReportError.

        An edge of another version, which finishes what it has begun, may report less, or more.
        """
        match message:
            case {"answers": list(answers), **more}:
                numbers = {name: _number(more.get(name, 0)) for name in _NUMBERS}
                uses, untold, keeper = _uses(more)
                return cls(
                    **numbers,
                    answers=Answers(dict(map(_answer, answers))),
                    uses=uses,
                    untold=untold,
                    keeper=keeper,
                )
        raise ReportError("a report does not fit")


def _number(message: object) -> int:
    if not isinstance(message, int):
        raise ReportError("a report does not fit")
    return message


def _answer(message: object) -> tuple[tuple[str, str], int]:
    match message:
        case [str(to), str(kind), int(count)]:
            return (to, kind), count
    raise ReportError("a report does not fit")


def _uses(message: Mapping[object, object]) -> tuple[list[Use], int | None, str]:
    """Read what a report says of sessions. That of an edge of an earlier version says nothing."""
    match message:
        case {"uses": list(uses), "untold": int(untold), "keeper": str(keeper)}:
            return list(map(_use, uses)), untold, keeper
        case {"uses": _}:
            raise ReportError("a report does not fit")
    return [], None, ""


def _use(message: object) -> Use:
    match message:
        case [str(digest), int() | float() | None as ago]:
            return digest, ago
    raise ReportError("a report does not fit")
