"""Pages at the addresses of Labs, `/servers/NAME/...`, for browsers without a session or a Lab.

Without a session, a page does not tell whether there is such a server. A session was made with a
link, which only callers with the scope `manage` can make: so it may start its server, too.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Final
from urllib.parse import quote

from flask import Blueprint, Response, g, request
from werkzeug.exceptions import NotFound

from labkeeper.api.auth import PUBLIC, Rule
from labkeeper.api.browser import needs_own_page
from labkeeper.api.handlers import sign_in
from labkeeper.api.handlers.common import ask, patience
from labkeeper.api.pages import button, page
from labkeeper.api.services import Services
from labkeeper.core.access import Session
from labkeeper.core.culling import wakes
from labkeeper.core.durations import format_time
from labkeeper.core.errors import LabkeeperError
from labkeeper.core.lifecycle import RETURNS, Event, State
from labkeeper.core.messages import CULLER, KEEPER, Order, Origin
from labkeeper.core.server import Snapshot, StopMethod
from labkeeper.core.spec import QualifiedName
from labkeeper.edge.routes import LABS

RULES: Final[dict[str, Rule]] = dict.fromkeys(("labs.show", "labs.start", "labs.sign_out"), PUBLIC)
_AT_ONCE: Final = 0.3
"""Seconds in which a started Lab is redirected to; if it takes longer, a page says so."""


def pages(services: Services) -> Blueprint:
    """Return the pages."""
    made = Blueprint("labs", "labkeeper.labs")

    def show(name: str, rest: str = "") -> Response:  # noqa: ARG001 - whatever is below
        session = _session(services, name)
        if session is None:
            return sign_in.ask_home(services, name, _below(name))
        address = _Address(services, name, _below(name))
        snapshot = services.keeper.get(QualifiedName(name))
        if snapshot is None:
            return page(HTTPStatus.NOT_FOUND, "This Lab does not exist any more")
        if wakes(snapshot) and _is_visit():
            # Not if it has changed meanwhile: a stop command may have arrived.
            order = _start_order(name, session, "its Lab is visited", seen=snapshot)
            return _started(services, order, address)
        return _state(snapshot, address)

    def start(name: str) -> Response:
        session = _session(services, name)
        if session is None:
            return sign_in.ask_home(services, name, request.args.get("next", ""))
        needs_own_page("start a server")
        address = _Address(services, name, request.args.get("next", ""))
        return _started(services, _start_order(name, session, "from the page of its Lab"), address)

    def sign_out(name: str) -> Response:
        if request.method == "POST":
            needs_own_page("sign out")
        elif request.headers.get("Sec-Fetch-Site") in {"same-site", "cross-site"}:
            # Another Lab's page, too, could load this address.
            return button(
                "Sign out",
                "Of this Lab, and of all that you signed in to with it.",
                label="Sign out",
            )
        sign_in.sign_out(services, _session(services, name))
        shown = page(
            HTTPStatus.OK, "You are signed out", "To use this Lab again, open it with a new link."
        )
        sign_in.delete_session(services, shown, QualifiedName(name))
        return shown

    below = f"{LABS}<name>"
    made.add_url_rule(f"{below}/", "show", show)
    made.add_url_rule(f"{below}/<path:rest>", "show", show)
    made.add_url_rule(f"{below}/start", "start", start, methods=["POST"])
    made.add_url_rule(f"{below}/logout", "sign_out", sign_out, methods=["GET", "POST"])
    return made


class _Address:
    """The address of a page below a Lab's, as the browser has it."""

    def __init__(self, services: Services, name: str, below: str) -> None:
        """`below` is the rest of the path, with its query, and untrusted."""
        self._root = services.labs.cookie_path(QualifiedName(name))
        self.path = sign_in.path_below(self._root, below)

    @property
    def start(self) -> str:
        """Where to post to start the Lab, and to return here."""
        return f"{self._root}start?next={quote(self.path.removeprefix(self._root), safe='')}"


def _session(services: Services, name: str) -> Session | None:
    """Return the browser's session for a server, or None. Raises NotFound without an edge."""
    if services.labs.mode == "port":
        raise NotFound
    return sign_in.session_of(services, QualifiedName(name))


def _below(name: str) -> str:
    """Return the part of the request's target after the Lab's address, as it was sent."""
    target: str = request.environ.get("REQUEST_URI", "")
    root = f"{LABS}{name}/"
    return target[len(root) :] if target.startswith(root) else ""


def _is_visit() -> bool:
    """Whether a person goes to the page, which may start the Lab.

    A program that checks links does not. A link on another site's page does: it can only start what
    the person may use anyway, and what falls asleep again.
    """
    return request.method == "GET" and sign_in.is_person()


def _start_order(
    name: str, session: Session, reason: str, *, seen: Snapshot | None = None
) -> Order:
    origin = Origin(session.actor, g.request_id, reason)
    return Order(QualifiedName(name), Event.START, origin=origin, seen=seen)


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
