"""Assembly of a keeper: the only module that knows every part."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Final

from labkeeper import logs, scrub
from labkeeper.api.app import create_app
from labkeeper.api.concurrency import ConcurrencyLimit
from labkeeper.api.services import Services
from labkeeper.api.views import event_model
from labkeeper.api.wsgi import WsgiServer
from labkeeper.backends.local.backend import LocalBackend
from labkeeper.backends.local.cleanup import EarlierDir
from labkeeper.core.fleet import Fleet
from labkeeper.core.messages import WebhookStatus
from labkeeper.core.ports import Backend, Subscriber
from labkeeper.culler import Culler
from labkeeper.events.log import EventLog
from labkeeper.events.webhooks import Webhook
from labkeeper.gateways.client import GatewayClient
from labkeeper.gateways.monitor import GatewayWatch
from labkeeper.gateways.orphans import OrphanedKernels
from labkeeper.gateways.preflight import GatewayPreflight
from labkeeper.identity.authenticators import (
    Authenticator,
    OpenAuthenticator,
    PeerAuthenticator,
    TokenAuthenticator,
)
from labkeeper.identity.sessions import Sessions
from labkeeper.identity.tokens import Tokens
from labkeeper.jupyter.client import JupyterClient
from labkeeper.metrics.collector import Metrics, World
from labkeeper.runtime import Keeper, KeyedExecutor, Mailbox, SnapshotBoard, SystemClock
from labkeeper.sampler import Sampler
from labkeeper.serve.consistency import webhook_target
from labkeeper.serve.edge.supervisor import Edge
from labkeeper.serve.policies import (
    cull_policy,
    defaults,
    hosts,
    lab_addresses,
    local_options,
    longest_stop,
    paths,
    policy,
    settings_in_force,
)
from labkeeper.serve.process import earlier_dirs
from labkeeper.settings.model import Settings
from labkeeper.store.queries import SqliteStore
from labkeeper.threads import ThreadGroup
from labkeeper.usage_log import UsageLog
from labkeeper.web.dashboard import dashboard

VERSION: Final = version("labkeeper")


def assemble(
    chosen: Settings,
    token: str | None,
    stack: ExitStack,
    *,
    sockets: Sequence[socket.socket],
    edge: Edge | None,
    url: str,
) -> Keeper:
    """Build all parts, in the reverse order of closing; on return the keeper serves.

    Raises SettingsError, StoreError, and BackendUnavailable if threads cannot be started.
    """
    base = _base(chosen, stack)
    history = _history(chosen, base, edge, stack)
    gateways = GatewayClient(base.clock, timeout=chosen.gateway_timeout)
    preflight, watch = _gateways(chosen, base, gateways)
    labs = lab_addresses(chosen)
    backend = _backend(
        chosen,
        base,
        history,
        preflight,
        earlier=_earlier(chosen, base.store, stack),
        identity_secret="" if edge is None or labs.mode == "port" else edge.secret,
    )
    # Closed after the keeper, so that launches in progress finish first. The next keeper detects
    # what is no longer reported.
    stack.callback(backend.close)
    culler = _culler(chosen, base, history, backend, edge)
    tokens = Tokens(base.store, base.clock, history.event_log, owner=token)
    sessions = Sessions(
        base.store,
        base.clock,
        history.event_log,
        (lambda _begun, _ended: None) if edge is None else edge.set_sessions,
        idle_limit=chosen.session_idle,
        seen=edge is not None and edge.was_found,
        stands=tokens.stands,
    )
    subscribers = (
        scrub.SecretsOfServers().changed,
        base.board.changed,
        history.metrics.changed,
        logs.log_change,
        watch.changed,
        history.event_log.changed,
        culler.changed,
        sessions.changed,
        history.usage_log.changed,
        # Before those who wait for a server: they may use its route at once.
        *([] if edge is None else [edge.changed]),
        base.board.wake,
    )
    keeper = _keeper(chosen, base, backend, preflight, subscribers)
    stack.callback(keeper.close)
    keeper.start()
    if edge is not None:
        edge.supervise(base.threads, sessions.observe)
    watch.start()
    sampler = Sampler(
        backend,
        base.jupyter,
        keeper.all,
        threads=base.threads,
        clock=base.clock,
        period=chosen.usage_period,
        record=history.usage_log.record,
    )
    sampler.start()
    culler.start()
    services = _services(
        chosen,
        base,
        history,
        backend,
        keeper=keeper,
        culler=culler,
        sampler=sampler,
        gateways=gateways,
        tokens=tokens,
        sessions=sessions,
        edge=edge,
        url=url,
    )
    _serve(chosen, services, stack, sockets=sockets, edge=edge)
    # Before the server, whose closing waits for streamed answers.
    stack.callback(history.event_log.close)
    return keeper


@dataclass(frozen=True, slots=True)
class _Base:
    """The parts that all others depend on."""

    store: SqliteStore
    clock: SystemClock
    threads: ThreadGroup
    jupyter: JupyterClient
    mailbox: Mailbox
    board: SnapshotBoard
    orphans: OrphanedKernels


def _base(chosen: Settings, stack: ExitStack) -> _Base:
    store = SqliteStore(chosen.state_dir / "labkeeper.sqlite")
    clock, threads = SystemClock(), ThreadGroup()
    stack.callback(store.close)
    stack.callback(threads.close)
    return _Base(
        store,
        clock,
        threads,
        JupyterClient(),
        Mailbox(),
        SnapshotBoard(),
        OrphanedKernels(store, clock),
    )


@dataclass(frozen=True, slots=True)
class _History:
    """Event log, usage log, metrics and webhooks."""

    event_log: EventLog
    usage_log: UsageLog
    metrics: Metrics
    webhooks: Callable[[], list[WebhookStatus]]
    """Returns the status of the webhooks."""
    failing: Callable[[], Mapping[str, str]]
    """Returns the error of a webhook's last round."""


