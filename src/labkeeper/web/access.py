"""Who has access: tokens and the sessions of browsers, to be made and revoked."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final

from flask import Response, g, request
from pydantic import ValidationError

from labkeeper.api import problems
from labkeeper.api.handlers import access
from labkeeper.api.handlers.common import caller
from labkeeper.api.services import Services
from labkeeper.core.access import Scope, Session, Token
from labkeeper.core.errors import InvalidSpec, LabkeeperError, SessionNotFound, TokenNotFound
from labkeeper.core.spec import QualifiedName, parse_qualified_name
from labkeeper.schema.queries import SessionPath, TokenPath
from labkeeper.schema.requests.access import TokenRequest
from labkeeper.web.pages import Content, ask, html, redirect, whole

_HOME: Final = "/dashboard/access"
_FIELDS: Final = ("name", "scope", "servers", "labels", "users", "expires_in")
_SCOPES: Final = {
    Scope.READ: "see servers, their logs and the activity; not open a Lab",
    Scope.MANAGE: "also make, start, stop, delete and open servers",
    Scope.ADMIN: "everything, tokens included; for all servers",
}
_MOST: Final = 200
"""Sessions on the page."""


@dataclass(frozen=True, slots=True)
class _Form:
    """A form to create a token, as somebody has filled it in."""

    sent: Mapping[str, str] = field(default_factory=dict)
    wrong: Mapping[str, str] = field(default_factory=dict)
    """The rule that each wrong field breaks; what concerns none of them has the name ""."""

    @property
    def values(self) -> dict[str, str]:
        """The text in each field."""
        return (
            {"scope": Scope.READ, "expires_in": ""}
            | dict.fromkeys(("name", "servers", "labels", "users"), "")
            | {**self.sent}
        )


@dataclass(frozen=True, slots=True)
class _Row:
    """A session of a browser. Times in seconds since the epoch."""

    session: Session
    lab: str | None
    """The name of its server; None: it is signed in here."""
    exists: bool
    """Whether there is a page of that server."""
    used_at: int
    is_own: bool
    """Whether the page is shown to this browser."""


def show(services: Services) -> Response:
    """Show the tokens and the sessions."""
    return _page(services, _Form(), HTTPStatus.OK)


def create_token(services: Services) -> Response:
    """Create a token; only this answer has its text."""
    sent = {name: request.form.get(name, "") for name in _FIELDS}
    try:
        body = TokenRequest.model_validate(_body(sent))
        made, *_ = access.create_token(services, body)
    except ValidationError as error:
        invalid = problems.invalid_request(error)
        return _page(services, _Form(sent, _wrong(invalid)), HTTPStatus.UNPROCESSABLE_ENTITY)
    except LabkeeperError as error:
        return _page(services, _Form(sent, _wrong(error)), problems.status_of(error))
    return html(whole(services, Content("Token", "token-made.html", given={"token": made})))


def confirm_token(services: Services, name: str) -> Response:
    """Ask whether to revoke a token, and say what is lost by it."""
    token = next((t for t in services.tokens.all(caller().owner) if t.name == name), None)
    if token is None:
        raise TokenNotFound(f"cannot find token '{name[:63]}'; it may have been revoked")
    sessions = [s for s in services.sessions.all(token.owner) if s.actor == token.caller.actor]
    losses = ["Programs that use it stop working at once, and their streams end."]
    if sessions:
        losses.append(f"{_many(len(sessions), 'browser session')} that it has opened ends with it.")
    if (own := g.get("session")) is not None and own.actor == token.caller.actor:
        losses.append("This browser is signed in with it, and will be signed out.")
    losses.append("Servers and kernels run on.")
    return _question(services, f"Revoke token {name}?", losses)


def revoke_token(services: Services, name: str) -> Response:
    """Revoke a token, and end the sessions that it has opened."""
    access.revoke_token(services, TokenPath(name=name))
    return redirect(_HOME)


def confirm_session(services: Services, id_: str) -> Response:
    """Ask whether to revoke a session, and say what is lost by it."""
    known = services.sessions.all(caller().owner)
    session = next((s for s in known if s.id == id_), None)
    if session is None:
        raise SessionNotFound(f"cannot find session '{id_[:63]}'; it may have ended")
    following = [s for s in known if s.parent == id_]
    losses = ["Its browser must sign in again, and its connections to Labs are closed."]
    if following:
        losses.append(f"{_many(len(following), 'session')} for Labs that began from it ends, too.")
    own = g.get("session")
    if own is not None and own.id in {id_, session.parent}:
        losses.append("It is the session of this browser: you will be signed out.")
    losses.append("Servers and kernels run on.")
    return _question(services, f"Revoke session {id_}?", losses)


def revoke_session(services: Services, id_: str) -> Response:
    """Revoke a session, with those that follow from it."""
    access.revoke_session(services, SessionPath(id=id_))
    return redirect(_HOME)


def _page(services: Services, form: _Form, status: int) -> Response:
    found = services.sessions.all(caller().owner)
    now = time.time()
    given = {
        "tokens": services.tokens.all(caller().owner),
        "now": now,
        "sessions": [_row(services, session, now) for session in found[-_MOST:][::-1]],
        "hidden": max(0, len(found) - _MOST),
        "form": form,
        "scopes": _SCOPES,
        "limits_of": _limits_of,
    }
    content = Content("Access", "access.html", given=given)
    return html(whole(services, content), HTTPStatus(status))


def _row(services: Services, session: Session, now: float) -> _Row:
    own = g.get("session")
    return _Row(
        session,
        None if session.server is None else parse_qualified_name(session.server)[0],
        session.server is not None and _exists(services, session.server),
        round(now - services.sessions.unused_for(session)),
        own is not None and own.id == session.id,
    )


def _exists(services: Services, server: QualifiedName) -> bool:
    snapshot = services.keeper.get(server)
    return snapshot is not None and caller().sees(snapshot)


def _limits_of(token: Token) -> Sequence[str]:
    """Return the limits of a token in words; empty if there are none."""
    limits = token.limits
    labels = (f"{key}={value}" if value else key for key, value in limits.labels.items())
    return [
        *(f"servers {pattern}" for pattern in limits.servers),
        *(f"label {label}" for label in labels),
        *(f"user {user}" for user in limits.users),
    ]


def _body(sent: Mapping[str, str]) -> dict[str, Any]:
    """Return the request of a form. Raises InvalidSpec."""
    body: dict[str, Any] = {"name": sent["name"].strip(), "scope": sent["scope"]}
    body |= {name: re.findall(r"[^\s,]+", sent[name]) for name in ("servers", "users")}
    texts = filter(None, (text.strip() for text in re.split(r"[,\n]", sent["labels"])))
    pairs = [(key.strip(), value.strip()) for key, _, value in (t.partition("=") for t in texts)]
    body["labels"] = dict(pairs)
    if len(body["labels"]) < len(pairs):
        raise InvalidSpec.of("labels", "must have each key once")
    if sent["expires_in"].strip():
        body["expires_in"] = sent["expires_in"]
    return body


def _wrong(error: LabkeeperError) -> dict[str, str]:
    """Return the rules that a form breaks, by field."""
    wrong: dict[str, str] = {}
    for mistake in error.details.get("errors", [{"field": "", "rule": error.message}]):
        name, rule = mistake["field"].partition(".")[0], mistake["rule"]
        if name == "body":
            # A rule about several fields names the first of them.
            name, _, rule = rule.partition(": ")
        wrong.setdefault(name if name in _FIELDS else "", rule)
    return wrong


def _many(count: int, what: str) -> str:
    return f"One {what}" if count == 1 else f"Each of the {count} {what}s"


def _question(services: Services, title: str, losses: Sequence[str]) -> Response:
    return ask(services, title, losses, verb="Revoke", back=_HOME)
