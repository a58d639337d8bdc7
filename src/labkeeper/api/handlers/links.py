"""One-time links that open a Lab, or sign a browser in."""

from __future__ import annotations

import time
from http import HTTPStatus
from urllib.parse import quote

from flask import Response, g, request

from labkeeper.api.browser import needs_own_page
from labkeeper.api.handlers import sign_in
from labkeeper.api.handlers.common import (
    Answer,
    caller,
    find_server,
    home_url,
    json_answer,
    lab_origin,
    lab_root,
    public_url,
)
from labkeeper.api.links import LabLink, LabTicket, Maker, SignInLink
from labkeeper.api.pages import button, page
from labkeeper.api.services import Services
from labkeeper.core.durations import format_time
from labkeeper.core.errors import Conflict, NotAuthenticated
from labkeeper.core.messages import Origin
from labkeeper.core.server import Endpoint
from labkeeper.schema.answers.access import Link
from labkeeper.schema.queries import ServerPath, TicketPath
from labkeeper.schema.requests.access import LinkRequest, SessionLinkRequest


def make_link(services: Services, path: ServerPath, body: LinkRequest) -> Answer:
    """Create a link that opens a running server's Lab once, within a short time.

    The link does not contain the Lab's token.
    """
    snapshot = find_server(services, path)
    if snapshot.endpoint is None:
        raise Conflict(
            f"cannot create a link to server '{snapshot.name}': it is {snapshot.state}, not running"
        )
    link = LabLink(
        _maker(),
        snapshot.qualified_name,
        snapshot.generation,
        snapshot.spec.default_url if body.page is None else body.page,
        body.confirm,
    )
    ticket = services.links.make(link, lifetime=body.expires_in)
    # Browsers keep the cookie of a session for the host that sets it.
    name = snapshot.qualified_name
    served = services.labs.serves(name, snapshot.endpoint)
    host = lab_origin(services, name) if served else public_url(services)
    return _made(host, ticket, body)


def make_session_link(services: Services, body: SessionLinkRequest) -> Answer:
    """Create a link that signs a browser in, once, with the permissions of its maker.

    It opens the dashboard, and then the addresses of all Labs that these may manage. The dashboard
    needs another host name than the Labs.
    """
    home = home_url(services)
    if home is None:
        raise Conflict(
            "cannot create a link that signs a browser in: Labs have the keeper's own host name "
            "here; LABKEEPER_LAB_DOMAIN gives them others"
        )
    ticket = services.links.make(SignInLink(_maker()), lifetime=body.expires_in)
    return _made(home, ticket, body)


def _maker() -> Maker:
    return Maker(caller(), g.still_valid)


def _made(origin: str, ticket: str, body: SessionLinkRequest) -> Answer:
    expires_at = format_time(time.time() + body.expires_in)
    return json_answer(
        Link(url=f"{origin}/open/{ticket}", expires_at=expires_at), HTTPStatus.CREATED
    )


def open_link(services: Services, path: TicketPath) -> Response:
    """Use a one-time link, or show a button that does, as the link's maker chose.

    Programs that follow links, such as mail scanners, do not press buttons.
    """
    target = services.links.look(path.ticket)
    if request.method == "HEAD":
        return _spent()
    match target:
        case LabTicket() if sign_in.is_at(services, target.server):
            used = services.links.use(path.ticket)
            return sign_in.redeem(services, used) if isinstance(used, LabTicket) else _spent()
        case SignInLink() if sign_in.is_at(services, None):
            return button(
                "Sign in",
                f"This link signs this browser in, once, with the permissions of "
                f"{target.maker.caller.actor}. Use it only if you have asked for it.",
                label="Sign in",
            )
        case LabLink():
            return _open_lab(services, path, target)
    return _spent()


def _open_lab(services: Services, path: TicketPath, link: LabLink) -> Response:
    endpoint = _endpoint(services, link)
    if endpoint is None:
        return _spent()
    if sign_in.is_at(services, None):
        # The cookie would be for the host of the dashboard, where no page of a Lab may be.
        url = f"{lab_origin(services, link.server)}{request.path}"
        return Response(status=HTTPStatus.SEE_OTHER, headers={"Location": url})
    if not link.confirm:
        return follow_link(services, path)
    return button(
        "Open JupyterLab",
        f"This link opens the server '{link.server}' once, in this browser.",
        label="Open",
        leads_to=lab_root(services, link.server, endpoint),
    )


def follow_link(services: Services, path: TicketPath) -> Response:
    """Use a one-time link: redirect the browser to where it leads, and let it in."""
    target = services.links.look(path.ticket)
    if isinstance(target, SignInLink):
        # Else another site's page could sign a browser in as someone else.
        needs_own_page("sign in")
        used = services.links.use(path.ticket) if sign_in.is_at(services, None) else None
        return sign_in.begin(services, target.maker) if used is target else _spent()
    at_home = sign_in.is_at(services, None)
    if at_home or not isinstance(target, LabLink) or services.links.use(path.ticket) is not target:
        return _spent()
    endpoint = _endpoint(services, target)
    if endpoint is None:
        return _spent()
    if services.labs.serves(target.server, endpoint):
        try:
            return _with_session(services, target, endpoint)
        except NotAuthenticated:
            return _spent()
    # Jupyter accepts the token, sets its cookie, and redirects to a page without the token.
    root = lab_root(services, target.server, endpoint)
    # Jupyter would parse anything before a colon as a scheme.
    next_page = (endpoint.base_url.rstrip("/") + target.page).replace(":", "%3A")
    url = f"{root}login?token={endpoint.token}&next={quote(next_page, safe='')}"
    return Response(status=HTTPStatus.SEE_OTHER, headers={"Location": url})


def _spent() -> Response:
    return page(
        HTTPStatus.GONE,
        "This link opens nothing any more",
        "It was used, or it is too old, or its server was launched again, or the token that it "
        "was made with was revoked. "
        "Go back to where it came from, and ask for another.",
    )


def _endpoint(services: Services, link: LabLink) -> Endpoint | None:
    """Return the endpoint of a link's server; None unless the launch is the one that it opens."""
    snapshot = services.keeper.get(link.server)
    if snapshot is None or snapshot.generation != link.generation:
        return None
    return snapshot.endpoint


def _with_session(services: Services, link: LabLink, endpoint: Endpoint) -> Response:
    """Return a redirect to the Lab, with a cookie that the edge accepts.

    Raises NotAuthenticated if the link has become invalid.
    """
    maker = link.maker
    session, text = services.sessions.make(
        link.server,
        maker.caller.actor,
        until=maker.caller.until,
        still_valid=lambda: maker.still_valid() and _endpoint(services, link) is not None,
        origin=Origin(maker.caller.actor, g.request_id),
    )
    url = endpoint.base_url.rstrip("/") + link.page
    opened = Response(status=HTTPStatus.SEE_OTHER, headers={"Location": url})
    sign_in.set_session(services, opened, session, text)
    return opened
