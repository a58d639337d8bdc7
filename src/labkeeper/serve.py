"""The composition root: settings -> store, backend, fleet, application; then signals, and an orderly end."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import os
import resource
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import structlog

from labkeeper import logs, scrub, settings, statedir
from labkeeper.api import tls
from labkeeper.api.answers import event_model
from labkeeper.api.app import create_app
from labkeeper.api.places import Places
from labkeeper.api.requests import Defaults
from labkeeper.api.services import Services
from labkeeper.api.tls import Certificate
from labkeeper.api.wsgi import WsgiServer
from labkeeper.backends.local import LocalBackend
from labkeeper.backends.machine import OwnMachine
from labkeeper.core.controller import Policy
from labkeeper.core.errors import LabkeeperError, SettingsError, StoreError
from labkeeper.core.fleet import Fleet
from labkeeper.core.lifecycle import MAY_EXIST
from labkeeper.core.model import Limits
from labkeeper.crew import Crew
from labkeeper.culling.culler import Culler
from labkeeper.gateways.client import GatewayClient
from labkeeper.gateways.debts import Ledger
from labkeeper.gateways.gate import Gate
from labkeeper.gateways.watch import GatewayWatch
from labkeeper.history.chronicle import Chronicle
from labkeeper.history.webhooks import Webhook, key_of
from labkeeper.jupyter import JupyterClient
from labkeeper.metrics import Metrics, World
from labkeeper.runtime import Board, Inbox, Keeper, LanePool, SystemClock
from labkeeper.settings import Settings
from labkeeper.store import SqliteStore
from labkeeper.tokens import Tokens
from labkeeper.usage import Sampler

if TYPE_CHECKING:
    from labkeeper.client import Client

_MARGIN: Final = 5.0
"""Seconds beyond the sum of all timers after which an outcome is waited for no longer."""
_WILDCARDS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 - compared, not bound
_DESCRIPTORS: Final = 16384
_NO_THREAD: Final = "can't start new thread"
"""What Python says where a thread is one too many; the error has no type of its own."""
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_log = structlog.get_logger("labkeeper.serve")


def run(chosen: Settings, *, first: bool = False, announce: Callable[[str], None] = print, at_terminal: bool = False) -> int:
    """Run a keeper until SIGTERM or SIGINT, and stop its servers or leave them; give the exit code.

    With `first`, the server named `default` is started too. `announce` gets lines for the person who started the keeper;
    `at_terminal` says that nobody else reads them, and that nobody keeps them: its link, with its token, is told there only.
    Raises SettingsError.
    """
    # What is made from here on is for us alone; what others must reach is opened to them where it is made.
    os.umask(0o077)
    logs.configure(level=chosen.log_level, form=chosen.log_format, debug=chosen.debug)
    announce = _unheard_is_no_harm(announce)
    with ExitStack() as stack:
        ended = stack.enter_context(closing(_Ended()))
        _make_private(chosen.state_dir)
        stack.enter_context(_only_keeper(chosen.state_dir, "state directory", "LABKEEPER_STATE_DIR"))
        if chosen.runtime_dir is not None and _exists(chosen.runtime_dir):
            stack.enter_context(_only_keeper(chosen.runtime_dir, "runtime directory", "LABKEEPER_RUNTIME_DIR"))
        _allow_descriptors()
        token = _token(chosen)
        scrub.learn("keeper", _own_secrets(chosen, token))
        certificate = None if chosen.certificate is None else Certificate(*chosen.certificate)
        if chosen.lab_certificate is not None:
            # A mistake is told now, and not by each server that cannot start.
            tls.load(*chosen.lab_certificate, prefix="LABKEEPER_LAB_")
        listener = stack.enter_context(_listen(chosen.host, chosen.port))
        url = _url_of(listener, "http" if certificate is None else "https")
        door = stack.enter_context(_local_door(statedir.socket_path(chosen.state_dir)))
        listeners = [listener] if door is None else [listener, door]
        try:
            keeper = _assemble(chosen, token, stack, listeners=listeners, certificate=certificate, url=url)
        except StoreError as error:
            # At boot it is for whoever runs the keeper to act, as for every other setting.
            raise SettingsError(error.message) from error
        except RuntimeError as error:
            if str(error) != _NO_THREAD:
                raise
            raise SettingsError(
                "cannot start the threads of a keeper; raise the limit of processes (ulimit -u, or the container's --pids-limit)"
            ) from error
        path = None if door is None else statedir.socket_path(chosen.state_dir)
        stack.enter_context(_address(chosen.state_dir, url, path))
        announce(f"labkeeper {version('labkeeper')} answers on {url} (documentation: {url}/api/docs)")
        _warn(chosen, announce)
        if first:
            connect = functools.partial(_own_client, url, path, token)
            threading.Thread(target=_start_first, args=(connect, announce, ended, at_terminal), daemon=True).start()
        # What is there by now stays: later searches for garbage leave it out.
        gc.freeze()
        _tell_systemd("READY=1")
        _log.info("keeper is ready", url=url, state_dir=str(chosen.state_dir), pid=os.getpid())
        ended.wait()
        _tell_systemd("STOPPING=1")
        return _stop(keeper, chosen, announce)


def _unheard_is_no_harm(announce: Callable[[str], None]) -> Callable[[str], None]:
    """Let it be no reason to end, nor to leave servers behind, that what is said goes to a full disk, or to nobody."""

    def say(line: str) -> None:
        with contextlib.suppress(OSError):
            announce(line)

    return say


def _assemble(
    chosen: Settings,
    token: str | None,
    stack: ExitStack,
    *,
    listeners: Sequence[socket.socket],
    certificate: Certificate | None,
    url: str,
) -> Keeper:
    """Build everything, in the order in which it is closed backwards; it serves when this returns."""
    policy = Policy(
        start_timeout=chosen.start_timeout,
        stop_grace=chosen.stop_grace,
        kill_wait=chosen.kill_wait,
        probe_period=chosen.probe_period,
        hung_after=chosen.hung_after,
        max_servers=chosen.max_servers,
        max_starts=chosen.max_starts,
        min_free=chosen.min_free,
    )
    store = SqliteStore(chosen.state_dir / "labkeeper.sqlite")
    stack.callback(store.close)
    jupyter = JupyterClient()
    inbox, board = Inbox(), Board()
    lanes = LanePool(inbox.hear)
    crew, clock = Crew(), SystemClock()
    stack.callback(crew.close)
    gateways = GatewayClient(clock, timeout=chosen.gateway_timeout)
    ledger = Ledger(store, clock)
    ours = version("labkeeper")
    metrics = Metrics(clock, World(board.all, ledger.all, lambda: [webhook.status() for webhook in webhooks]), version=ours)
    chronicle = Chronicle(store, clock, size=chosen.history_size, hearers=[metrics.heard])
    webhooks = _webhooks(chosen, chronicle, store, clock)
    for webhook in webhooks:
        stack.callback(webhook.close)
        webhook.start()
    gate = Gate(inbox.hear, crew=crew, client=gateways, probe=jupyter)
    watch = GatewayWatch(inbox.hear, crew=crew, client=gateways, ledger=ledger, clock=clock, period=chosen.gateway_period)
    backend = LocalBackend(
        gate.hear,
        python=chosen.jupyter_python,
        runtime_dir=chosen.rooms,
        log_dir=chosen.state_dir / "logs",
        client=jupyter,
        launch_by=chosen.launch_by,
        umask=chosen.umask_of_servers,
        log_max_bytes=chosen.log_max_bytes,
        echo_logs=chosen.echo_logs,
        certificate=chosen.lab_certificate,
        found_orphans=chronicle.orphans,
    )
    culler = Culler(
        inbox.post,
        backend=backend,
        probe=jupyter,
        chronicle=chronicle,
        crew=crew,
        clock=clock,
        policy=chosen.cull_policy,
        period=chosen.cull_period,
    )
    fleet = Fleet(
        backend=backend,
        gate=gate,
        ledger=ledger,
        store=store,
        lanes=lanes,
        clock=clock,
        policy=policy,
        machine=OwnMachine(),
        listeners=(scrub.SecretsOfServers(), board, logs.ChangeLog(), watch, chronicle, metrics, culler),
    )
    keeper = Keeper(fleet, inbox, lanes, board)
    # After the keeper's: a launch that is under way comes to its end first. What is reported to nobody the next keeper finds out.
    stack.callback(backend.close)
    keeper.start()
    stack.callback(keeper.close)
    watch.start()
    sampler = Sampler(backend, jupyter, keeper.all, crew=crew, clock=clock, period=chosen.usage_period)
    sampler.start()
    culler.start()
    end = chosen.stop_grace + chosen.kill_wait + _MARGIN
    places = Places(chosen.threads)
    services = Services(
        keeper=keeper,
        backend=backend,
        probe=jupyter,
        debts=ledger.all,
        history=chronicle,
        meter=metrics,
        webhooks=lambda: [webhook.status() for webhook in webhooks],
        usage=sampler.of,
        culler=culler,
        max_snooze=chosen.max_snooze,
        defaults=Defaults(
            chosen.notebook_dir,
            chosen.lab_ip,
            chosen.lab_port,
            Limits(memory=chosen.memory_limit, cpus=chosen.cpu_limit, processes=chosen.process_limit),
            chosen.idle_timeout,
            chosen.max_age,
            chosen.allowed_roots or (),
            chosen.user,
        ),
        version=ours,
        tokens=Tokens(store, clock, chronicle, owner=token),
        is_open=chosen.auth == "none",
        is_server=backend.belongs_to_server,
        url=url,
        hosts=[*chosen.allowed_hosts, *filter(None, [chosen.advertised_host])],
        origins=chosen.allowed_origins,
        max_request_rate=chosen.max_request_rate,
        advertised_host=chosen.advertised_host,
        start_wait=chosen.start_timeout + end,
        stop_wait=end,
        places=places,
        max_body=chosen.max_body,
    )
    server = WsgiServer(
        create_app(services),
        listeners,
        threads=chosen.threads,
        max_body=chosen.max_body,
        certificate=certificate,
        fit=places.fit,
    )
    server.start()
    stack.callback(server.close)
    # Before that: it waits for answers that go on.
    stack.callback(chronicle.close)
    return keeper


def _webhooks(chosen: Settings, chronicle: Chronicle, store: SqliteStore, clock: SystemClock) -> list[Webhook]:
    """Make the webhook that the settings ask for, if they do. Raises SettingsError."""
    if chosen.webhook_url is None:
        return []
    url = chosen.webhook_url.get_secret_value()
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise SettingsError("bad setting LABKEEPER_WEBHOOK_URL: must be such as https://host/path")
    if chosen.webhook_secret is None:
        raise SettingsError(
            "LABKEEPER_WEBHOOK_URL is set, and no LABKEEPER_WEBHOOK_SECRET to sign with; `openssl rand -base64 32` makes one"
        )
    try:
        key = key_of(chosen.webhook_secret.get_secret_value())
    except ValueError as error:
        raise SettingsError(f"bad setting LABKEEPER_WEBHOOK_SECRET: {error}") from error
    return [Webhook(url, key, chronicle, store, clock, lambda entry: event_model(entry).model_dump(mode="json"))]


def _stop(keeper: Keeper, chosen: Settings, announce: Callable[[str], None]) -> int:
    """Stop all servers, unless they are left for the next keeper; the API goes on answering meanwhile."""
    count = len([s for s in keeper.all() if s.endpoint is not None])
    if chosen.on_exit == "leave":
        _log.info("keeper ends; its servers are left for the next one", servers=count)
        return 0
    if count:
        announce(f"stopping {count} server{'s' if count > 1 else ''} ...")
    if keeper.stop_all(within=chosen.stop_grace + chosen.kill_wait + _MARGIN):
        _log.info("keeper ends; no server is left")
        return 0
    left = sorted(s.name for s in keeper.all() if s.state in MAY_EXIST)
    _log.error("keeper ends, but servers may be left", servers=left)
    announce(f"could not prove the end of: {', '.join(left)}")
    return 1


class _Ended:
    """Whether a signal asked us to end.

    It is waited for on a socket that the interpreter itself writes to when a signal comes: a lock would sleep through one that
    another thread took just before the main thread slept.
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
        self._wakeup_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)

    def wait(self) -> None:
        """Return when a signal has come; it may have come before."""
        self._reader.recv(1, socket.MSG_PEEK)

    def is_set(self) -> bool:
        """Whether one has come."""
        return bool(select.select([self._reader], [], [], 0)[0])

    def close(self) -> None:
        """Put the signals back as they were."""
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._reader.close()
        self._writer.close()


