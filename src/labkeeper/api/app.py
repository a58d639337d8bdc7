"""The Flask application: `create_app` puts routes, access, problems and the OpenAPI document together."""

from __future__ import annotations

import functools
import json
import re
import time
import uuid
from pathlib import Path
from typing import Any, Final

import structlog
from flask import Blueprint, Flask, Response, g, request, send_from_directory
from werkzeug.exceptions import BadRequest

from labkeeper.api import problems
from labkeeper.api.access import check
from labkeeper.api.requests import invalid
from labkeeper.api.routes import RULES, Api, install
from labkeeper.api.services import Services
from labkeeper.core.ports import Meter

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""What a caller's, or a proxy's, own id of a request may look like."""

_log = structlog.get_logger("labkeeper.api")


def create_app(services: Services) -> Flask:
    """Make the application; it holds no state but what `services` hold."""
    app = Flask("labkeeper", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = services.max_body
    # Exceptions are ours to answer, in tests too.
    app.config["PROPAGATE_EXCEPTIONS"] = False
    app.json.sort_keys = False  # type: ignore[attr-defined]
    problems.register(app)
    app.before_request(_begin)
    app.before_request(lambda: check(RULES[request.endpoint], services.token) if request.endpoint in RULES else None)
    app.before_request(_check_body)
    app.after_request(functools.partial(_finish, services.meter))
    install(app, Api(services))
    app.register_blueprint(_pages(services.version))
    return app


def _begin() -> None:
    sent = request.headers.get("X-Request-Id", "")
    g.request_id = sent if _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
    g.began = time.monotonic()
    structlog.contextvars.bind_contextvars(request_id=g.request_id)


def _check_body() -> None:
    """Take a body only as a JSON object; none at all is an empty one."""
    if request.method in {"GET", "HEAD", "OPTIONS"} or not request.get_data(cache=True):
        return
    try:
        body = request.get_json()
    except RecursionError:
        body = None
    except BadRequest:
        raise BadRequest("cannot take the request: the body is not JSON") from None
    if not isinstance(body, dict):
        raise invalid("body", "must be a JSON object")
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        # JSON can write half of a character; nothing that a string is for (a file, a header, a store) can take it.
        raise invalid("body", "must be of whole characters (it has a lone surrogate)") from None


def _finish(meter: Meter, answer: Response) -> Response:
    seconds = time.monotonic() - g.began
    meter.answered(request.url_rule.rule if request.url_rule else None, request.method, answer.status_code, seconds)
    answer.headers["X-Request-Id"] = g.request_id
    answer.headers["X-Content-Type-Options"] = "nosniff"
    answer.headers.setdefault("Cache-Control", "no-store")
    _log.debug(
        "request",
        method=request.method,
        path=request.path,
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
<link rel="stylesheet" href="docs/static/css/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/static/js/swagger-ui-bundle.js"></script>
<script>SwaggerUIBundle({url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true})</script>
</body>
</html>
"""


def _pages(version: str) -> Blueprint:
    """The OpenAPI document and a page to read it; the page's scripts come with a package, so it works without internet."""
    pages = Blueprint("pages", "labkeeper.pages")

    @functools.cache
    def written() -> dict[str, Any]:
        from labkeeper.api.document import document  # noqa: PLC0415 - late: few ask for it, and it takes long to import

        return document(version)

    def asset(filename: str) -> Response:
        import flask_openapi3_swagger  # noqa: PLC0415 - late, as above

        return send_from_directory(Path(flask_openapi3_swagger.__file__).parent / "templates" / "swagger", filename)

    pages.add_url_rule("/api/openapi.json", "openapi", written)
    pages.add_url_rule("/api/docs", "docs", lambda: Response(_DOCS_PAGE, content_type="text/html; charset=utf-8"))
    pages.add_url_rule("/api/docs/static/<path:filename>", "static", asset)
    return pages
