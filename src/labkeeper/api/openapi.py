"""The OpenAPI document (spec.openapis.org/oas/v3.1.0), generated from the routes and their models.

Schemas are pydantic's own. Their generation is slow to import, so this module is imported late.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema
from pydantic_core import core_schema

from labkeeper.api import problems
from labkeeper.api.routes import ROUTES, Route
from labkeeper.api.streaming import EVENT_STREAM
from labkeeper.schema.answers.problems import Problem
from labkeeper.schema.answers.servers import Server
from labkeeper.schema.queries import BODILESS, EventQuery

_Object = dict[str, Any]

_TAGS: Final = {
    "servers": "JupyterLab servers",
    "history": "What happened",
    "culling": "Whether servers are stopped for want of use",
    "access": "Who may do what",
    "keeper": "This service",
}
_HEADERS: Final = {
    "X-Request-Id": (
        "The id under which the keeper's log has more of the request; "
        "the caller's own where it sent one."
    ),
    "Location": "Path of the server.",
    "Retry-After": "Seconds after which to ask again.",
    "WWW-Authenticate": "What is asked for: a bearer token.",
}
_SCHEME: Final = (
    "`labkeeper token` on the keeper's machine prints the owner's; `POST /api/tokens` makes others."
)
_LINKS: Final[_Object] = {
    name: {"operationId": name, "parameters": {"name": "$response.body#/name"}}
    for name in (route.handler.__name__ for route in ROUTES if "<name>" in route.path)
}
"""The operations on a server, as links from an answer about it."""
_TEXT: Final[_Object] = {"schema": {"type": "string"}}
_LAST_EVENT_ID: Final = {
    "name": "Last-Event-ID",
    "in": "header",
    "description": (
        "Id of the last event that the caller knows: only those that came after it; "
        "goes before `after`."
    ),
    "required": False,
    "schema": {"type": "string", "pattern": "^[0-9]{0,18}$"},
}


def document(version: str) -> _Object:
    """Return the OpenAPI document of this version."""
    schemas = _Schemas(ROUTES)
    paths: dict[str, _Object] = {}
    for route in ROUTES:
        path = route.path.replace("<", "{").replace(">", "}")
        paths.setdefault(path, {})[route.method.lower()] = _operation(route, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "labkeeper",
            "version": version,
            "description": "JupyterLab servers on demand.",
        },
        "tags": [{"name": name, "description": about} for name, about in _TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": schemas.components,
            "headers": {name: _header(name) for name in _HEADERS},
            "links": _LINKS,
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "description": _SCHEME}
            },
        },
    }


class _Dialect(GenerateJsonSchema):
    """JSON Schema for callers: a field without a real default shows none."""

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        """Omit the default None, by which a model marks a missing field."""
        if schema.get("default") is None:
            return self.generate_inner(schema["schema"])
        return super().default_schema(schema)


class _Schemas:
    """The schemas of all models, each once."""

    def __init__(self, routes: Iterable[Route]) -> None:
        asked = {model for route in routes for model in route.models.values()}
        given = {
            model
            for route in routes
            for model in route.answers.values()
            if not isinstance(model, str)
        } | {Problem}
        modes: list[tuple[type[BaseModel], Any]] = [(model, "validation") for model in asked]
        modes += [(model, "serialization") for model in given]
        modes.sort(key=lambda one: one[0].__name__)
        _, written = models_json_schema(
            modes,
            ref_template="#/components/schemas/{model}",
            schema_generator=_Dialect,
            by_alias=True,
        )
        self.components: _Object = written["$defs"]
        in_pieces = {
            model.__name__
            for route in routes
            for part, model in route.models.items()
            if part != "body"
        }
        self._pieces = {name: self.components.pop(name) for name in in_pieces}

    def parameters(self, model: type[BaseModel], where: str) -> list[_Object]:
        """Return a model's fields as parameters at a place such as `query`."""
        schema = self._pieces[model.__name__]
        required = {*schema.get("required", ())} if where == "query" else {*schema["properties"]}
        return [
            {
                "name": name,
                "in": where,
                "description": field.get("description", ""),
                "required": name in required,
                "schema": {key: value for key, value in field.items() if key != "description"},
            }
            for name, field in schema["properties"].items()
        ]


def _operation(route: Route, schemas: _Schemas) -> _Object:
    asked = route.models
    summary, _, description = inspect.cleandoc(route.handler.__doc__ or "").partition("\n\n")
    parameters = [
        one
        for part in ("path", "query")
        if part in asked
        for one in schemas.parameters(asked[part], part)
    ]
    if asked.get("query") is EventQuery:
        parameters.append(_LAST_EVENT_ID)
    written = {
        "operationId": route.handler.__name__,
        "tags": [route.tag],
        "summary": " ".join(summary.split()),
        "description": description,
        "parameters": parameters,
        "responses": {
            str(status): _good(route, status, what) for status, what in route.answers.items()
        }
        | {str(status): _refusal(status) for status in _refusals(route)},
        "security": [{"token": []}] if route.rule.scope is not None else [],
    }
    if "body" in asked:
        written["requestBody"] = {
            "content": _content("application/json", asked["body"]),
            "required": any(field.is_required() for field in asked["body"].model_fields.values()),
        }
    return written


def _good(route: Route, status: int, what: type[BaseModel] | str) -> _Object:
    content = {what: _TEXT} if isinstance(what, str) else _content("application/json", what)
    headers = ["X-Request-Id"]
    if route.models.get("query") is EventQuery:
        content[EVENT_STREAM] = _TEXT
    written: _Object = {"description": HTTPStatus(status).phrase, "content": content}
    if what is Server:
        written["links"] = {name: _reference("links", name) for name in _LINKS}
        headers += ["Location"] if HTTPStatus.CREATED in route.answers else []
        headers += ["Retry-After"] if status == HTTPStatus.ACCEPTED else []
    return written | {"headers": {name: _reference("headers", name) for name in headers}}


def _refusals(route: Route) -> list[int]:
    """Return the status of each problem of a route: the common ones and its own."""
    found = {421, 422, 431, 500, *route.problems}
    found |= {401, 403, 429} if route.rule.scope is not None else set()
    found |= {400, 413, 415} if route.method not in BODILESS else set()
    return sorted(found)


_UNREAD: Final = frozenset(
    {
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    }
)


def _refusal(status: int) -> _Object:
    # An unreadable request is rejected before it gets an id.
    headers = [] if status in _UNREAD else ["X-Request-Id"]
    headers += ["WWW-Authenticate"] if status == HTTPStatus.UNAUTHORIZED else []
    headers += ["Retry-After"] if status == HTTPStatus.TOO_MANY_REQUESTS else []
    return {
        "description": HTTPStatus(status).phrase,
        "content": _content(problems.MEDIA_TYPE, Problem),
        "headers": {name: _reference("headers", name) for name in headers},
    }


def _content(media_type: str, model: type[BaseModel]) -> _Object:
    return {media_type: {"schema": _reference("schemas", model.__name__)}}


def _header(name: str) -> Mapping[str, Any]:
    kind: _Object = {"type": "string", "minLength": 1}
    if name == "Retry-After":
        kind = {"type": "integer", "minimum": 0}
    return {"description": _HEADERS[name], "required": True, "schema": kind}


def _reference(kind: str, name: str) -> _Object:
    return {"$ref": f"#/components/{kind}/{name}"}
