"""Reads what a keeper answers: its models, its problems as errors, its streams line by line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import httpx
from pydantic import ValidationError

from labkeeper.core.errors import BadAnswer
from labkeeper.schema.answers import Answer, Problem

_A = TypeVar("_A", bound=Answer)


def checked(answer: httpx.Response) -> httpx.Response:
    """Return a good answer, and raise the error of a bad one."""
    # As every keeper writes; what an answer names may be no encoding of text at all ("hex").
    answer.encoding = "utf-8"
    if answer.is_success:
        return answer
    try:
        problem = Problem.tolerant(answer.content)
    except ValidationError as error:
        raise _bad(answer) from error
    raise problem.error(answer.status_code)


def parse(model: type[_A], answer: httpx.Response) -> _A:
    """Return the body of an answer. Raises BadAnswer."""
    try:
        return model.tolerant(answer.content)
    except ValidationError as error:
        raise _bad(answer) from error


def parse_text(model: type[_A], text: str) -> _A:
    """Return a part of a streamed answer. Raises BadAnswer."""
    try:
        return model.tolerant(text)
    except ValidationError as error:
        raise BadAnswer(f"cannot understand what the keeper sends: {text[:80]!r}") from error


def _bad(answer: httpx.Response) -> BadAnswer:
    url = answer.request.url.copy_with(query=None)
    kind = answer.headers.get("Content-Type", "no content type")
    return BadAnswer(
        f"cannot understand what answers at {url}: status {answer.status_code}, {kind}; is it a keeper?",
        status=answer.status_code,
    )


def lines_of(pieces: Iterator[str]) -> Iterator[str]:
    """Cut at line feeds alone: `str.splitlines` would also cut at form feeds and carriage returns, which logs contain."""
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        yield from lines
    if rest:
        yield rest
