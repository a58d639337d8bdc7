"""The keeper's own log: structured, on stderr; for people or for machines. A listener logs each change of a server."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any, Final, Literal

import structlog

from labkeeper.core.lifecycle import Event, State
from labkeeper.core.model import KEEPER, Change, GatewayHealth, HistoryKind, Origin, ServerName

_QUIET: Final = ("httpx", "httpcore", "waitress.queue")
"""Libraries that log each request, or each time that all threads are busy."""


def configure(*, level: str, form: Literal["auto", "console", "json"], debug: bool) -> None:
    """Send all logs of this process, ours and the libraries', to stderr in one form."""
    for_people = form == "console" or (form == "auto" and sys.stderr.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if debug:
        shared.append(structlog.processors.CallsiteParameterAdder())
    renderers: list[Any] = (
        # Without the values of variables in a trace: some are secret.
        [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)]
        if for_people
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if debug else level.upper())
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING if name != "waitress.queue" else logging.ERROR)
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


class ChangeLog:
    """A listener: one line for each change of a server's state, and of whether its gateway can be used."""

    def __init__(self) -> None:
        self._log = structlog.get_logger("labkeeper.servers")

    def changed(self, change: Change) -> None:
        """Log one change."""
        before, after = change.before, change.after
        if change.event is Event.GATEWAY and after.gateway is not None:
            self._tell_of(after.name, after.gateway)
        if before is not None and before.state is after.state:
            return
        facts: dict[str, Any] = {
            "server": after.name,
            "launch": after.launch,
            # "event" is structlog's own word for the message.
            "on": str(change.event),
        }
        if after.failure is not None:
            facts["failure_class"], facts["cause"] = str(after.failure.kind), after.failure.message
        if after.stop_report is not None:
            facts["method"], facts["seconds"] = str(after.stop_report.method), after.stop_report.seconds
        self._level(change)(f"{before.state if before else 'recovered'} -> {after.state}", **facts)

    def _tell_of(self, name: ServerName, gateway: GatewayHealth) -> None:
        if gateway.error is None:
            self._log.info("gateway answers", server=name, kernelspecs=gateway.kernelspecs)
        else:
            self._log.warning(
                "gateway cannot be used", server=name, failure_class=str(gateway.error.kind), cause=gateway.error.message
            )

    def _level(self, change: Change) -> Any:
        state = change.after.state
        if change.before is None:  # Nothing has happened but that a keeper has begun.
            return self._log.info
        if state is State.LOST and change.event is Event.DEADLINE:
            return self._log.error
        return self._log.warning if state in {State.FAILED, State.BACKOFF, State.LOST, State.KILLING} else self._log.info


class NoteLog:  # merged: history
    """A chronicle that only logs."""

    def note(
        self,
        kind: HistoryKind,
        server: ServerName | None,
        message: str,
        *,
        origin: Origin = KEEPER,
        launch: int | None = None,
        details: Mapping[str, object] | None = None,
    ) -> None:
        """Log it."""
        note = {
            "kind": str(kind),
            "actor": origin.actor,
            "reason": origin.reason,
            "launch": launch,
            "details": dict(details or {}),
        }
        structlog.get_logger("labkeeper.history").info(message, server=server, **note)
