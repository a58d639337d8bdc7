"""Errors as `application/problem+json` (RFC 9457): the only place with status codes and bodies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import structlog
from flask import Flask, Response, g, request
from pydantic import ValidationError
from werkzeug.exceptions import HTTPException

from labkeeper.core import errors
from labkeeper.core.errors import InvalidSpec, LabkeeperError, StartFailed, StartTimeout
from labkeeper.core.server import FailureClass, Snapshot

STATUS: Final[dict[type[LabkeeperError], int]] = {
    errors.InvalidSpec: 422,
    errors.ServerNotFound: 404,
    errors.TokenNotFound: 404,
    errors.SessionNotFound: 404,
    errors.Conflict: 409,
    errors.CapacityReached: 429,
    errors.NotAuthenticated: 401,
    errors.NotAllowed: 403,
    errors.TooManyRequests: 429,
    errors.HostNotKnown: 421,
    errors.RequestError: 400,
    errors.StartFailed: 502,
    errors.StartTimeout: 504,
    errors.ServerFailed: 502,
    errors.BackendRefused: 502,
    errors.BackendUnavailable: 503,
    errors.BackendTimeout: 504,
    errors.BackendError: 502,
    errors.StoreError: 503,
}
"""The status of each error that an answer can carry; the others never reach one."""

MEDIA_TYPE: Final = "application/problem+json"

_log = structlog.get_logger("labkeeper.api")


def register(app: Flask) -> None:
    """Turn every error of this application into a problem."""
    app.register_error_handler(LabkeeperError, _known)
    app.register_error_handler(HTTPException, _http)
    app.register_error_handler(Exception, _unexpected)


def problem(status: int, code: str, detail: str, **members: Any) -> Response:
    """Return a problem as a response."""
    return Response(
        json.dumps(_body(status, code, detail, members)), status, content_type=MEDIA_TYPE
    )


def body_of(error: LabkeeperError) -> dict[str, Any]:
    """Return the body of an error's problem, to embed in another answer."""
    return _body(status_of(error), error.code, error.message, error.details)


def _body(status: int, code: str, detail: str, members: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": f"urn:labkeeper:problem:{code}",
        "title": code.replace("_", " ").capitalize(),
        "status": status,
        "detail": detail,
        "code": code,
        "request_id": g.get("request_id", ""),
        **members,
    }


def status_of(error: LabkeeperError) -> int:
    """Return the status of an error."""
    return next((STATUS[cls] for cls in type(error).__mro__ if cls in STATUS), 500)


def invalid_request(error: ValidationError) -> InvalidSpec:
    """Return our error for pydantic's: each field with the rule it breaks, never its value."""
    mistakes = [
        {
            "field": ".".join(_snake(part) for part in mistake["loc"]) or "body",
            "rule": _rule(mistake["type"], mistake["msg"]),
        }
        for mistake in error.errors(include_url=False, include_context=False, include_input=False)
    ]
    sentences = "; ".join(f"{mistake['field']}: {mistake['rule']}" for mistake in mistakes[:10])
    return InvalidSpec(f"cannot accept the request: {sentences}", errors=mistakes)


def _snake(part: int | str) -> str:
    name = str(part)
    if len(name) < _LONGEST_FIELD:
        return name.replace("-", "_")
    return name[:_LONGEST_FIELD] + "..."


_LONGEST_FIELD: Final = 100


_RULES: Final = {
    "dict_type": "must be a JSON object",
    "extra_forbidden": "is not a known field",
    "missing": "is required",
    "model_type": "must be a JSON object",
}
"""Our wording of rules that pydantic words in terms of Python."""


def _rule(kind: str, message: str) -> str:
    plain = message.removeprefix("Value error, ").replace("Input should be", "must be")
    return _RULES.get(kind, plain)


def start_failed(snapshot: Snapshot) -> LabkeeperError:
    """Return the error of a server that failed to start."""
    failure = snapshot.failure
    if failure is None:  # A failed server always has a cause; this is only a fallback.
        return StartFailed(f"cannot start server '{snapshot.name}'")
    cls = StartTimeout if failure.kind is FailureClass.START_TIMEOUT else StartFailed
    end = failure.exit
    return cls(
        failure.message,
        name=snapshot.name,
        failure_class=str(failure.kind),
        exit=None if end is None else {"code": end.code, "signal": end.signal},
        log_tail=list(failure.log_tail),
    )


def _known(error: LabkeeperError) -> Response:
    answer = problem(status_of(error), error.code, error.message, **error.details)
    if "retry_after" in error.details:
        answer.headers["Retry-After"] = str(error.details["retry_after"])
    if isinstance(error, errors.NotAuthenticated):
        answer.headers["WWW-Authenticate"] = 'Bearer realm="labkeeper"'
    return answer


_WORDS: Final = {
    404: "cannot find {1}; /api/docs lists all routes",
    405: "cannot {0} {1}; the Allow header lists the methods that it accepts",
    415: (
        "cannot accept the request: send its body as JSON, "
        "with the header 'Content-Type: application/json'"
    ),
}
"""Messages that replace werkzeug's, which are meant for browsers."""


def _http(error: HTTPException) -> Response:
    status = error.code or 500
    detail = (
        _WORDS[status].format(request.method, request.path[:200])
        if status in _WORDS
        else error.description or error.name
    )
    answer = problem(status, error.name.lower().replace(" ", "_"), detail)
    # Werkzeug's own headers, such as Allow, are kept; its HTML is not.
    for name, value in error.get_headers():
        if name.lower() != "content-type":
            answer.headers[name] = value
    return answer


def server_in_path() -> str | None:
    """Return the server of the current request, so that logging can scrub its secrets."""
    about = request.url_rule is not None and request.url_rule.rule.startswith("/api/servers/<name>")
    return (request.view_args or {}).get("name") if about else None


def _unexpected(error: Exception) -> Response:
    _log.exception(
        "unexpected error",
        exc_info=error,
        request_id=g.get("request_id", ""),
        server=server_in_path(),
    )
    return problem(
        500,
        "internal_error",
        "something went wrong inside the keeper; its log has the cause under the request id",
    )
