"""Every error that labkeeper raises on purpose. Anything else is a bug.

    LabkeeperError
      RequestError         the caller must act
        InvalidSpec          the request breaks a rule; `errors` names each field
        ServerNotFound
        TokenNotFound
        Conflict             the name is taken, or the server is being deleted
        CapacityReached      as many servers as allowed, or too little memory; try again later
        NotAuthenticated     no token, or a wrong one
        NotAllowed           the token may not do this; `scope` names the one that may
        TooManyRequests      one token's in a short time; try again later
        HostNotKnown         the request was sent to a name that is none of ours
      ServerFailed         the server must be looked at; carries the cause, the exit and the last log lines
        StartFailed
        StartTimeout
      BackendError         whoever runs this machine must act
        BackendRefused       permanent: asking again is of no use
        BackendUnavailable   temporary
        BackendTimeout
      StoreError           the state directory cannot be read or written
      SettingsError        at boot only
      ClientError          raised by the client alone
        Unreachable          no keeper answered
        BadAnswer            what answered is no keeper

A message says what could not be done ("cannot ..."), to which server, why, and what to do next. `details` are values for
programs: they travel in the problem body and come back in the client's exception.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self


class LabkeeperError(Exception):
    """Base of all; `code` is stable and part of the API."""

    code: ClassVar[str] = "labkeeper_error"

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details


class RequestError(LabkeeperError):
    """The caller asked for something that cannot be given."""

    code = "request_error"


class InvalidSpec(RequestError):
    """The request breaks a rule; `details["errors"]` is a list of {"field", "rule"}."""

    code = "invalid_spec"

    @classmethod
    def of(cls, field: str, rule: str) -> Self:
        """Make the error for one field that breaks one rule."""
        return cls(f"cannot take the request: {field} {rule}", errors=[{"field": field, "rule": rule}])

    @classmethod
    def twice(cls, field: str) -> Self:
        """Make the error for one that the caller has given twice."""
        return cls.of(field[:100], "must not stand there twice")


class ServerNotFound(RequestError):
    """No server has this name, or none that the caller's token is for."""

    code = "server_not_found"

    @classmethod
    def called(cls, name: str) -> Self:
        """Make the error for a name, in the same words whether there is such a server or not."""
        return cls(f"cannot find server '{name[:63]}'; the list of servers has the names there are")


class TokenNotFound(RequestError):
    """No token has this name."""

    code = "token_not_found"


class Conflict(RequestError):
    """The name is taken; `details["differs"]` lists the fields in which the specs differ."""

    code = "conflict"


class CapacityReached(RequestError):
    """As many servers as allowed, or too little memory; `details["retry_after"]` is in seconds."""

    code = "capacity_reached"


class NotAuthenticated(RequestError):
    """No token was given, or a wrong one."""

    code = "not_authenticated"


class NotAllowed(RequestError):
    """The token is right, but does not allow this; `details["scope"]` names the scope that does, where one would."""

    code = "not_allowed"


class TooManyRequests(RequestError):
    """One caller asks faster than it may; `details["retry_after"]` is in seconds."""

    code = "too_many_requests"


class HostNotKnown(RequestError):
    """The request was sent to a host name that is none of the keeper's: a page elsewhere may have been made to send it."""

    code = "host_not_known"


class ServerFailed(LabkeeperError):
    """A server ended or never came up; `details` hold `failure_class`, `exit` and `log_tail`."""

    code = "server_failed"


class StartFailed(ServerFailed):
    """The server ended, or could not be launched, before it was ready."""

    code = "start_failed"


class StartTimeout(ServerFailed):
    """The server was not ready within its start timeout, and was ended."""

    code = "start_timeout"


class BackendError(LabkeeperError):
    """The backend could not do what it was asked."""

    code = "backend_error"


class BackendRefused(BackendError):
    """Permanent: nothing was started, and asking again would not help."""

    code = "backend_refused"


class BackendUnavailable(BackendError):
    """Temporary: the backend cannot say; ask again."""

    code = "backend_unavailable"


class BackendTimeout(BackendError):
    """The backend, or the server behind it, did not answer in time."""

    code = "backend_timeout"


class StoreError(LabkeeperError):
    """The store cannot be read or written."""

    code = "store_error"


class SettingsError(LabkeeperError):
    """A setting is wrong; raised at boot only."""

    code = "settings_error"


class ClientError(LabkeeperError):
    """Raised by the client alone; never part of an answer."""

    code = "client_error"


class Unreachable(ClientError):
    """No keeper answered."""

    code = "unreachable"


class BadAnswer(ClientError):
    """What answered does not speak as a keeper does."""

    code = "bad_answer"


def tree() -> dict[str, type[LabkeeperError]]:
    """Return every class of the tree by its code."""
    found: dict[str, type[LabkeeperError]] = {}
    waiting: list[type[LabkeeperError]] = [LabkeeperError]
    while waiting:
        cls = waiting.pop()
        found[cls.code] = cls
        waiting.extend(cls.__subclasses__())
    return found
