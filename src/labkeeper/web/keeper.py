"""The keeper itself: whether it is well, what it has room for, and how it is set up."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from flask import Response

from labkeeper.api.handlers.common import caller, visible_servers
from labkeeper.api.services import Services
from labkeeper.core.access import Scope
from labkeeper.core.lifecycle import AT_REST, State
from labkeeper.core.server import Snapshot, queue_of
from labkeeper.web.live import page
from labkeeper.web.pages import Content
from labkeeper.web.rendering import render

_MOST: Final = 100
"""Rows of one table."""
_NAMED: Final = 5
"""Servers that are named for a gateway."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A server in the queue of starts."""

    position: int
    name: str | None
    """None: the caller may not see it."""
    since: float


@dataclass(frozen=True, slots=True)
class _Gateway:
    """A gateway, as some servers find it."""

    url: str
    reachable: bool | None
    """None: not known yet."""
    error: str
    since: float | None
    kernelspecs: int | None
    servers: Sequence[str]
    """Some of them."""
    count: int


def show(services: Services) -> Response:
    """Show the keeper, and follow its changes."""
    return page(services, lambda: _content(services))


def _content(services: Services) -> Content:
    servers = services.keeper.all()
    parts = {
        f"keeper-{name}": render(f"keeper-{name}.html", part(services, servers))
        for name, part in _PARTS.items()
    }
    # Settings tell where things are on the machine.
    if caller().scope.covers(Scope.ADMIN):
        parts["keeper-settings"] = render("keeper-settings.html", _settings(services))
    return Content("Keeper", "keeper.html", parts)


def _health(services: Services, _: Sequence[Snapshot]) -> dict[str, Any]:
    return {"alive": services.keeper.alive, "failing": sorted(services.failing().items())}


def _capacity(services: Services, servers: Sequence[Snapshot]) -> dict[str, Any]:
    states = Counter(snapshot.state for snapshot in servers)
    memory = services.backend.capacity()
    return {
        "memory": memory,
        "reserve": None if memory is None else services.policy.min_free.of(memory.total),
        "states": [(state, states[state]) for state in State if states[state]],
        "known": len(servers),
        "active": sum(snapshot.state not in AT_REST for snapshot in servers),
        "starting": states[State.STARTING],
        "policy": services.policy,
    }


def _queue(services: Services, servers: Sequence[Snapshot]) -> dict[str, Any]:
    waiting = queue_of(servers)
    rows = [
        _Waiting(position, snapshot.name if caller().sees(snapshot) else None, snapshot.since)
        for position, snapshot in enumerate(waiting[:_MOST], start=1)
    ]
    return {"rows": rows, "count": len(waiting), "most": services.policy.max_starts}


def _gateways(services: Services, _: Sequence[Snapshot]) -> dict[str, Any]:
    users: dict[tuple[str, str | None], list[Snapshot]] = {}
    for snapshot in visible_servers(services):
        gateway, health = snapshot.spec.gateway, snapshot.gateway
        if gateway is not None and snapshot.state not in AT_REST:
            error = health.error.message if health is not None and health.error is not None else ""
            users.setdefault((gateway.url, None if health is None else error), []).append(snapshot)
    # Those that cannot be used come first.
    order = sorted(users, key=lambda key: (not key[1], key[0]))
    return {"gateways": [_gateway(*key, users[key]) for key in order[:_MOST]]}


def _gateway(url: str, error: str | None, users: Sequence[Snapshot]) -> _Gateway:
    found = [snapshot.gateway for snapshot in users if snapshot.gateway is not None]
    return _Gateway(
        url,
        None if error is None else not error,
        error or "",
        min((health.since for health in found), default=None),
        next((health.kernelspecs for health in found), None),
        [snapshot.name for snapshot in users[:_NAMED]],
        len(users),
    )


def _launches(services: Services, servers: Sequence[Snapshot]) -> dict[str, Any]:
    running = [snapshot.instance for snapshot in servers if snapshot.instance is not None]
    return {
        "libraries": services.backend.libraries(),
        "launched": Counter(instance.launched_by for instance in running),
        "reasons": Counter(i.exec_reason for i in running if i.exec_reason).most_common(_NAMED),
    }


def _edge(services: Services, _: Sequence[Snapshot]) -> dict[str, Any]:
    return {"use": services.edge_use(), "url": services.url, "labs": services.labs}


def _orphans(services: Services, _: Sequence[Snapshot]) -> dict[str, Any]:
    orphans = services.orphans()
    return {"orphans": orphans[:_MOST], "count": len(orphans)}


def _webhooks(services: Services, _: Sequence[Snapshot]) -> dict[str, Any]:
    return {"webhooks": services.webhooks()}


def _versions(services: Services, servers: Sequence[Snapshot]) -> dict[str, Any]:
    of_jupyter = Counter(s.endpoint.version for s in servers if s.endpoint is not None)
    return {
        "labkeeper": services.version,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "jupyter": sorted((version, count) for version, count in of_jupyter.items() if version),
    }


def _settings(services: Services) -> dict[str, Any]:
    return {
        "chosen": [setting for setting in services.settings if not setting.is_default],
        "defaults": [setting for setting in services.settings if setting.is_default],
    }


_PARTS: Final[dict[str, Callable[[Services, Sequence[Snapshot]], dict[str, Any]]]] = {
    "health": _health,
    "capacity": _capacity,
    "queue": _queue,
    "launches": _launches,
    "edge": _edge,
    "webhooks": _webhooks,
    "versions": _versions,
    "gateways": _gateways,
    "orphans": _orphans,
}
"""What each part of the page shows; its template has the same name."""
