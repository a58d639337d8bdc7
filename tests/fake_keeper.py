"""A keeper over the fake backend, for tests of its callers: only the servers are not real."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import get_args

from labkeeper.api.app import create_app
from labkeeper.api.services import Services
from labkeeper.api.wsgi import WsgiServer
from labkeeper.backends.local.paths import Paths
from labkeeper.core.culling import CullPolicy, Explanation, Facts, decide, limits_of
from labkeeper.core.fleet import Fleet
from labkeeper.core.policy import Policy
from labkeeper.core.server import Kernel
from labkeeper.events.log import EventLog
from labkeeper.identity.authenticators import PeerAuthenticator, TokenAuthenticator
from labkeeper.identity.sessions import Sessions
from labkeeper.identity.tokens import Tokens
from labkeeper.metrics.collector import Metrics
from labkeeper.runtime import Keeper, KeyedExecutor, Mailbox, SnapshotBoard, SystemClock
from labkeeper.schema.answers.servers import Server
from labkeeper.schema.requests.servers import Defaults
from labkeeper.testing.fakes import MemoryOrphans, MemoryStore, PassingPreflight
from labkeeper.testing.world import FakeBackend, World
from labkeeper.usage_log import UsageLog

TOKEN = "a-token-of-the-tests"
"""The owner token."""


@dataclass
class FixedProbe:
    """Returns the kernels it was given, or raises the error it was given."""

    kernels_there: Sequence[Kernel] = ()
    error: Exception | None = None
    given: list[tuple[str, str]] = field(default_factory=list)
    """The commands to kernels so far."""

    def kernels(self, _endpoint):
        if self.error:
            raise self.error
        return list(self.kernels_there)

    def interrupt_kernel(self, _endpoint, kernel_id):
        self.given.append(("interrupt", kernel_id))

    def restart_kernel(self, _endpoint, kernel_id):
        self.given.append(("restart", kernel_id))

    def end_kernel(self, _endpoint, kernel_id):
        self.given.append(("end", kernel_id))


class NoCulling:
    """A `CullStatus` that polls no server, by a clock that stands still."""

    def refresh(self, snapshot):
        facts = Facts(
            limits_of(snapshot.spec), 0.0, 0.0, snoozed_until=snapshot.snoozed_until or -math.inf
        )
        return Explanation(snapshot, decide(facts, CullPolicy(), 0.0), snapshot.since, None)

    cached = refresh


@dataclass
class FakeKeeper:
    """A keeper over a world that the test controls, with the services of its API."""

    keeper: Keeper
    services: Services
    world: World = field(default_factory=World)
    store: MemoryStore = field(default_factory=MemoryStore)
    probe: FixedProbe = field(default_factory=FixedProbe)
    usage_log: UsageLog | None = None


@contextmanager
def fake_keeper(
    notebook_dir, *, policy: Policy | None = None, is_server=lambda _pid: False, **services
) -> Iterator[FakeKeeper]:
    """Run one; `services` replace the defaults of its API."""
    world, store, probe, clock = World(), MemoryStore(), FixedProbe(), SystemClock()
    mailbox, board = Mailbox(), SnapshotBoard()
    executor = KeyedExecutor(mailbox.post)
    backend = FakeBackend(mailbox.post, world, validate=Paths(notebook_dir).validate)
    event_log = EventLog(store, clock, size=1000)
    usage_log = UsageLog(store, clock, period=5.0)
    fleet = Fleet(
        backend=backend,
        preflight=PassingPreflight(),
        orphans=MemoryOrphans(),
        store=store,
        executor=executor,
        clock=clock,
        policy=policy or Policy(),
        subscribers=(board.changed, event_log.changed, usage_log.changed, board.wake),
    )
    keeper = Keeper(fleet, mailbox, executor, board, clock)
    keeper.start()
    tokens = Tokens(store, clock, event_log, owner=TOKEN)
    spoken_for = {
        "keeper": keeper,
        "backend": backend,
        "probe": probe,
        "orphans": list,
        "event_log": event_log,
        "metrics": Metrics(clock),
        "culler": NoCulling(),
        "defaults": Defaults("127.0.0.1", 8888),
        "policy": policy or Policy(),
        "version": "1.2.3",
        "tokens": tokens,
        "sessions": Sessions(store, clock, event_log, lambda _begun, _ended: None),
        "authenticators": [TokenAuthenticator(tokens), PeerAuthenticator(is_server)],
        "usage_history": usage_log.history,
        "recent_usage": usage_log.recent,
        "start_wait": 5.0,
        "stop_wait": 5.0,
    }
    try:
        yield FakeKeeper(keeper, Services(**spoken_for | services), world, store, probe, usage_log)
    finally:
        if keeper.alive:
            keeper.close()


@dataclass
class Served:
    """A keeper over a world that the test controls, with its application and URL."""

    world: World
    probe: FixedProbe
    app: object
    url: str


@contextmanager
def serving(notebook_dir) -> Iterator[Served]:
    """Serve one over HTTP."""
    with fake_keeper(notebook_dir) as made:
        app = create_app(made.services)
        with listening(app) as url:
            yield Served(made.world, made.probe, app, url)


@contextmanager
def listening(app, port: int = 0) -> Iterator[str]:
    """Serve an application on a port; yield its URL."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        server = WsgiServer(app, [listener], threads=4, max_body=2**20)
        server.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.close()


def a_server(**changed) -> Server:
    """Return a running server as a response describes it, without optional fields."""
    optional = {
        name: None
        for name, field in Server.model_fields.items()
        if type(None) in get_args(field.annotation)
    }
    fields = {
        "name": "x",
        "owner": "local",
        "state": "running",
        "goal": "up",
        "since": "",
        "created_at": "",
        "generation": 1,
        "restarts": 0,
        "kernels_by": "fork",
    }
    collections = {
        "labels": {},
        "description": "",
        "limits": {},
        "jupyter_options": {},
        "kernels_kept": [],
    }
    return Server(
        **optional | fields | collections | {"root_dir": "/", "default_url": "/lab"} | changed
    )
