"""Nested fields by their original flat names (`gateway_url`, `memory_limit`, ...).

Requests may use either name; errors name a field as it was sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, cast

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails

from labkeeper.schema.requests.gateway import GatewayFields

FLAT: Final = {
    f"gateway_{name}": ("gateway", name)
    for name in GatewayFields.model_fields
    if name != "required"
} | {
    "require_gateway": ("gateway", "required"),
    "memory_limit": ("limits", "memory"),
    "cpu_limit": ("limits", "cpus"),
    "process_limit": ("limits", "processes"),
}
"""The nested field of each flat name."""
FLAT_NAMES: Final = {place: flat for flat, place in FLAT.items()}
_GROUPS: Final = frozenset(group for group, _ in FLAT.values())


def flat_fields(model: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    """Yield the fields of a model, nested ones by their flat names."""
    for name, field in model.model_fields.items():
        if name in _GROUPS:
            yield from (
                (FLAT_NAMES[name, inner], one)
                for inner, one in cast("Any", field.annotation).model_fields.items()
            )
        else:
            yield name, field


def merged(*bodies: Mapping[str, Any]) -> dict[str, Any]:
    """Return one body merged from several, also within nested fields; later ones win.

    Raises ValueError.
    """
    whole: dict[str, Any] = {}
    for body in bodies:
        grouped, _ = nested({key.replace("-", "_"): value for key, value in body.items()})
        for key, value in grouped.items():
            old = whole.get(key)
            is_group = key in _GROUPS and isinstance(value, Mapping)
            new = (
                {name.replace("-", "_"): one for name, one in value.items()} if is_group else value
            )
            whole[key] = {**old, **new} if is_group and isinstance(old, Mapping) else new
    return whole


def nested(sent: Any) -> tuple[Any, dict[tuple[str, str], str]]:
    """Return a body with flat fields nested, and their flat names. Raises ValueError."""
    if not isinstance(sent, dict):
        return sent, {}
    body, sent_as = dict(sent), dict[tuple[str, str], str]()
    for key in sent:
        flat = key.replace("-", "_") if isinstance(key, str) else ""
        if flat not in FLAT:
            continue
        group, field = place = FLAT[flat]
        inside = body.get(group, {})
        if (
            place in sent_as
            or not isinstance(inside, Mapping)
            or {field, field.replace("_", "-")} & inside.keys()
        ):
            raise ValueError(f"{flat}: is {group}.{field} by another name; give it once")
        body[group] = {**inside, field: body.pop(key)}
        sent_as[place] = flat
    return body, sent_as


def as_sent(error: ValidationError, sent_as: Mapping[tuple[str, str], str]) -> ValidationError:
    """Return the error of a nested body with field names as sent."""
    found: list[InitErrorDetails] = []
    for one in error.errors(include_url=False):
        place, rest = one["loc"][:2], one["loc"][2:]
        flat = None
        if len(place) > 1:
            flat = sent_as.get((str(place[0]), str(place[1]).replace("-", "_")))
        loc = one["loc"] if flat is None else (flat, *rest)
        found.append(
            InitErrorDetails(type=one["type"], loc=loc, input=one["input"], ctx=one.get("ctx", {}))
        )
    return ValidationError.from_exception_data(error.title, found)