def _history(chosen: Settings, base: _Base, edge: Edge | None, stack: ExitStack) -> _History:
    webhooks: list[Webhook] = []

    def statuses() -> list[WebhookStatus]:
        return [webhook.status() for webhook in webhooks]

    use = (lambda: None) if edge is None else edge.use
    metrics = Metrics(
        base.clock, World(base.board.all, base.orphans.all, statuses, use), version=VERSION
    )
    event_log = EventLog(
        base.store, base.clock, size=chosen.history_size, subscribers=[metrics.heard]
    )
    usage_log = UsageLog(base.store, base.clock, period=chosen.usage_period)
    usage_log.start(base.threads)
    stack.callback(usage_log.save)
    if (webhook := _webhook(chosen, event_log, base)) is not None:
        webhooks.append(webhook)
        stack.callback(webhook.close)
        webhook.start()
    failing = dict if webhook is None else lambda: webhook.failing
    return _History(event_log, usage_log, metrics, statuses, failing)


def _webhook(chosen: Settings, event_log: EventLog, base: _Base) -> Webhook | None:
    """Return the configured webhook, or None. Raises SettingsError."""
    target = webhook_target(chosen)
    if target is None:
        return None
    url, key = target
    return Webhook(
        url,
        key,
        event_log,
        base.store,
        base.clock,
        lambda entry: event_model(entry).model_dump(mode="json"),
    )


def _gateways(
    chosen: Settings, base: _Base, client: GatewayClient
) -> tuple[GatewayPreflight, GatewayWatch]:
    preflight = GatewayPreflight(
        base.mailbox.post, threads=base.threads, client=client, probe=base.jupyter
    )
    watch = GatewayWatch(
        base.mailbox.post,
        threads=base.threads,
        client=client,
        orphans=base.orphans,
        clock=base.clock,
        period=chosen.gateway_period,
    )
    return preflight, watch


