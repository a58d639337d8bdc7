"""Parses the keeper's answers: its models, its problems as errors, its streams line by line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final, TypeVar

import httpx
from pydantic import ValidationError

from labkeeper.core.errors import BackendUnavailable, BadAnswer
from labkeeper.schema.answers.base import Answer
from labkeeper.schema.answers.events import Event
from labkeeper.schema.answers.keeper import Health
from labkeeper.schema.answers.problems import Problem

_A = TypeVar("_A", bound=Answer)
_EVENT: Final = 'data: {"id":'
"""The beginning of an event's line."""


def checked(answer: httpx.Response) -> httpx.Response:
    """Return a successful answer; raise the error of any other."""
    # All keepers write it; the encoding that an answer names may not be one of text ("hex").
    answer.encoding = "utf-8"
    if answer.is_success:
        return answer
    try:
        problem = Problem.tolerant(answer.content)
    except ValidationError as error:
        raise _bad(answer) from error
    raise problem.error(answer.status_code)


def parse(model: type[_A], answer: httpx.Response) -> _A:
    """Return the parsed body; raise the error of a failed answer, or BadAnswer."""
    try:
        return model.tolerant(checked(answer).content)
    except ValidationError as error:
        raise _bad(answer) from error


def reading(model: type[_A]) -> Callable[[httpx.Response], _A]:
    """Return a parser of answers with this model."""
    return functools.partial(parse, model)


def text(answer: httpx.Response) -> str:
    """Return the text of a successful answer; raise the error of any other."""
    return checked(answer).text


def is_ok(answer: httpx.Response) -> bool:
    """Whether a keeper reports itself healthy."""
    try:
        return parse(Health, answer).status == "ok"
    except BackendUnavailable:
        return False


def event_of(line: str) -> Event | None:
    """Return the event in a line of a stream; None for any other line. Raises BadAnswer."""
    if not line.startswith(_EVENT):
        return None
    content = line.removeprefix("data: ")
    try:
        return Event.tolerant(content)
    except ValidationError as error:
        raise BadAnswer(f"cannot understand the keeper's answer: {content[:80]!r}") from error


def _bad(answer: httpx.Response) -> BadAnswer:
    url = answer.request.url.copy_with(query=None)
    kind = answer.headers.get("Content-Type", "no content type")
    return BadAnswer(
        f"cannot understand what answers at {url}: status {answer.status_code}, {kind}; "
        "is it a keeper?",
        status=answer.status_code,
    )


class Lines:
    """Splits only at line feeds; `str.splitlines` also splits at form feeds, which logs contain."""

    def __init__(self) -> None:
        self._rest = ""

    def feed(self, piece: str) -> list[str]:
        """Return the lines that a piece completes."""
        *lines, self._rest = (self._rest + piece).split("\n")
        return lines

    def end(self) -> list[str]:
        """Return the last line if it is unterminated."""
        return [self._rest] if self._rest else []
