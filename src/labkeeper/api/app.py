"""The Flask application: `create_app` puts routes, access, problems and the OpenAPI document together."""

from __future__ import annotations

import json
import time
import uuid
from pathlib import Path
from typing import Final

import flask_openapi3_swagger
import structlog
from flask import Blueprint, Response, g, request
from flask_openapi3 import Info, OpenAPI
from pydantic import ValidationError
from werkzeug.exceptions import BadRequest

from labkeeper.api import problems
from labkeeper.api.access import check
from labkeeper.api.answers import Problem
from labkeeper.api.requests import invalid
from labkeeper.api.routes import RULES, Api, install
from labkeeper.api.services import Services

_log = structlog.get_logger("labkeeper.api")


def create_app(services: Services) -> OpenAPI:
    """Make the application; it holds no state but what `services` hold."""
    app = OpenAPI(
        "labkeeper",
        info=Info(title="labkeeper", version=services.version, description="JupyterLab servers on demand."),
        security_schemes={"token": {"type": "http", "scheme": "bearer"}},
        validation_error_model=Problem,
        validation_error_callback=_invalid,
        doc_ui=False,
        static_folder=None,
    )
    app.config["MAX_CONTENT_LENGTH"] = services.max_body
    # Exceptions are ours to answer, in tests too.
    app.config["PROPAGATE_EXCEPTIONS"] = False
    app.json.sort_keys = False  # type: ignore[attr-defined]
    problems.register(app)
    app.before_request(_begin)
    app.before_request(lambda: check(RULES[request.endpoint], services.token) if request.endpoint in RULES else None)
    app.before_request(_check_body)
    app.after_request(_finish)
    install(app, Api(services))
    app.register_blueprint(_pages(app))
    return app


def _invalid(error: ValidationError) -> Response:
    problems.validation_failed(error)
    raise AssertionError  # pragma: no cover - the line above raises


def _begin() -> None:
    g.request_id = uuid.uuid4().hex
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


def _finish(answer: Response) -> Response:
    answer.headers["X-Request-Id"] = g.request_id
    answer.headers["X-Content-Type-Options"] = "nosniff"
    answer.headers.setdefault("Cache-Control", "no-store")
    _log.debug(
        "request",
        method=request.method,
        path=request.path,
        status=answer.status_code,
        milliseconds=round((time.monotonic() - g.began) * 1000, 1),
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


def _pages(app: OpenAPI) -> Blueprint:
    """The OpenAPI document and a page to read it; the page's scripts come with a package, so it works without internet."""
    assets = Path(flask_openapi3_swagger.__file__).parent / "templates" / "swagger"
    pages = Blueprint("pages", "labkeeper.pages", static_folder=assets, static_url_path="/api/docs/static")
    pages.add_url_rule("/api/openapi.json", "openapi", lambda: app.api_doc)
    pages.add_url_rule("/api/docs", "docs", lambda: Response(_DOCS_PAGE, content_type="text/html; charset=utf-8"))
    return pages
