"""The way to a Lab, by a plain link: browsers block a form that is sent on to another site."""

from __future__ import annotations

from typing import Final

from flask import Response, g

from labkeeper.api.handlers import sign_in
from labkeeper.api.handlers.common import caller, find_server, lab_origin, public_url
from labkeeper.api.links import LabLink, Maker
from labkeeper.api.services import Services
from labkeeper.core.errors import Conflict, NotAllowed
from labkeeper.schema.queries import ServerPath
from labkeeper.web.pages import redirect

_LASTS: Final = 30.0
"""Seconds for which a link is valid that the browser follows at once."""


def open_lab(services: Services, name: str) -> Response:
    """Lead to a Lab: its address asks this host for a session, or has a page if it does not run."""
    if not sign_in.is_person():
        raise NotAllowed("cannot open a Lab for a page that is loaded ahead of time, or in a frame")
    snapshot = find_server(services, ServerPath(name=name))
    server, labs = snapshot.qualified_name, services.labs
    page = snapshot.spec.default_url
    if "session" in g:
        root = labs.cookie_path(server)
        return redirect(f"{lab_origin(services, server)}{sign_in.path_below(root, page)}")
    if snapshot.endpoint is None:
        raise Conflict(f"cannot open server '{name}': it is {snapshot.state}, not running")
    # Without access control there is no session that the Lab's address could ask for.
    link = LabLink(Maker(caller()), server, snapshot.generation, page, confirm=False)
    served = labs.serves(server, snapshot.endpoint)
    host = lab_origin(services, server) if served else public_url(services)
    return redirect(f"{host}/open/{services.links.make(link, lifetime=_LASTS)}")
