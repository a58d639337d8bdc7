"""A page that follows its changes: one stream for each tab, of the elements that have changed."""

from __future__ import annotations

import functools
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import Final

from flask import Response, request, stream_with_context

from labkeeper.api.handlers.common import acquire_stream, live_answer
from labkeeper.api.services import Services
from labkeeper.api.streaming import EVENT_STREAM, gone, wants_stream
from labkeeper.core.errors import LabkeeperError, RequestError
from labkeeper.web.pages import Content, html, partial, whole

_TOGETHER: Final = (0.1, 0.4)
"""The least and the most seconds from a change until it is sent."""
_EVERY: Final = 2.0
"""Seconds after which it looks for what is no change of a server, such as usage."""
_SHARE: Final = 0.02
"""The largest part of a processor that one stream may use."""
_LINE_END: Final = re.compile(r"\r\n|\r|\n")


_FOLLOW: Final = "follow"
"""The query parameter by which a page asks for its changes instead of itself."""

Following = Callable[[], Content]
"""Returns what a page shows now. Raises LabkeeperError."""


def page(
    services: Services, following: Following, looks: Callable[[], Iterator[str]] | None = None
) -> Response:
    """Return a page that follows its changes, or the stream of these. Raises CapacityReached.

    `looks` waits before each look, and yields events of its own that it has waited for, or "".
    """
    if wants_stream(asked=_FOLLOW in request.args):
        return _stream(services, following, looks or functools.partial(_looks, services))
    sent = request.query_string.decode("ascii", "replace")
    follow = f"{request.path}?{sent}&{_FOLLOW}" if sent else f"{request.path}?{_FOLLOW}"
    return html(whole(services, following(), follow))


def _stream(
    services: Services, following: Following, looks: Callable[[], Iterator[str]]
) -> Response:
    acquire_stream(services, "follow this page", "load it again when you want to see more")
    pieces = stream_with_context(_changes(services, following, looks(), gone()))
    return live_answer(services, pieces, EVENT_STREAM)


def _looks(services: Services) -> Iterator[str]:
    while True:
        seen = services.keeper.changes
        yield ""
        services.keeper.wait(seen, _EVERY)
        # Changes that come together are sent together, and not to all tabs at the same time: that
        # would delay the start that has caused them.
        time.sleep(random.uniform(*_TOGETHER))  # noqa: S311 - nothing secret


def _changes(
    services: Services,
    following: Following,
    looks: Iterator[str],
    is_gone: Callable[[], bool],
) -> Iterator[str]:
    shown: Content | None = None
    seen, due = -1, 0.0
    # A page of another version would have other elements, and other scripts.
    yield event(services.version, "version")
    for came in looks:
        if is_gone():
            return
        if came:
            yield came
        began, worked = time.monotonic(), time.thread_time()
        if services.keeper.changes == seen and began < due:
            continue
        seen, due = services.keeper.changes, began + _EVERY
        try:
            now = following()
        except RequestError as error:
            # As when the server is deleted. The page keeps what it shows.
            yield event(error.message, "ended")
            return
        except LabkeeperError:
            # The disk may be full, say: its part has logged it, and the next look may succeed.
            continue
        yield _difference(shown, now)
        shown = now
        time.sleep((time.thread_time() - worked) / _SHARE)


def _difference(before: Content | None, now: Content) -> str:
    """Return what turns a page into another: the changed elements, or all if others exist."""
    if before is None or list(before.parts) != list(now.parts) or before.given != now.given:
        return event(partial("live", now.text, "innerMorph"))
    changed = (
        partial(name, part, "outerMorph")
        for name, part in now.parts.items()
        if part != before.parts[name]
    )
    # Without one, a comment: it shows that the stream works.
    return event("".join(changed)) or ": nothing\n\n"


def event(text: str, name: str = "") -> str:
    """Return one event of a stream (html.spec.whatwg.org, "Server-sent events")."""
    if not text:
        return ""
    lines = "".join(f"data: {line}\n" for line in _LINE_END.split(text))
    return f"event: {name}\n{lines}\n" if name else f"{lines}\n"