def _make_private(directory: Path) -> None:
    """Make the state directory; one that was there and is not empty keeps its mode: every secret in it is private by itself."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not any(directory.iterdir()):
            directory.chmod(0o700)
    except OSError as error:
        raise SettingsError(f"cannot use the state directory {directory}: {error.strerror}") from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise SettingsError(f"cannot use the state directory {directory}: it is not writable")


def _exists(directory: Path) -> bool:
    """Make a runtime directory if need be; where it cannot be made, each start says so."""
    with contextlib.suppress(OSError):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return os.access(directory, os.W_OK | os.X_OK)


@contextmanager
def _only_keeper(directory: Path, what: str, variable: str) -> Iterator[None]:
    """Hold the lock of a directory. The kernel drops it with the process, so none is ever stale."""
    path = directory / "keeper.lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise SettingsError(f"cannot use the {what} {directory}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 20).decode("ascii", errors="replace") or "unknown"
            raise SettingsError(
                f"another keeper (pid {holder}) runs on the {what} {directory}; stop it, or choose another {variable}"
            ) from None
        with contextlib.suppress(OSError):  # On a full disk the lock holds all the same; it only does not say whose it is.
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        os.close(descriptor)


def _allow_descriptors() -> None:
    """Take as many descriptors as we may: each connection, each log and each server needs one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _token(chosen: Settings) -> str | None:
    """Give the API token: the one that was set, or the one in the state directory, made now if need be."""
    if chosen.auth == "none":
        return None
    if chosen.token is not None:
        return chosen.token.get_secret_value()
    try:
        return statedir.read_token(chosen.state_dir) or statedir.make_token(chosen.state_dir)
    except OSError as error:
        raise SettingsError(f"cannot make a token in the state directory {chosen.state_dir}: {error.strerror}") from error


