"""Pages at the addresses of Labs, `/servers/NAME/...`, for browsers without a session or a Lab.

Without a session, a page does not tell whether there is such a server. A session was made with a
link, which only callers with the scope `manage` can make: so it may start its server, too.
"""

from __future__ import annotations

from contextlib import suppress
from http import HTTPStatus
from typing import Final
from urllib.parse import quote, urlsplit

from flask import Blueprint, Response, g, request
from werkzeug.exceptions import NotFound

from labkeeper.api.auth import PUBLIC, Rule
from labkeeper.api.handlers.common import ask, patience
from labkeeper.api.pages import button, page
from labkeeper.api.services import Services
from labkeeper.core.access import Session
from labkeeper.core.culling import wakes
from labkeeper.core.durations import format_time
from labkeeper.core.errors import LabkeeperError, NotAllowed, SessionNotFound, StoreError
from labkeeper.core.lifecycle import RETURNS, Event, State
from labkeeper.core.messages import CULLER, KEEPER, Order, Origin
from labkeeper.core.server import Snapshot, StopMethod
from labkeeper.core.spec import QualifiedName
from labkeeper.edge.routes import LABS

RULES: Final[dict[str, Rule]] = dict.fromkeys(("labs.show", "labs.start", "labs.sign_out"), PUBLIC)
_AT_ONCE: Final = 0.3
"""Seconds in which a started Lab is redirected to; if it takes longer, a page says so."""
_IN_A_PATH: Final = "/?&=%:+,;@!$'()*~"
"""What is not escaped in a path with a query that a browser has sent."""


def pages(services: Services) -> Blueprint:
    """Return the pages."""
    made = Blueprint("labs", "labkeeper.labs")

    def show(name: str, rest: str = "") -> Response:  # noqa: ARG001 - whatever is below
        session = _session(services, name)
        if session is None:
            return _not_signed_in(name)
        address = _Address(services.labs.cookie_path(session.server), _below(name))
        snapshot = services.keeper.get(session.server)
        if snapshot is None:
            return page(HTTPStatus.NOT_FOUND, "This Lab does not exist any more")
        if wakes(snapshot) and _is_visit():
            # Not if it has changed meanwhile: a stop command may have arrived.
            order = _start_order(session, "its Lab is visited", seen=snapshot)
            return _started(services, order, address)
        return _state(snapshot, address)

    def start(name: str) -> Response:
        session = _session(services, name)
        if session is None:
            return _not_signed_in(name)
        _check_origin()
        address = _Address(services.labs.cookie_path(session.server), request.args.get("next", ""))
        return _started(services, _start_order(session, "from the page of its Lab"), address)

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
    made.add_url_rule(f"{below}/start", "start", start, methods=["POST"])
    made.add_url_rule(f"{below}/logout", "sign_out", sign_out)
    return made


class _Address:
    """The address of a page below a Lab's, as the browser has it."""

    def __init__(self, root: str, below: str) -> None:
        """`below` is the rest of the path, with its query, and untrusted."""
        # With two slashes at its beginning, it would lead to another host.
        self._below = quote(below.lstrip("/\\"), safe=_IN_A_PATH)
        self._root = root
        self.path = f"{root}{self._below}"

    @property
    def start(self) -> str:
        """Where to post to start the Lab, and to return here."""
        return f"{self._root}start?next={quote(self._below, safe='')}"


def _session(services: Services, name: str) -> Session | None:
    """Return the browser's session for a server, or None. Raises NotFound without an edge."""
    if services.labs.mode == "port":
        raise NotFound
    cookies = request.cookies.getlist(services.labs.cookie(secure=request.is_secure))
    # With several, the edge accepts none (`labkeeper.edge.sessions`).
    session = services.sessions.find(cookies[0]) if len(cookies) == 1 else None
    return session if session is not None and session.server == QualifiedName(name) else None


