"""How a person opens a Lab."""

from __future__ import annotations

from typing import Final

from labkeeper.client.clients import Client
from labkeeper.schema.answers.servers import Server

_PRINTED_FOR: Final = "10m"
"""Lifetime of a link that is printed for a person."""


def opening_url(client: Client, server: Server) -> str:
    """Return a URL by which a browser opens a running server: its own if that has the token.

    At the public address a browser needs a session, and thus a link, which works once.
    Raises ServerNotFound, Conflict (it does not run any more).
    """
    url = server.lab_url or ""
    if "token=" in url.partition("?")[2]:
        return url
    return client.link(server.name, expires_in=_PRINTED_FOR).url