def _earlier(chosen: Settings, store: SqliteStore, stack: ExitStack) -> list[EarlierDir]:
    """Return earlier runtime directories that hold servers; record these and the keeper's own."""
    own = chosen.server_dirs.resolve()
    looked = [
        EarlierDir.look(directory) for directory in earlier_dirs(store.runtime_dirs(), own, stack)
    ]
    left = [earlier for earlier in looked if earlier.names]
    store.note_runtime_dirs([own, *(earlier.runtime_dir for earlier in left)])
    return left


def _backend(
    chosen: Settings,
    base: _Base,
    history: _History,
    preflight: GatewayPreflight,
    *,
    earlier: Sequence[EarlierDir],
    identity_secret: str,
) -> Backend:
    return LocalBackend(
        preflight.receive,
        replace(local_options(chosen), identity_secret=identity_secret),
        paths=paths(chosen),
        client=base.jupyter,
        earlier=earlier,
        found_orphans=history.event_log.orphans,
    )


def _culler(
    chosen: Settings, base: _Base, history: _History, backend: Backend, edge: Edge | None
) -> Culler:
    return Culler(
        base.mailbox.post,
        backend=backend,
        probe=base.jupyter,
        visitors=edge,
        event_log=history.event_log,
        threads=base.threads,
        clock=base.clock,
        policy=cull_policy(chosen),
        period=chosen.cull_period,
    )


def _keeper(
    chosen: Settings,
    base: _Base,
    backend: Backend,
    preflight: GatewayPreflight,
    subscribers: Sequence[Subscriber],
) -> Keeper:
    executor = KeyedExecutor(base.mailbox.post)
    fleet = Fleet(
        backend=backend,
        preflight=preflight,
        orphans=base.orphans,
        store=base.store,
        executor=executor,
        clock=base.clock,
        policy=policy(chosen),
        subscribers=subscribers,
    )
    return Keeper(fleet, base.mailbox, executor, base.board, base.clock)


def _services(
    chosen: Settings,
    base: _Base,
    history: _History,
    backend: Backend,
    *,
    keeper: Keeper,
    culler: Culler,
    sampler: Sampler,
    gateways: GatewayClient,
    tokens: Tokens,
    sessions: Sessions,
    edge: Edge | None,
    url: str,
) -> Services:
    return Services(
        keeper=keeper,
        backend=backend,
        probe=base.jupyter,
        orphans=base.orphans.all,
        event_log=history.event_log,
        metrics=history.metrics,
        webhooks=history.webhooks,
        failing=lambda: {**base.threads.failing, **history.failing()},
        edge_use=(lambda: None) if edge is None else edge.use,
        usage=sampler.of,
        check_gateway=gateways.check,
        usage_history=history.usage_log.history,
        recent_usage=history.usage_log.recent,
        culler=culler,
        max_snooze=chosen.max_snooze,
        defaults=defaults(chosen),
        version=VERSION,
        tokens=tokens,
        sessions=sessions,
        authenticators=_authenticators(chosen, tokens, backend),
        url=url,
        hosts=hosts(chosen),
        origins=chosen.allowed_origins,
        max_request_rate=chosen.max_request_rate,
        advertised_host=chosen.advertised_host,
        labs=lab_addresses(chosen),
        start_wait=chosen.start_timeout + longest_stop(chosen),
        stop_wait=longest_stop(chosen),
        concurrency=ConcurrencyLimit(chosen.threads),
        max_body=chosen.max_body,
        policy=policy(chosen),
        settings=settings_in_force(chosen),
    )


def _authenticators(chosen: Settings, tokens: Tokens, backend: Backend) -> Sequence[Authenticator]:
    if chosen.auth == "none":
        return [OpenAuthenticator()]
    return [TokenAuthenticator(tokens), PeerAuthenticator(backend.is_server)]


def _serve(
    chosen: Settings,
    services: Services,
    stack: ExitStack,
    *,
    sockets: Sequence[socket.socket],
    edge: Edge | None,
) -> None:
    server = WsgiServer(
        create_app(services, dashboard(services)),
        sockets,
        threads=chosen.threads,
        max_body=chosen.max_body,
        behind_edge=None if edge is None else stack.enter_context(edge.upstream()),
    )
    server.start()
    stack.callback(server.close)