def _below(name: str) -> str:
    """Return the part of the request's target after the Lab's address, as it was sent."""
    target: str = request.environ.get("REQUEST_URI", "")
    root = f"{LABS}{name}/"
    return target[len(root) :] if target.startswith(root) else ""


def _is_visit() -> bool:
    """Whether a person goes to the page, which may start the Lab.

    Neither a browser that loads it ahead of time does, nor a program that checks links, nor a
    frame. A link on another site's page does: it can only start what the person may use anyway, and
    what falls asleep again.
    """
    ahead = (request.headers.get(name, "") for name in ("Sec-Purpose", "Purpose", "X-Moz"))
    return (
        request.method == "GET"
        and request.headers.get("Sec-Fetch-Dest", "document") == "document"
        and not any("prefetch" in value.lower() for value in ahead)
    )


def _check_origin() -> None:
    """Raise NotAllowed unless the request comes from a page of this very origin."""
    origin = request.headers.get("Origin", "")
    site = request.headers.get("Sec-Fetch-Site", "same-origin")
    if urlsplit(origin).netloc != request.host or site != "same-origin":
        raise NotAllowed("cannot start a server from a page of another site")


def _start_order(session: Session, reason: str, *, seen: Snapshot | None = None) -> Order:
    origin = Origin(session.actor, g.request_id, reason)
    return Order(session.server, Event.START, origin=origin, seen=seen)


def _started(services: Services, order: Order, address: _Address) -> Response:
    """Start a server; redirect to its Lab, or say that it takes longer, or why it cannot start."""
    with services.keeper.watch(order.name) as watch, patience(services, _AT_ONCE) as wait:
        try:
            begun = ask(services, order).snapshot
        except LabkeeperError as error:
            return button(
                "This Lab cannot start now",
                f"{error.message[:1].upper()}{error.message[1:]}.",
                label="Try again",
                status=HTTPStatus.SERVICE_UNAVAILABLE,
                posts_to=address.start,
            )
        after, _ = watch.until(
            lambda s: s.state in {State.RUNNING, State.FAILED}, first=begun, timeout=wait
        )
    if after.state is State.RUNNING or request.method == "POST":
        return Response(status=HTTPStatus.SEE_OTHER, headers={"Location": address.path})
    return _state(after, address)


def _not_signed_in(name: str) -> Response:
    return page(
        HTTPStatus.UNAUTHORIZED,
        "You are not signed in to this Lab",
        "Open it with a link from whoever gave you its address. "
        f"Where the keeper runs, `labkeeper open {name}` opens it.",
    )


def _state(snapshot: Snapshot, address: _Address) -> Response:
    """Return a page about a Lab that does not run: it starts, or why it was stopped."""
    if snapshot.state is not State.FAILED and snapshot.goal in RETURNS:
        shown = page(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "This Lab starts",
            "It opens here as soon as it is ready.",
            *([] if snapshot.progress is None else [snapshot.progress.message]),
        )
        shown.headers["Refresh"] = shown.headers["Retry-After"] = "1"
        return shown
    return button(
        "This Lab does not run",
        f"{_why(snapshot)} ({format_time(snapshot.since)})",
        label="Start",
        status=HTTPStatus.SERVICE_UNAVAILABLE,
        posts_to=address.start,
        quoted=() if snapshot.failure is None else snapshot.failure.log_tail,
    )


def _why(snapshot: Snapshot) -> str:
    """Return why a server does not run, as a sentence."""
    order, report = snapshot.stopped_by, snapshot.stop_report
    if snapshot.failure is not None:
        return f"It failed: {snapshot.failure.message}."
    if order is None:
        inside = report is None or report.method is StopMethod.NONE
        return "It was shut down from inside." if inside else "It was stopped."
    if order.actor == KEEPER.actor:
        return "It was stopped with the keeper."
    if order.actor == CULLER:
        return f"It was stopped by a rule: {order.reason}."
    return f"It was stopped by {order.actor}."
