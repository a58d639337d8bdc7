"""A page that follows its changes: one stream for each tab, of the elements that have changed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import Final

from flask import Response, request, stream_with_context
from markupsafe import Markup

from labkeeper.api.handlers.common import acquire_stream, live_answer
from labkeeper.api.services import Services
from labkeeper.api.streaming import EVENT_STREAM, gone
from labkeeper.core.errors import LabkeeperError
from labkeeper.web.pages import Content, html, whole

_TOGETHER: Final = 0.2
"""Seconds in which changes are sent together."""
_EVERY: Final = 2.0
"""Seconds after which it looks for what is no change of a server, such as usage."""
_SHARE: Final = 0.02
"""The largest part of the time that one stream may spend on looking."""
_PARTIAL: Final = Markup('<hx-partial hx-target="#{}" hx-swap="{}">{}</hx-partial>')

_LINE_END: Final = re.compile(r"\r\n|\r|\n")


_FOLLOW: Final = "follow"
"""The query parameter by which a page asks for its changes instead of itself."""

Following = Callable[[], Content]
"""Returns what a page shows now. Raises LabkeeperError."""


def page(services: Services, following: Following) -> Response:
    """Return a page that follows its changes, or the stream of these. Raises CapacityReached."""
    if _FOLLOW in request.args:
        return _stream(services, following)
    sent = request.query_string.decode("ascii", "replace")
    follow = f"{request.path}?{sent}&{_FOLLOW}" if sent else f"{request.path}?{_FOLLOW}"
    return html(whole(services, following(), follow))


def _stream(services: Services, following: Following) -> Response:
    acquire_stream(services, "follow this page", "load it again when you want to see more")
    pieces = stream_with_context(_changes(services, following, gone()))
    return live_answer(services, pieces, EVENT_STREAM)


def _changes(
    services: Services, following: Following, is_gone: Callable[[], bool]
) -> Iterator[str]:
    shown: Content | None = None
    # A page of another version would have other elements, and other scripts.
    yield _message(services.version, "version")
    while not is_gone():
        changes = services.keeper.changes
        began = time.monotonic()
        try:
            now = following()
        except LabkeeperError as error:
            # As when the server is deleted. The page keeps what it shows.
            yield _message(error.message, "ended")
            return
        yield _difference(shown, now)
        shown = now
        spent = time.monotonic() - began
        time.sleep(max(_TOGETHER, spent / _SHARE))
        services.keeper.wait(changes, _EVERY)


def _difference(before: Content | None, now: Content) -> str:
    """Return what turns a page into another: the changed elements, or all if others exist."""
    if before is None or list(before.parts) != list(now.parts) or before.given != now.given:
        return _message(_PARTIAL.format("live", "innerMorph", now.text))
    changed = (
        _PARTIAL.format(name, "outerMorph", part)
        for name, part in now.parts.items()
        if part != before.parts[name]
    )
    # Without one, a comment: it shows that the stream works.
    return _message("".join(changed)) or ": nothing\n\n"


def _message(text: str, event: str = "") -> str:
    """Return one event of a stream (html.spec.whatwg.org, "Server-sent events")."""
    if not text:
        return ""
    lines = "".join(f"data: {line}\n" for line in _LINE_END.split(text))
    return f"event: {event}\n{lines}\n" if event else f"{lines}\n"
