"""The dashboard as one table: method, path, access rule, view."""

from __future__ import annotations

import functools
import hmac
from collections.abc import Callable
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Final

from flask import Blueprint, Response, g, request
from werkzeug.exceptions import HTTPException

from labkeeper.api import problems
from labkeeper.api.app import Pages
from labkeeper.api.auth import (
    ADMINISTER,
    MANAGE_SERVER,
    MANAGE_SERVERS,
    PUBLIC,
    SEE_KEEPER,
    SEE_SERVER,
    SEE_SERVERS,
    Rule,
)
from labkeeper.api.browser import needs_own_page
from labkeeper.api.handlers import sign_in
from labkeeper.api.handlers.common import home_url
from labkeeper.api.services import Services
from labkeeper.core.errors import LabkeeperError, NotAllowed, NotAuthenticated
from labkeeper.schema.queries import BODILESS
from labkeeper.web import (
    access,
    activity,
    assets,
    commands,
    keeper,
    kernels,
    opening,
    server,
    servers,
    start,
)
from labkeeper.web.pages import csrf_token, html, notices, redirect, wants_piece
from labkeeper.web.rendering import render


@dataclass(frozen=True, slots=True)
class Route:
    """One row of the table."""

    method: str
    path: str
    rule: Rule
    view: Callable[..., Response]


_NAMED: Final = "/dashboard/servers/<name>"
_KERNEL: Final = f"{_NAMED}/kernels/<kernel>"
_ACCESS: Final = "/dashboard/access"
ROUTES: Final = (
    Route("GET", "/dashboard/", SEE_SERVERS, servers.list_servers),
    Route("GET", "/dashboard/start", MANAGE_SERVERS, start.show_form),
    Route("POST", "/dashboard/start", MANAGE_SERVERS, start.start_server),
    Route("POST", "/dashboard/start/gateway", MANAGE_SERVERS, start.check_gateway),
    Route("GET", _NAMED, SEE_SERVER, server.show_server),
    Route("GET", f"{_NAMED}/usage", SEE_SERVER, server.usage_over_time),
    Route("GET", f"{_NAMED}/open", MANAGE_SERVER, opening.open_lab),
    Route("POST", f"{_NAMED}/snooze", MANAGE_SERVER, server.snooze),
    Route("POST", f"{_NAMED}/link", MANAGE_SERVER, server.make_link),
    Route("GET", f"{_KERNEL}/<command>", MANAGE_SERVER, kernels.confirm),
    Route("POST", f"{_KERNEL}/<command>", MANAGE_SERVER, kernels.give),
    Route("GET", f"{_NAMED}/<command>", MANAGE_SERVER, commands.confirm),
    Route("POST", f"{_NAMED}/<command>", MANAGE_SERVER, commands.give),
    Route("POST", "/dashboard/many/<command>", MANAGE_SERVERS, commands.give_many),
    Route("GET", "/dashboard/activity", SEE_SERVERS, activity.list_events),
    Route("GET", _ACCESS, ADMINISTER, access.show),
    Route("POST", f"{_ACCESS}/tokens", ADMINISTER, access.create_token),
    Route("GET", f"{_ACCESS}/tokens/<name>/revoke", ADMINISTER, access.confirm_token),
    Route("POST", f"{_ACCESS}/tokens/<name>/revoke", ADMINISTER, access.revoke_token),
    Route("GET", f"{_ACCESS}/sessions/<id_>/revoke", ADMINISTER, access.confirm_session),
    Route("POST", f"{_ACCESS}/sessions/<id_>/revoke", ADMINISTER, access.revoke_session),
    Route("GET", "/dashboard/keeper", SEE_KEEPER, keeper.show),
)


def dashboard(services: Services) -> Pages:
    """Return the pages with their rules."""
    made = Blueprint("dashboard", "labkeeper.web")
    rules: dict[str, Rule] = {}

    def add(method: str, path: str, rule: Rule, view: Callable[..., Response]) -> None:
        endpoint = f"{method} {path}"
        made.add_url_rule(path, endpoint, view, methods=[method])
        rules[f"{made.name}.{endpoint}"] = rule

    for route in ROUTES:
        view = functools.partial(route.view, services)
        add(route.method, route.path, replace(route.rule, of_page=True), view)
    add("GET", "/", PUBLIC, _front)
    add("GET", "/dashboard", PUBLIC, _front)
    add("GET", "/dashboard/static/<tag>/<path:name>", PUBLIC, assets.serve)
    made.before_request(_check_form)
    made.register_error_handler(LabkeeperError, lambda error: _failed(services, error))
    made.register_error_handler(HTTPException, lambda error: _missing(services, error))
    return Pages(made, rules)


def _front() -> Response:
    return redirect(sign_in.HOME)


def _check_form() -> None:
    """Raise NotAllowed unless a form was sent from a page of this session (OWASP on CSRF)."""
    if request.method in BODILESS:
        return
    needs_own_page("do that")
    sent = request.form.get("csrf", "")
    if not hmac.compare_digest(csrf_token().encode(), sent.encode()):
        raise NotAllowed("cannot do that: the page is from an earlier session; load it again")


def _failed(services: Services, error: LabkeeperError) -> Response:
    """Return the page, or piece, about an error."""
    if isinstance(error, NotAuthenticated):
        return _signed_out(services)
    # Scripts show pieces of successful answers only.
    status = HTTPStatus.OK if wants_piece() and "caller" in g else problems.status_of(error)
    return _not_done(services, error.message, status)


def _missing(services: Services, error: HTTPException) -> Response:
    status = error.code or HTTPStatus.INTERNAL_SERVER_ERROR
    return _not_done(services, f"cannot find {request.path[:200]}", status)


def _not_done(services: Services, message: str, status: int) -> Response:
    if "caller" not in g:
        # Refused before it was known whose request it is, as if from another site, or public.
        return Response(f"{message}\n", status, content_type="text/plain; charset=utf-8")
    answer = notices(services, "", [message])
    answer.status_code = status
    return answer


def _signed_out(services: Services) -> Response:
    """Return the page for a browser without a session, or send it to where it may have one."""
    home = home_url(services)
    if home is not None and not sign_in.is_at(services, None):
        return redirect(f"{home}{request.full_path.rstrip('?')}")
    shown = html(render("signed-out.html", {"possible": home is not None}))
    shown.status_code = HTTPStatus.UNAUTHORIZED
    return shown
