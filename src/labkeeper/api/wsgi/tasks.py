"""The answer to one request: the application's, or an error of waitress as a problem."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from waitress.task import ErrorTask, WSGITask
from waitress.utilities import RequestEntityTooLarge

from labkeeper.api import problems
from labkeeper.api.browser import HEADERS
from labkeeper.identity.peers import PEER, UNREAD


class ProblemTask(ErrorTask):
    """Answers waitress's own errors (bad request line, oversized body) as the application would."""

    def execute(self) -> None:
        """Write the answer."""
        error = self.request.error
        if isinstance(error, RequestEntityTooLarge):
            largest = self.channel.server.adj.max_request_body_size - 1
            why = f"body must be at most {largest} bytes"
        elif error.code == HTTPStatus.BAD_REQUEST:
            why = error.body.removeprefix("exceeds ")
        else:
            why = error.reason
        body = problems.unread(error.code, error.reason, f"cannot accept the request: {why}")
        self.status = f"{error.code} {error.reason}"
        self.response_headers += [("Content-Type", problems.MEDIA_TYPE), *HEADERS.items()]
        self.set_close_on_finish()
        self.content_length = len(body)
        # Not `self.request`, which is a dummy after an error of ours.
        self.write(b"" if self.channel.requests[0].is_head else body)


class ApplicationTask(WSGITask):
    """Calls the application; adds the peer, if known, and whether a body was discarded."""

    def get_environment(self) -> dict[str, Any]:
        """Return the WSGI environment."""
        environment: dict[str, Any] = super().get_environment()
        if self.channel.peer is not None and (peer := self.channel.peer()) is not None:
            environment[PEER] = peer
        if self.request.unread:
            environment[UNREAD] = True
        return environment

    def write(self, data: bytes) -> None:
        """Write a piece of the answer, if it has a body."""
        super().write(b"" if self.request.is_head else data)

    def finish(self) -> None:
        """Write the head if that is still to be done, and the end of a chunked body."""
        if not self.request.is_head:
            super().finish()
        elif not self.wrote_header:
            self.write(b"")
