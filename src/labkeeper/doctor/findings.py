"""What the checks find."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    SKIPPED = "skipped"
    """It was not checked; the message says why."""
    WARNING = "warning"
    """A keeper runs all the same, but not as well or as safely as it could."""
    PROBLEM = "problem"
    """A keeper, or its servers, cannot do what the settings say."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check has found out about one subject."""

    subject: str
    status: Status
    message: str
    mend: str | None = None
    """The one command or step that mends it; None unless it is a warning or a problem."""
    details: tuple[str, ...] = ()
    """Lines for people, such as one for each server."""


def ok(subject: str, message: str, details: Sequence[str] = ()) -> Finding:
    """Return the finding that all is well."""
    return Finding(subject, Status.OK, message, details=tuple(details))


def skipped(subject: str, why: str) -> Finding:
    """Return the finding that something was not checked."""
    return Finding(subject, Status.SKIPPED, why)


def warning(subject: str, message: str, mend: str, details: Sequence[str] = ()) -> Finding:
    """Return a finding that does not keep a keeper from its work."""
    return Finding(subject, Status.WARNING, message, mend, tuple(details))


def problem(subject: str, message: str, mend: str, details: Sequence[str] = ()) -> Finding:
    """Return a finding that has to be mended."""
    return Finding(subject, Status.PROBLEM, message, mend, tuple(details))


def setting(name: str, value: object) -> str:
    """Return the command that changes a setting for what is started from the same shell."""
    return f"export LABKEEPER_{name.upper()}={shlex.quote(str(value))}"
