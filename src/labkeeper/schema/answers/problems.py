"""Errors as problem details (RFC 9457)."""

from __future__ import annotations

from http import HTTPStatus

from pydantic import ConfigDict, Field

from labkeeper.core.errors import ClientError, LabkeeperError, RequestError, tree
from labkeeper.schema.answers.base import Answer


class Problem(Answer):
    """A problem (RFC 9457).

    More members may follow: `errors`, `differs`, `scope`, `variable`, `retry_after`, `available`,
    `reserve`, `name`, `failure_class`, `exit`, `log_tail`.
    """

    # A proxy may omit members that RFC 9457 makes optional; the keeper does not.
    model_config = ConfigDict(json_schema_serialization_defaults_required=True)

    type: str = "about:blank"
    title: str = ""
    status: int = 0
    detail: str
    code: str = Field(description="Stable name of the error.")
    request_id: str = Field(
        "", description="Id of the request, for looking it up in the keeper's log."
    )

    def error(self, status: int) -> LabkeeperError:
        """Return the error behind this response; `status` is the response's."""
        known = tree().get(self.code)
        details = dict(self.model_extra or {})
        if known is None or issubclass(known, ClientError):
            # The framework's errors (405, 413, 415, ...) and bugs (500) carry nothing else.
            known = (
                RequestError
                if HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR
                else LabkeeperError
            )
            details |= {"code": self.code, "status": status, "request_id": self.request_id}
        error = known(self.detail)
        error.details = details
        return error
