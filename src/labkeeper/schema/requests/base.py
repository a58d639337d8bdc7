"""The base of request bodies, and helpers for their fields."""

from __future__ import annotations

from typing import Any, Final

from pydantic import AliasChoices, AliasGenerator, BaseModel, ConfigDict
from pydantic.fields import FieldInfo

# A missing field has its default; a `null` field breaks its type's rule. So these types are not
# optional although the default is None (pydantic does not check defaults), and
# `"gateway-url": null` differs from a missing field.
ABSENT: Final[Any] = None

SECRET: Final[dict[str, Any]] = {"writeOnly": True}
"""Marks a field that is not a command-line option, since other users could read it there; the
keyword is JSON Schema's."""


def such_as(*bodies: Any) -> dict[str, Any]:
    """Return examples for the JSON schema."""
    return {"examples": list(bodies)}


class Request(BaseModel):
    """Accepts each field in snake_case and in kebab-case; rejects unknown ones."""

    model_config = ConfigDict(
        defer_build=True,
        extra="forbid",
        strict=True,
        alias_generator=AliasGenerator(
            validation_alias=lambda name: AliasChoices(name, name.replace("_", "-")),
        ),
    )


def is_secret(field: FieldInfo) -> bool:
    """Whether a field must not be given on a command line."""
    return (
        isinstance(field.json_schema_extra, dict)
        and SECRET.items() <= field.json_schema_extra.items()
    )
