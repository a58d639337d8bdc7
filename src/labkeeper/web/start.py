"""The form that starts a server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from flask import Response, request
from pydantic import ValidationError

from labkeeper.api.handlers import servers
from labkeeper.api.handlers.common import caller
from labkeeper.api.problems import invalid_request, status_of
from labkeeper.api.services import Services
from labkeeper.core.access import Scope
from labkeeper.core.errors import InvalidSpec, LabkeeperError
from labkeeper.schema.queries import StartQuery
from labkeeper.schema.requests.gateway import GatewayFields
from labkeeper.schema.requests.servers import ServerRequest
from labkeeper.web.pages import Content, html, redirect, whole
from labkeeper.web.rendering import render

_TEXTS: Final = ("name", "description", "root_dir", "default_url", "user")
_TIMES: Final = ("idle_timeout", "max_age", "sleep_after")
_PAIRS: Final = ("env", "kernel_env", "labels")
_GATEWAY: Final = ("url", "auth_token")
_GIBI: Final = 2**30


def show_form(services: Services) -> Response:
    """Show the form."""
    return _form(services, {}, None)


def start_server(services: Services) -> Response:
    """Create and start a server; lead to its page, or show the form with what is wrong."""
    sent = request.form.to_dict()
    try:
        body = ServerRequest.model_validate(_body(sent))
        servers.create_server(services, body, StartQuery(wait=0))
    except ValidationError as wrong:
        return _form(services, sent, invalid_request(wrong))
    except LabkeeperError as wrong:
        return _form(services, sent, wrong)
    return redirect(f"/dashboard/servers/{body.name}")


def check_gateway(services: Services) -> Response:
    """Show whether the gateway in the form can be used."""
    sent = request.form.to_dict()
    try:
        fields = GatewayFields.model_validate(_gateway(sent))
    except ValidationError as wrong:
        return html(render("gateway.html", {"error": invalid_request(wrong).message}))
    if fields.url is None:
        return html(render("gateway.html", {"error": None, "health": None}))
    health = services.check_gateway(fields.at(fields.url))
    error = None if health.error is None else health.error.message
    return html(render("gateway.html", {"error": error, "health": health}))


def _form(services: Services, sent: Mapping[str, str], error: LabkeeperError | None) -> Response:
    wrong = {} if error is None else _wrong(error)
    given = {
        "sent": sent,
        "wrong": wrong,
        "error": None if error is None else error.message,
        "defaults": services.defaults,
        "is_admin": caller().scope.covers(Scope.ADMIN),
    }
    shown = html(whole(services, Content("Start a server", "start.html", given=given)))
    if error is not None:
        shown.status_code = status_of(error)
    return shown


def _wrong(error: LabkeeperError) -> dict[str, str]:
    """Return the rule that each field of the form breaks."""
    return {mistake["field"]: mistake["rule"] for mistake in error.details.get("errors", ())}


def _body(sent: Mapping[str, str]) -> dict[str, Any]:
    """Return the request of a form, without what was left empty. Raises InvalidSpec."""
    given = {name: text for name, text in sent.items() if text.strip()}
    body: dict[str, Any] = {name: given[name].strip() for name in _TEXTS if name in given}
    body |= {name: given[name].strip() for name in _TIMES if name in given}
    body |= {name: _pairs(name, given[name]) for name in _PAIRS if name in given}
    limits = {
        name: _number(name, given[name])
        for name in ("memory", "cpus", "processes")
        if name in given
    }
    if "memory" in limits:
        limits["memory"] = int(limits["memory"] * _GIBI)
    if "processes" in limits:
        limits["processes"] = int(limits["processes"])
    if limits:
        body["limits"] = limits
    if gateway := _gateway(given):
        body["gateway"] = gateway
    if "kernels_by" in given:
        body["kernels_by"] = given["kernels_by"]
    return body


def _gateway(sent: Mapping[str, str]) -> dict[str, Any]:
    return {
        name: sent[f"gateway.{name}"].strip()
        for name in _GATEWAY
        if sent.get(f"gateway.{name}", "").strip()
    }


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InvalidSpec.of(f"limits.{name}", "must be a number") from None


def _pairs(name: str, text: str) -> dict[str, str]:
    """Return lines of NAME=value as a mapping. Raises InvalidSpec."""
    pairs = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        key, is_pair, value = line.partition("=")
        if not is_pair:
            raise InvalidSpec.of(name, "must have one NAME=value in each line")
        if key.strip() in pairs:
            raise InvalidSpec.twice(key.strip())
        pairs[key.strip()] = value.strip()
    return pairs
