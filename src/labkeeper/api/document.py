"""The OpenAPI document, made of the table of routes.

What writes it takes long to load and to take the table in, so this module is imported when somebody asks for the document.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

from flask_openapi3 import Info, OpenAPI, Tag
from pydantic import BaseModel

from labkeeper.api import problems
from labkeeper.api.answers import Problem
from labkeeper.api.routes import ROUTES, Route


def document(version: str) -> dict[str, Any]:
    """Write the document of the API of this version."""
    # An application that answers nobody: it only takes in what it describes.
    app = OpenAPI(
        "labkeeper",
        info=Info(title="labkeeper", version=version, description="JupyterLab servers on demand."),
        security_schemes={"token": {"type": "http", "scheme": "bearer"}},
        validation_error_model=Problem,
        doc_ui=False,
        static_folder=None,
    )
    tags = {
        "servers": Tag(name="servers", description="JupyterLab servers"),
        "history": Tag(name="history", description="What happened"),
        "culling": Tag(name="culling", description="Whether servers are stopped for want of use"),
        "access": Tag(name="access", description="Who may do what"),
        "keeper": Tag(name="keeper", description="This service"),
    }
    for route in ROUTES:
        _describe(app, route, tags[route.tag])
    written: dict[str, Any] = app.api_doc
    return written


def _describe(app: OpenAPI, route: Route, tag: Tag) -> None:
    refusals = (422, 500, *((401, 403) if route.rule.scope is not None else ()), *route.problems)
    answers: dict[Any, Any] = {status: _answer_doc(what) for status, what in route.answers.items()}
    answers |= {status: {"content": {problems.MEDIA_TYPE: _PROBLEM_SCHEMA}} for status in refusals}
    security: list[dict[str, list[Any]]] = [{"token": []}] if route.rule.scope is not None else []
    decorate = getattr(app, route.method.lower())(
        route.path,
        tags=[tag],
        operation_id=route.handler.__name__,
        responses=answers,
        security=security,
        endpoint=route.handler.__name__,
    )
    decorate(_copy(route.handler))


def _copy(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function that reads as the handler does: attributes are set on what is described."""

    @functools.wraps(handler)
    def described(**given: Any) -> Any:
        raise AssertionError(given)  # pragma: no cover - never called

    return described


_PROBLEM_SCHEMA: Final = {"schema": {"$ref": f"#/components/schemas/{Problem.__name__}"}}


def _answer_doc(what: type[BaseModel] | str) -> type[BaseModel] | dict[str, Any]:
    return {"content": {what: {"schema": {"type": "string"}}}} if isinstance(what, str) else what
