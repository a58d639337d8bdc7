"""One-time links that open a Lab."""

from __future__ import annotations

import time
from http import HTTPStatus
from typing import Final
from urllib.parse import quote

from flask import Response, request

from labkeeper.api.handlers.common import (
    Answer,
    find_server,
    json_answer,
    lab_root,
    public_url,
)
from labkeeper.api.services import Services
from labkeeper.core.durations import format_time
from labkeeper.core.errors import (
    Conflict,
)
from labkeeper.schema.answers.access import Link
from labkeeper.schema.queries import (
    ServerPath,
    TicketPath,
)
from labkeeper.schema.requests.access import LinkRequest

_SPENT_LINK: Final = """<!doctype html>
<html lang="en">
<title>This link opens nothing any more</title>
<h1>This link opens nothing any more</h1>
<p>It was used, or it is too old, or its server was launched again.
Go back to where it came from, and ask for another.</p>
</html>
"""


def make_link(services: Services, path: ServerPath, body: LinkRequest) -> Answer:
    """Create a link that opens a running server's Lab once, within a short time.

    The link does not contain the Lab's token.
    """
    snapshot = find_server(services, path)
    if snapshot.endpoint is None:
        raise Conflict(
            f"cannot create a link to server '{snapshot.name}': it is {snapshot.state}, not running"
        )
    page = snapshot.spec.default_url if body.page is None else body.page
    ticket = services.links.make(
        snapshot.qualified_name, snapshot.generation, page, lifetime=body.expires_in
    )
    url = f"{public_url(services)}/open/{ticket}"
    expires_at = format_time(time.time() + body.expires_in)
    return json_answer(Link(url=url, expires_at=expires_at), HTTPStatus.CREATED)


def open_link(services: Services, path: TicketPath) -> Response:
    """Open a Lab by a one-time link: redirect the browser to the Lab, which sets its cookie."""
    link = services.links.use(path.ticket) if request.method == "GET" else None
    snapshot = None if link is None else services.keeper.get(link.server)
    if (
        link is None
        or snapshot is None
        or snapshot.endpoint is None
        or snapshot.generation != link.generation
    ):
        return Response(_SPENT_LINK, HTTPStatus.GONE, content_type="text/html; charset=utf-8")
    # Jupyter accepts the token, sets its cookie, and redirects to a page without the token.
    root = lab_root(services, snapshot.endpoint)
    # Jupyter would parse anything before a colon as a scheme.
    next_page = (snapshot.endpoint.base_url.rstrip("/") + link.page).replace(":", "%3A")
    target = f"{root}login?token={snapshot.endpoint.token}&next={quote(next_page, safe='')}"
    return Response(status=HTTPStatus.SEE_OTHER, headers={"Location": target})
