"""The base of response bodies.

The client's `tolerant` mode understands a newer keeper: it accepts unknown enumeration values.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

TOLERANT: Final = object()


def known(kind: type[StrEnum]) -> WrapValidator:
    """Return an enumeration validator; in tolerant mode an unknown value becomes a new member."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        try:
            return handler(value)
        except ValidationError:
            if info.context is not TOLERANT or not isinstance(value, str):
                raise
            newer = str.__new__(kind, value)
            newer._name_ = newer._value_ = value
            return newer

    return WrapValidator(validate)


class Answer(BaseModel):
    """A response body."""

    # Deferred to keep boot fast. A newer keeper may answer with more fields. A nested answer can be
    # an object of the core whose attributes are its fields.
    model_config = ConfigDict(defer_build=True, frozen=True, extra="allow", from_attributes=True)

    @classmethod
    def tolerant(cls, content: str | bytes) -> Self:
        """Parse JSON written by a keeper of another version. Raises ValidationError."""
        return cls.model_validate_json(content, context=TOLERANT)
