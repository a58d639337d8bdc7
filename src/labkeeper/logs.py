"""The keeper's own log, structured, on stderr, for people or machines; logs state changes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Final, Literal, NoReturn

import structlog

from labkeeper.core.lifecycle import Event, State
from labkeeper.core.messages import Change
from labkeeper.core.server import GatewayHealth
from labkeeper.scrub import HIDDEN, KEEPER, Secrets, is_secret, of_server, scrub
from labkeeper.terminal import visible

_QUIET: Final = {
    "httpx": logging.WARNING,
    "httpcore": logging.WARNING,
    "waitress.queue": logging.ERROR,
}
"""The levels of libraries that log each request, or each time that all threads are busy."""
_OWN: Final = frozenset(
    {
        "timestamp",
        "level",
        "logger",
        "server",
        "generation",
        "actor",
        "request_id",
        "on",
        "failure_class",
        "method",
    }
    | {parameter.value for parameter in structlog.processors.CallsiteParameter}
)
"""The keeper's own fields of an entry, which no server's variable of equal value may blank."""

_log = structlog.get_logger("labkeeper.servers")


def configure(*, level: str, form: Literal["auto", "console", "json"], debug: bool) -> None:
    """Send all logs of this process, including libraries', to stderr in one format."""
    for_people = form == "console" or (form == "auto" and sys.stderr.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if debug:
        shared.append(structlog.processors.CallsiteParameterAdder())
    renderer: Any = (
        # With plain traces, it leaves them unchanged.
        _Console(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
        if for_people
        else structlog.processors.JSONRenderer()
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                # Without the values of variables: some are secret.
                structlog.processors.format_exc_info,
                _scrub,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if debug else level.upper())
    for name, least in _QUIET.items():
        logging.getLogger(name).setLevel(least)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


@contextmanager
def silent() -> Iterator[None]:
    """Drop what this process logs in the block, for callers who report it in another way."""
    before = structlog.get_config()["processors"]
    structlog.configure(processors=[_drop])
    try:
        yield
    finally:
        structlog.configure(processors=before)


def _drop(*_: object) -> NoReturn:
    raise structlog.DropEvent


class _Console(structlog.dev.ConsoleRenderer):
    """Renders for people; control characters that a server has logged have no effect."""

    def __call__(self, *given: Any) -> str:
        """Render one entry."""
        return visible(super().__call__(*given))


def _scrub(_logger: Any, _method: str, entry: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Remove secrets from every value; as the last processor, from rendered traces too."""
    about = of_server(str(entry.get("server")))
    # The keeper's messages are its own words, whichever server they concern.
    known = {"event": (KEEPER,)} if str(entry.get("logger")).startswith("labkeeper.") else {}
    return {
        key: _own(value) if key in _OWN else _scrubbed(key, value, known.get(key, (KEEPER, about)))
        for key, value in entry.items()
    }


def _own(value: Any) -> Any:
    """Scrub a value that no server influences: only the keeper's secrets count."""
    return KEEPER.hide(value) if isinstance(value, str) else value


def _scrubbed(key: Any, value: Any, known: Sequence[Secrets]) -> Any:
    if isinstance(key, str) and is_secret(key) and value:
        return HIDDEN
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return scrub(value, *known)
    if isinstance(value, Mapping):
        return {
            scrub(str(inner), *known): _scrubbed(inner, each, known)
            for inner, each in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [_scrubbed(None, each, known) for each in value]
    return scrub(repr(value), *known)


def log_change(change: Change) -> None:
    """Log a change of a server's state or of its gateway's availability; a subscriber."""
    before, after = change.before, change.after
    if change.event is Event.GATEWAY and after.gateway is not None:
        _log_gateway(change, after.gateway)
    if change.event is Event.PROGRESS and after.progress is not None:
        _log.info("a start takes longer", **_about(change), **asdict(after.progress))
    if before is not None and before.state is after.state:
        return
    facts: dict[str, Any] = {
        **_about(change),
        # "event" is structlog's own key for the message.
        "on": str(change.event),
    }
    if after.failure is not None:
        facts["failure_class"], facts["cause"] = str(after.failure.kind), after.failure.message
    if after.stop_report is not None:
        facts["method"] = str(after.stop_report.method)
        facts["seconds"] = after.stop_report.seconds
    _level(change)(f"{before.state if before else 'recovered'} -> {after.state}", **facts)


def _log_gateway(change: Change, gateway: GatewayHealth) -> None:
    if gateway.error is None:
        _log.info("gateway answers", **_about(change), kernelspecs=gateway.kernelspecs)
    else:
        error = gateway.error
        _log.warning(
            "gateway cannot be used",
            **_about(change),
            failure_class=str(error.kind),
            cause=error.message,
        )


def _level(change: Change) -> Any:
    state = change.after.state
    if change.before is None:  # Not an event: a keeper has started.
        return _log.info
    if state is State.LOST and change.event is Event.DEADLINE:
        return _log.error
    if state in {State.FAILED, State.BACKOFF, State.LOST, State.KILLING}:
        return _log.warning
    return _log.info


def _about(change: Change) -> dict[str, Any]:
    """Return the common fields of log lines on a change: server, generation, and origin."""
    origin = change.origin
    who = {"actor": origin.actor, "request_id": origin.request_id, "reason": origin.reason}
    return {"server": change.after.qualified_name, "generation": change.after.generation} | {
        key: value for key, value in who.items() if value
    }
