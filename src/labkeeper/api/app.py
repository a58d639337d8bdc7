"""The Flask application: `create_app` combines routes, authorization, problems and OpenAPI."""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
import mimetypes
import re
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import structlog
from flask import Blueprint, Flask, Response, g, request
from flask.json.provider import DefaultJSONProvider
from werkzeug.exceptions import BadRequest, NotFound, PreconditionFailed
from werkzeug.wsgi import wrap_file

from labkeeper.api import home, labs, problems
from labkeeper.api.auth import PUBLIC, Authorizer, Rule
from labkeeper.api.browser import Guard
from labkeeper.api.handlers import sign_in
from labkeeper.api.rates import Rates
from labkeeper.api.routes import RULES, install
from labkeeper.api.services import Services
from labkeeper.core.errors import InvalidSpec
from labkeeper.metrics.collector import Metrics
from labkeeper.schema.queries import BODILESS

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""Pattern of a request id that the caller or a proxy may supply."""

_log = structlog.get_logger("labkeeper.api")


def create_app(services: Services, dashboard: Pages | None = None) -> Flask:
    """Return the application; its only state is in `services`."""
    app = Flask("labkeeper", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = services.max_body
    # Exceptions are always answered here, in tests too.
    app.config["PROPAGATE_EXCEPTIONS"] = False
    app.json = _Json(app)
    # Otherwise werkzeug redirects near misses of a path, which few clients follow correctly.
    app.url_map.merge_slashes = False
    problems.register(app)
    guard = Guard(hosts=services.hosts, origins=services.origins)
    authorizer = Authorizer(
        services.authenticators,
        services.keeper,
        Rates(services.max_request_rate),
        functools.partial(sign_in.identity, services),
    )
    rules = _RULES if dashboard is None else {**_RULES, **dashboard.rules}
    app.before_request(_begin)
    app.before_request(guard.check)
    app.before_request(functools.partial(_enter, authorizer, rules))
    app.before_request(_check_body)
    app.after_request(guard.finish)
    app.after_request(functools.partial(_finish, services.metrics))
    install(app, services)
    app.register_blueprint(_pages(services.version))
    app.register_blueprint(labs.pages(services))
    app.register_blueprint(home.pages(services))
    if dashboard is not None:
        app.register_blueprint(dashboard.blueprint)
    return app


@dataclass(frozen=True, slots=True)
class Pages:
    """Pages from outside of the API."""

    blueprint: Blueprint
    rules: Mapping[str, Rule]
    """The rule of each of their endpoints."""


class _Json(DefaultJSONProvider):
    """Rejects objects with duplicate names: parsers differ on which one counts."""

    sort_keys = False

    def loads(self, s: str | bytes, **kwargs: Any) -> Any:
        """Parse JSON. Raises ValueError, InvalidSpec."""
        return super().loads(s, object_pairs_hook=_once_each, **kwargs)


def _once_each(members: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(members)
    if len(made) < len(members):
        counted = Counter(name for name, _ in members)
        raise InvalidSpec.twice(next(name for name in counted if counted[name] > 1))
    return made


def _enter(authorizer: Authorizer, rules: Mapping[str, Rule]) -> None:
    """Authorize a request by its route's rule; without a route, everyone gets the error."""
    if request.endpoint is not None:
        g.rule = rules[request.endpoint]
        authorizer.authorize(g.rule)


def _begin() -> None:
    sent = request.headers.get("X-Request-Id", "")
    g.request_id = sent if _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
    g.began = time.monotonic()
    structlog.contextvars.bind_contextvars(request_id=g.request_id)


def _check_body() -> None:
    """Accept a body only as a JSON object; a missing body counts as an empty one.

    Pages of the dashboard post forms.
    """
    if request.method in BODILESS or (request.endpoint is not None and g.rule.of_page):
        return
    if not request.get_data(cache=True):
        return
    try:
        body = request.get_json()
    except RecursionError:
        body = None
    except BadRequest:
        raise BadRequest("cannot accept the request: the body is not JSON") from None
    if not isinstance(body, dict):
        raise InvalidSpec.of("body", "must be a JSON object")
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        # JSON can encode half a character; no file, header or store accepts such a string.
        raise InvalidSpec.of(
            "body", "must be of whole characters (it has a lone surrogate)"
        ) from None


def _finish(metrics: Metrics, answer: Response) -> Response:
    seconds = time.monotonic() - g.began
    metrics.answered(
        request.url_rule.rule if request.url_rule else None,
        request.method,
        answer.status_code,
        seconds,
    )
    answer.headers["X-Request-Id"] = g.request_id
    _log.debug(
        "request",
        method=request.method,
        # Not the path: that of a link is secret.
        route=str(request.url_rule),
        server=problems.server_in_path(),
        status=answer.status_code,
        milliseconds=round(seconds * 1000, 1),
    )
    structlog.contextvars.unbind_contextvars("request_id")
    return answer


_DOCS_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>labkeeper API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/static/css/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/static/js/swagger-ui-bundle.js"></script>
<script>{script}</script>
</body>
</html>
"""
_DOCS_SCRIPT: Final = (
    'SwaggerUIBundle({url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true})'
)
_DOCS_POLICY: Final = (
    "default-src 'none'; script-src 'self' 'sha256-{hash}'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; frame-ancestors 'none'"
)
"""What the page may load: its own assets and its inline script."""
_RULES: Final[dict[str, Rule]] = (
    RULES
    | labs.RULES
    | home.RULES
    | dict.fromkeys(("pages.openapi", "pages.docs", "pages.static"), PUBLIC)
)
"""The rule of each endpoint; one without a rule is not served."""


def _pages(version: str) -> Blueprint:
    """Return the OpenAPI document and its viewer, whose packaged scripts need no internet."""
    pages = Blueprint("pages", "labkeeper.pages")

    @functools.cache
    def written() -> dict[str, Any]:
        from labkeeper.api.openapi import document  # noqa: PLC0415 - 2 ms of a keeper's start

        return document(version)

    @functools.cache
    def assets() -> dict[str, bytes]:
        import flask_openapi3_swagger  # noqa: PLC0415 - only its page needs it

        root = Path(flask_openapi3_swagger.__file__).parent / "templates" / "swagger"
        return {
            str(path.relative_to(root)): path.read_bytes()
            for path in root.rglob("*")
            if path.is_file()
        }

    def asset(filename: str) -> Response:
        content = assets().get(filename)
        if content is None:
            raise NotFound
        # Served from shared memory: a slow reader holds neither an open file nor a copy.
        shown = Response(wrap_file(request.environ, io.BytesIO(content)), direct_passthrough=True)
        shown.content_type = mimetypes.guess_type(filename)[0] or "application/octet-stream"
        shown.content_length = len(content)
        shown.cache_control.no_cache = True
        shown.set_etag(f"{zlib.adler32(content):x}")
        shown.make_conditional(request)
        if shown.status_code == HTTPStatus.PRECONDITION_FAILED:
            raise PreconditionFailed
        return shown

    pages.add_url_rule("/api/openapi.json", "openapi", written)

    def page() -> Response:
        shown = Response(
            _DOCS_PAGE.replace("{script}", _DOCS_SCRIPT), content_type="text/html; charset=utf-8"
        )
        script = base64.b64encode(hashlib.sha256(_DOCS_SCRIPT.encode()).digest()).decode()
        shown.headers["Content-Security-Policy"] = _DOCS_POLICY.format(hash=script)
        return shown

    pages.add_url_rule("/api/docs", "docs", page)
    pages.add_url_rule("/api/docs/static/<path:filename>", "static", asset)
    return pages
