"""Types for text and mappings in requests: each with its rule in words and its JSON pattern."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from labkeeper.core.durations import LONGEST, LONGEST_TEXT, duration
from labkeeper.core.spec import NAME_PATTERN, NAME_RULE
from labkeeper.schema.variables import VARIABLE, check_env, check_kernel_env


@dataclass(frozen=True, slots=True)
class Shape:
    """A text pattern: validated here, published in the OpenAPI document, explained in errors."""

    pattern: str
    """Matches the whole text; valid in Python and in ECMA 262, the dialect of JSON Schema."""
    rule: str

    def check(self, text: str) -> str:
        """Return the text. Raises ValueError with the rule."""
        if re.fullmatch(self.pattern, text) is None:
            raise ValueError(self.rule)
        return text

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {**handler(schema), "pattern": f"^(?:{self.pattern})$"}


def _of_names(pattern: str, longest: int) -> dict[str, Any]:
    """Return a JSON schema for the property names of an object."""
    return {"propertyNames": {"pattern": f"^(?:{pattern})$", "maxLength": longest}}


_PATH_PREFIX: Final = Shape(
    r"/((?!\.\./)[A-Za-z0-9._~@-]+/)*((?!\.\.$)[A-Za-z0-9._~@-]+)?",
    "must begin with '/' and be made of path segments of A-Z a-z 0-9 . _ ~ @ -",
)
_LANDING_PAGE: Final = Shape(
    r"/(?!/)[!-~]*", "must be a path that begins with one '/', of visible ASCII characters"
)
ONE_LINE: Final = Shape(r"[^\x00-\x1f\x7f-\x9f]*", "must be one line, without control characters")
_NO_NUL: Final = Shape(r"[^\x00]*", "must not contain NUL")
_USER: Final = Shape(
    r"[a-z_][a-z0-9_.-]*",
    "must be the name of a user: a-z 0-9 _ . -, beginning with a letter or '_'",
)
_PATTERN: Final = Shape(
    r"[a-z0-9*?-]{1,63}", "must be made of a-z, 0-9, '-', and '*' and '?' as wildcards"
)
_URL: Final = Shape(
    r"[A-Za-z]+://[!-~]+", "must be a URL such as http://host:port, of visible ASCII characters"
)
_LABEL: Final = r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}"
_HEADER: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}"


def _closed_by_slash(text: str) -> str:
    return text if text.endswith("/") else text + "/"


def _check_http_url(text: str) -> str:
    return _check_url(text, ("http", "https"))


def _check_ws_url(text: str) -> str:
    return _check_url(text, ("ws", "wss"))


def _check_url(text: str, schemes: tuple[str, str]) -> str:
    rule = f"must be a URL such as {schemes[0]}://host:port, with no user, query or fragment"
    try:
        parts = urlsplit(text)
        port_fits = parts.port is None or parts.port > 0
    except ValueError:
        raise ValueError(rule) from None
    plain = not (parts.username or parts.password or parts.query or parts.fragment)
    if parts.scheme not in schemes or not parts.hostname or not (port_fits and plain):
        raise ValueError(rule)
    return text


def _check_labels(labels: dict[str, str]) -> dict[str, str]:
    for key in labels:
        if not re.fullmatch(_LABEL, key):
            raise ValueError(
                f"bad key {key[:40]!r}: must be 1 to 63 of A-Z a-z 0-9 . _ / -, "
                "beginning with a letter or digit"
            )
    return labels


_LARGEST_HEAD: Final = 16 * 1024
"""Characters of all headers for a gateway: servers accept no larger head, and each orphaned kernel
is stored with them."""


def _check_headers(headers: dict[str, str]) -> dict[str, str]:
    for name in headers:
        if not re.fullmatch(_HEADER, name):
            raise ValueError(f"bad header name {name[:40]!r}")
    if sum(len(name) + len(value) for name, value in headers.items()) > _LARGEST_HEAD:
        raise ValueError(f"must be at most {_LARGEST_HEAD} characters together")
    return headers


Name = Annotated[
    str,
    Field(json_schema_extra={"maxLength": 63}),
    Shape(NAME_PATTERN, NAME_RULE),
    Field(description=f"Name of the server: {NAME_RULE}."),
]
OwnerName = Annotated[
    str, Field(json_schema_extra={"maxLength": 63}), Shape(NAME_PATTERN, NAME_RULE)
]
PathText = Annotated[str, Field(min_length=1, max_length=4096), ONE_LINE]
Line = Annotated[str, Field(min_length=1, max_length=8192), ONE_LINE]
Seconds = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]
_Key63 = Annotated[str, Field(max_length=63)]
_Key128 = Annotated[str, Field(max_length=128)]
User = Annotated[str, Field(max_length=32), _USER]
Labels = Annotated[
    dict[_Key63, Annotated[str, Field(max_length=256), ONE_LINE]],
    Field(max_length=64, json_schema_extra=_of_names(_LABEL, 63)),
    AfterValidator(_check_labels),
]
Pattern = Annotated[str, Field(max_length=63), _PATTERN]
BaseUrl = Annotated[
    str, Field(min_length=1, max_length=512), _PATH_PREFIX, AfterValidator(_closed_by_slash)
]
LandingPage = Annotated[str, Field(max_length=1024), _LANDING_PAGE]
HttpUrl = Annotated[str, Field(max_length=2048), _URL, AfterValidator(_check_http_url)]
WebsocketUrl = Annotated[str, Field(max_length=2048), _URL, AfterValidator(_check_ws_url)]
_Variables = Annotated[
    dict[_Key128, Annotated[str, Field(max_length=32768), _NO_NUL]],
    Field(max_length=256, json_schema_extra=_of_names(VARIABLE, 128)),
]
Environment = Annotated[_Variables, AfterValidator(check_env)]
KernelEnvironment = Annotated[_Variables, AfterValidator(check_kernel_env)]
Headers = Annotated[
    dict[_Key128, Annotated[str, Field(max_length=8192), ONE_LINE]],
    Field(max_length=64, json_schema_extra=_of_names(_HEADER, 128)),
    AfterValidator(_check_headers),
]

Duration = Annotated[
    float,
    BeforeValidator(
        duration,
        json_schema_input_type=Annotated[float, Field(ge=0, le=LONGEST)]
        | Annotated[str, Field(max_length=LONGEST_TEXT)],
    ),
]
"""Seconds, or text such as `90m`, `2h`, `1d12h`."""
