"""Every error that labkeeper raises on purpose. Anything else is a bug.

    LabkeeperError
      RequestError         the caller must act
        InvalidSpec          the request breaks a rule; `errors` lists each field
        ServerNotFound
        TokenNotFound
        SessionNotFound
        Conflict             the name is taken, or the server is being deleted
        CapacityReached      the maximum of servers is reached, or memory is low; retry later
        NotAuthenticated     the token is missing or wrong
        NotAllowed           the token does not permit this; `scope` is the one required
        TooManyRequests      rate limit of one token; retry later
        HostNotKnown         the Host header is not one of the keeper's
      ServerFailed         the server needs attention; carries the cause, exit and last log lines
        StartFailed
        StartTimeout
      BackendError         the machine's operator must act
        BackendRefused       permanent: a retry is useless
        BackendUnavailable   temporary
        BackendTimeout
      StoreError           the state directory cannot be read or written
      SettingsError        at boot only
      ClientError          raised by the client only
        Unreachable          no keeper answered
        BadAnswer            the answer is not a keeper's

A message states what failed ("cannot ..."), for which server, why, and what to do next. `details`
are values for programs: sent in the problem body and restored in the client's exception.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Self


class LabkeeperError(Exception):
    """Base of all errors; `code` is stable and part of the API."""

    code: ClassVar[str] = "labkeeper_error"

    def __init_subclass__(cls) -> None:
        """Derive the code of a class from its name, in snake case."""
        cls.code = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details


class RequestError(LabkeeperError):
    """The request cannot be fulfilled."""

    def renamed(self, fields: Mapping[str, str]) -> Self:
        """Return the error with other names for the fields that it is about."""

        def rename(text: str) -> str:
            return re.sub(r"\b[\w.]+\b", lambda word: fields.get(word[0], word[0]), text)

        error = type(self)(rename(self.message), **self.details)
        if "errors" in self.details:
            errors = self.details["errors"]
            error.details["errors"] = [{**one, "field": rename(one["field"])} for one in errors]
        return error


class InvalidSpec(RequestError):
    """The request breaks a rule; `details["errors"]` is a list of {"field", "rule"}."""

    @classmethod
    def of(cls, field: str, rule: str) -> Self:
        """Return the error for one field that breaks one rule."""
        return cls(
            f"cannot accept the request: {field} {rule}", errors=[{"field": field, "rule": rule}]
        )

    @classmethod
    def twice(cls, field: str) -> Self:
        """Return the error for a duplicate field."""
        return cls.of(field[:100], "must not be given twice")


class ServerNotFound(RequestError):
    """No server has this name, or the caller's token excludes it."""

    @classmethod
    def called(cls, name: str) -> Self:
        """Return the error for a name, worded alike whether or not such a server exists."""
        return cls(f"cannot find server '{name[:63]}'; see the list of servers")


class TokenNotFound(RequestError):
    """No token has this name."""


class SessionNotFound(RequestError):
    """No browser session has this id."""


class Conflict(RequestError):
    """The name is taken; `details["differs"]` lists the fields in which the specs differ."""


class CapacityReached(RequestError):
    """Too many servers are active, or memory is low; `details["retry_after"]` is in seconds."""


class NotAuthenticated(RequestError):
    """The token is missing or wrong."""


class NotAllowed(RequestError):
    """The token is valid but does not permit this; `details["scope"]` is the one needed, if any."""


class TooManyRequests(RequestError):
    """The caller exceeds its request rate; `details["retry_after"]` is in seconds."""


class HostNotKnown(RequestError):
    """The Host header is not one of the keeper's: another site's page may have sent the request."""


class ServerFailed(LabkeeperError):
    """A server ended or never came up; `details` hold `failure_class`, `exit` and `log_tail`."""


class StartFailed(ServerFailed):
    """The server ended before it was ready, or could not be launched."""


class StartTimeout(ServerFailed):
    """The server was not ready within its start timeout and was ended."""


class BackendError(LabkeeperError):
    """The backend could not carry out a call."""


class BackendRefused(BackendError):
    """Permanent: nothing was started, and a retry would not help."""


class BackendUnavailable(BackendError):
    """Temporary: the backend cannot determine the outcome; retry."""


class BackendTimeout(BackendError):
    """The backend, or the server behind it, did not answer in time."""


class StoreError(LabkeeperError):
    """The store cannot be read or written."""


class SettingsError(LabkeeperError):
    """A setting is wrong; raised at boot only."""


class ClientError(LabkeeperError):
    """Raised by the client only; never part of a response."""


class Unreachable(ClientError):
    """No keeper answered."""


class BadAnswer(ClientError):
    """The answer does not come from a keeper."""


def tree(root: type[LabkeeperError] = LabkeeperError) -> dict[str, type[LabkeeperError]]:
    """Return a class and all those below it, by code."""
    found = {root.code: root}
    for cls in root.__subclasses__():
        found |= tree(cls)
    return found
