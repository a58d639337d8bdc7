"""One-time links that open a Lab."""

from __future__ import annotations

import time
from http import HTTPStatus
from urllib.parse import quote

from flask import Response, g, request

from labkeeper.api.handlers.common import (
    Answer,
    caller,
    find_server,
    json_answer,
    lab_origin,
    lab_root,
    public_url,
)
from labkeeper.api.links import Link as KnownLink
from labkeeper.api.pages import button, page
from labkeeper.api.services import Services
from labkeeper.core.durations import format_time
from labkeeper.core.errors import (
    Conflict,
    NotAuthenticated,
)
from labkeeper.core.messages import Origin
from labkeeper.core.server import Endpoint
from labkeeper.schema.answers.access import Link
from labkeeper.schema.queries import (
    ServerPath,
    TicketPath,
)
from labkeeper.schema.requests.access import LinkRequest


def make_link(services: Services, path: ServerPath, body: LinkRequest) -> Answer:
    """Create a link that opens a running server's Lab once, within a short time.

    The link does not contain the Lab's token.
    """
    snapshot = find_server(services, path)
    if snapshot.endpoint is None:
        raise Conflict(
            f"cannot create a link to server '{snapshot.name}': it is {snapshot.state}, not running"
        )
    ticket = services.links.make(
        snapshot.qualified_name,
        snapshot.generation,
        snapshot.spec.default_url if body.page is None else body.page,
        lifetime=body.expires_in,
        confirm=body.confirm,
        actor=caller().actor,
        until=caller().until,
        valid=g.still_valid,
    )
    # Browsers keep the cookie of a session for the host that sets it.
    name = snapshot.qualified_name
    served = services.labs.serves(name, snapshot.endpoint)
    host = lab_origin(services, name) if served else public_url(services)
    expires_at = format_time(time.time() + body.expires_in)
    return json_answer(Link(url=f"{host}/open/{ticket}", expires_at=expires_at), HTTPStatus.CREATED)


def open_link(services: Services, path: TicketPath) -> Response:
    """Open a Lab by a one-time link, or show a button that does, as the link's maker chose.

    Programs that follow links, such as mail scanners, do not press buttons.
    """
    link = services.links.look(path.ticket)
    endpoint = _endpoint(services, link)
    if link is None or endpoint is None or request.method == "HEAD":
        return _spent()
    if not link.confirm:
        return follow_link(services, path)
    return button(
        "Open JupyterLab",
        f"This link opens the server '{link.server}' once, in this browser.",
        label="Open",
        leads_to=lab_root(services, link.server, endpoint),
    )


def follow_link(services: Services, path: TicketPath) -> Response:
    """Use a one-time link: redirect the browser to the Lab, and let it in."""
    link = services.links.use(path.ticket)
    endpoint = _endpoint(services, link)
    if link is None or endpoint is None:
        return _spent()
    if services.labs.serves(link.server, endpoint):
        try:
            return _with_session(services, link, endpoint)
        except NotAuthenticated:
            return _spent()
    # Jupyter accepts the token, sets its cookie, and redirects to a page without the token.
    root = lab_root(services, link.server, endpoint)
    # Jupyter would parse anything before a colon as a scheme.
    next_page = (endpoint.base_url.rstrip("/") + link.page).replace(":", "%3A")
    target = f"{root}login?token={endpoint.token}&next={quote(next_page, safe='')}"
    return Response(status=HTTPStatus.SEE_OTHER, headers={"Location": target})


def _spent() -> Response:
    return page(
        HTTPStatus.GONE,
        "This link opens nothing any more",
        "It was used, or it is too old, or its server was launched again, or the token that it "
        "was made with was revoked. "
        "Go back to where it came from, and ask for another.",
    )


def _endpoint(services: Services, link: KnownLink | None) -> Endpoint | None:
    """Return the endpoint of a link's server; None unless the launch is the one that it opens."""
    snapshot = None if link is None else services.keeper.get(link.server)
    if link is None or snapshot is None or snapshot.generation != link.generation:
        return None
    return snapshot.endpoint


def _with_session(services: Services, link: KnownLink, endpoint: Endpoint) -> Response:
    """Return a redirect to the Lab, with a cookie that the edge accepts.

    Raises NotAuthenticated if the link has become invalid.
    """
    session, cookie = services.sessions.make(
        link.server,
        link.actor,
        until=link.until,
        valid=lambda: link.valid() and _endpoint(services, link) is not None,
        origin=Origin(link.actor, g.request_id),
    )
    opened = Response(
        status=HTTPStatus.SEE_OTHER,
        headers={"Location": endpoint.base_url.rstrip("/") + link.page},
    )
    opened.set_cookie(
        services.labs.cookie(secure=request.is_secure),
        cookie,
        max_age=int(session.expires_at - session.created_at),
        path=services.labs.cookie_path(link.server),
        secure=request.is_secure,
        httponly=True,
        samesite="Lax",
    )
    return opened