def _own_secrets(chosen: Settings, token: str | None) -> list[str]:
    """Give what this keeper must not tell; the URL of a webhook is often a secret by itself."""
    set_ = (secret.get_secret_value() for secret in (chosen.webhook_url, chosen.webhook_secret) if secret is not None)
    return [*set_, *([] if token is None else [token])]


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another LABKEEPER_HOST or LABKEEPER_PORT"
        ) from error


def _url_of(listener: socket.socket, scheme: str) -> str:
    host, port = listener.getsockname()[:2]
    host = _WILDCARDS.get(host, host)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


@contextmanager
def _local_door(path: Path) -> Iterator[socket.socket | None]:
    """Make the Unix socket by which our user reaches us; where that cannot be, such as by too long a path, we go on without."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
        try:
            path.unlink(missing_ok=True)  # Of a keeper that was killed.
            _bind_private(door, path)
        except OSError as error:
            _log.warning("there is no Unix socket; callers on this machine use the port", path=str(path), error=str(error))
            yield None
            return
        try:
            yield door
        finally:
            with contextlib.suppress(OSError):
                path.unlink()


def _bind_private(door: socket.socket, path: Path) -> None:
    """Bind a socket that comes into being with mode 0600. Raises OSError."""
    before = os.umask(0o177)
    try:
        door.bind(os.fspath(path))
    finally:
        os.umask(before)


@contextmanager
def _address(state_dir: Path, url: str, door: Path | None) -> Iterator[None]:
    try:
        statedir.write_address(state_dir, url, door)
    except OSError as error:
        _log.warning("cannot write where this keeper answers; the command line needs --url", error=str(error))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # On a disk that has become read-only it stays, as that of a killed keeper.
            statedir.remove_address(state_dir)


def _warn(chosen: Settings, announce: Callable[[str], None]) -> None:
    if chosen.auth == "none":
        where = f"{chosen.host} port {chosen.port}"
        text = f"access control is OFF (LABKEEPER_AUTH=none): whoever reaches {where} can run code as this user"
        announce(f"WARNING: {text}")
        _log.warning(text)
    if os.geteuid() == 0 and chosen.user is None:
        _log.warning("a server whose request names no user runs as root; LABKEEPER_USER names another one for those")
    for name in settings.unknown_variables():
        _log.warning("unknown setting in the environment; it has no effect", variable=name)


def _tell_systemd(state: str) -> None:
    """Tell the service manager, if one listens, as sd_notify(3) does."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address.startswith("@"):
        address = f"\0{address[1:]}"
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.sendto(state.encode(), address)


def _own_client(url: str, path: Path | None, token: str | None) -> Client:
    """Make a client of ourselves: by the Unix socket where there is one, since our certificate may be for another name."""
    from labkeeper.client import Client  # noqa: PLC0415 - late: most keepers start no first server

    return Client(url, token=token) if path is None else Client(url, socket=str(path))


def _start_first(connect: Callable[[], Client], announce: Callable[[str], None], ended: _Ended, at_terminal: bool) -> None:
    """Start the default server through our own API, as any caller would."""
    announce("starting JupyterLab ...")
    try:
        with connect() as client:
            link = client.create().lab_url
            announce(f"JupyterLab is ready: {link if at_terminal else '`labkeeper open --print` gives its link'}")
    except LabkeeperError as error:
        if ended.is_set():
            return
        announce(f"no first server: {error.message}")
        for line in error.details.get("log_tail", ()):
            announce(f"  {line}")
    announce("Ctrl-C stops everything.")
