"""Pages at the addresses of Labs, `/servers/NAME/...`, for browsers without a session or a Lab.

Without a session, a page does not tell whether there is such a server.
"""

from __future__ import annotations

from contextlib import suppress
from http import HTTPStatus
from typing import Final

from flask import Blueprint, Response, g, request
from werkzeug.exceptions import NotFound

from labkeeper.api.auth import PUBLIC, Rule
from labkeeper.api.pages import page
from labkeeper.api.services import Services
from labkeeper.core.access import Session
from labkeeper.core.errors import SessionNotFound, StoreError
from labkeeper.core.lifecycle import State
from labkeeper.core.messages import Origin
from labkeeper.core.spec import QualifiedName
from labkeeper.edge.routes import LABS

RULES: Final[dict[str, Rule]] = dict.fromkeys(("labs.show", "labs.sign_out"), PUBLIC)
_SOON: Final = {State.QUEUED, State.STARTING, State.BACKOFF, State.RUNNING}
"""States of a server that will run, or whose route the edge receives just now."""


def pages(services: Services) -> Blueprint:
    """Return the pages."""
    made = Blueprint("labs", "labkeeper.labs")

    def show(name: str, rest: str = "") -> Response:  # noqa: ARG001 - whatever is below
        session = _session(services, name)
        if session is None:
            return page(
                HTTPStatus.UNAUTHORIZED,
                "You are not signed in to this Lab",
                "Open it with a link from whoever gave you its address. "
                f"Where the keeper runs, `labkeeper open {name}` opens it.",
            )
        snapshot = services.keeper.get(session.server)
        state = None if snapshot is None else snapshot.state
        if state not in _SOON:
            return page(
                HTTPStatus.NOT_FOUND,
                "This Lab does not run",
                f"`labkeeper start {name}` starts it, where the keeper runs.",
            )
        shown = page(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "This Lab starts",
            "It opens here as soon as it is ready.",
        )
        shown.headers["Refresh"] = shown.headers["Retry-After"] = "1"
        return shown

    def sign_out(name: str) -> Response:
        session = _session(services, name)
        if session is not None:
            # If the disk is full, the session has ended nevertheless, and the cookie is deleted.
            with suppress(SessionNotFound, StoreError):
                services.sessions.revoke(
                    session.id, owner=session.owner, origin=Origin(session.actor, g.request_id)
                )
        shown = page(
            HTTPStatus.OK, "You are signed out", "To use this Lab again, open it with a new link."
        )
        shown.delete_cookie(
            services.labs.cookie(secure=request.is_secure),
            path=services.labs.cookie_path(QualifiedName(name)),
            secure=request.is_secure,
        )
        return shown

    below = f"{LABS}<name>"
    made.add_url_rule(f"{below}/", "show", show)
    made.add_url_rule(f"{below}/<path:rest>", "show", show)
    made.add_url_rule(f"{below}/logout", "sign_out", sign_out)
    return made


def _session(services: Services, name: str) -> Session | None:
    """Return the browser's session for a server, or None. Raises NotFound without an edge."""
    if services.labs.mode == "port":
        raise NotFound
    cookies = request.cookies.getlist(services.labs.cookie(secure=request.is_secure))
    # With several, the edge accepts none (`labkeeper.edge.sessions`).
    session = services.sessions.find(cookies[0]) if len(cookies) == 1 else None
    return session if session is not None and session.server == QualifiedName(name) else None
