"""The API as one table: method, path, access rule, handler, answers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from flask import Flask, Response, request
from pydantic import BaseModel, ValidationError

from labkeeper.api import problems
from labkeeper.api.auth import (
    ADMINISTER,
    MANAGE_SERVER,
    MANAGE_SERVERS,
    PUBLIC,
    SEE_CALLER,
    SEE_KEEPER,
    SEE_SERVER,
    SEE_SERVERS,
    Rule,
)
from labkeeper.api.handlers import access, culling, events, keeper, links, logs, servers, usage
from labkeeper.api.handlers.common import Answer
from labkeeper.api.services import Services
from labkeeper.schema.answers.access import (
    Caller,
    Link,
    NewToken,
    Session,
    SessionList,
    Token,
    TokenList,
)
from labkeeper.schema.answers.culling import Idle, IdleList
from labkeeper.schema.answers.events import EventList, WebhookList
from labkeeper.schema.answers.keeper import Health, OrphanedKernelList, Readiness, Version
from labkeeper.schema.answers.servers import BulkResults, KernelList, Server, ServerList
from labkeeper.schema.answers.usage import UsageHistory
from labkeeper.schema.queries import of_query


@dataclass(frozen=True, slots=True)
class Route:
    """One row of the table."""

    method: str
    path: str
    rule: Rule
    handler: Callable[..., Answer | Response]
    tag: str
    answers: dict[int, type[BaseModel] | str]
    """The model or media type of each successful answer."""
    problems: tuple[int, ...] = ()
    """Statuses of its own problems; those implied by its rule and method are added."""

    @property
    def models(self) -> dict[str, type[BaseModel]]:
        """The handler's models by the part of a request: `path`, `query`, `body`."""
        found = inspect.get_annotations(self.handler, eval_str=True)
        return {part: found[part] for part in ("path", "query", "body") if part in found}


_START: Final = (404, 409, 502, 503, 504)
ROUTES: Final = (
    Route("POST", "/api/servers", MANAGE_SERVERS, servers.create_server, "servers",
          {201: Server, 200: Server, 202: Server}, (409, 502, 503, 504)),
    Route("GET", "/api/servers", SEE_SERVERS, servers.list_servers, "servers", {200: ServerList}),
    Route("GET", "/api/servers/<name>", SEE_SERVER, servers.get_server, "servers",
          {200: Server}, (404,)),
    Route("DELETE", "/api/servers/<name>", MANAGE_SERVER, servers.delete_server, "servers",
          {200: Server, 202: Server}, (404, 409, 503)),
    Route("POST", "/api/servers/<name>/stop", MANAGE_SERVER, servers.stop_server, "servers",
          {200: Server, 202: Server}, (404, 409, 503)),
    Route("POST", "/api/servers/<name>/start", MANAGE_SERVER, servers.start_server, "servers",
          {201: Server, 200: Server, 202: Server}, _START),
    Route("POST", "/api/servers/<name>/restart", MANAGE_SERVER, servers.restart_server, "servers",
          {201: Server, 200: Server, 202: Server}, _START),
    Route("POST", "/api/servers/<name>/rotate-token", MANAGE_SERVER, servers.rotate_token,
          "servers", {201: Server, 202: Server}, _START),
    Route("POST", "/api/servers/<name>/link", MANAGE_SERVER, links.make_link, "servers",
          {201: Link}, (404, 409)),
    Route("GET", "/open/<ticket>", PUBLIC, links.open_link, "servers",
          {200: "text/html", 303: "text/html", 410: "text/html"}),
    Route("POST", "/open/<ticket>", PUBLIC, links.follow_link, "servers",
          {303: "text/html", 410: "text/html"}),
    Route("POST", "/api/bulk/start", MANAGE_SERVERS, servers.start_many, "servers",
          {200: BulkResults, 202: BulkResults, 207: BulkResults}),
    Route("GET", "/api/servers/<name>/logs", SEE_SERVER, logs.get_logs, "servers",
          {200: "text/plain"}, (404,)),
    Route("GET", "/api/servers/<name>/kernels", SEE_SERVER, servers.list_kernels, "servers",
          {200: KernelList}, (404, 409, 503, 504)),
    Route("GET", "/api/servers/<name>/usage", SEE_SERVER, usage.get_usage, "servers",
          {200: UsageHistory}, (404, 503)),
    Route("GET", "/api/orphaned-kernels", SEE_KEEPER, keeper.list_orphaned_kernels, "servers",
          {200: OrphanedKernelList}),
    Route("GET", "/api/events", SEE_SERVERS, events.list_events, "history",
          {200: EventList}, (503,)),
    Route("GET", "/api/servers/<name>/events", SEE_SERVERS, events.list_server_events, "history",
          {200: EventList}, (404, 503)),
    Route("GET", "/api/webhooks", SEE_KEEPER, events.list_webhooks, "history", {200: WebhookList}),
    Route("GET", "/api/servers/<name>/idle", SEE_SERVER, culling.get_idle, "culling",
          {200: Idle}, (404,)),
    Route("POST", "/api/servers/<name>/snooze", MANAGE_SERVER, culling.snooze_server, "culling",
          {200: Idle}, (404, 503)),
    Route("GET", "/api/idle", SEE_SERVERS, culling.list_idle, "culling", {200: IdleList}),
    Route("POST", "/api/tokens", ADMINISTER, access.create_token, "access",
          {201: NewToken}, (409, 503)),
    Route("GET", "/api/tokens", ADMINISTER, access.list_tokens, "access", {200: TokenList}),
    Route("DELETE", "/api/tokens/<name>", ADMINISTER, access.revoke_token, "access",
          {200: Token}, (404, 503)),
    Route("GET", "/api/sessions", ADMINISTER, access.list_sessions, "access", {200: SessionList}),
    Route("DELETE", "/api/sessions/<id>", ADMINISTER, access.revoke_session, "access",
          {200: Session}, (404, 503)),
    Route("POST", "/api/me/link", SEE_CALLER, links.make_session_link, "access",
          {201: Link}, (409,)),
    Route("GET", "/api/me", SEE_CALLER, access.get_me, "access", {200: Caller}),
    Route("GET", "/healthz", PUBLIC, keeper.health, "keeper", {200: Health}, (503,)),
    Route("GET", "/readyz", PUBLIC, keeper.ready, "keeper", {200: Readiness}, (503,)),
    Route("GET", "/metrics", SEE_KEEPER, keeper.metrics, "keeper", {200: "text/plain"}),
    Route("GET", "/api/version", PUBLIC, keeper.version, "keeper", {200: Version}),
)  # fmt: skip

RULES: Final[dict[str, Rule]] = {route.handler.__name__: route.rule for route in ROUTES}
"""The rule of each endpoint."""


def install(app: Flask, services: Services) -> None:
    """Add the routes to an application."""
    for route in ROUTES:
        app.add_url_rule(
            route.path, route.handler.__name__, _view(route, services), methods=[route.method]
        )


def _view(route: Route, services: Services) -> Callable[..., Answer | Response]:
    """Return a view that validates the request and calls the handler."""
    models = route.models

    def view(**in_path: str) -> Answer | Response:
        sent: dict[str, Callable[[type[BaseModel]], Any]] = {
            "path": lambda _: in_path,
            "query": lambda model: of_query(model, request.args),
            "body": lambda _: request.get_json(silent=True),
        }
        try:
            given = {
                name: model.model_validate(sent[name](model)) for name, model in models.items()
            }
        except ValidationError as error:
            raise problems.invalid_request(error) from error
        return route.handler(services, **given)

    return view
