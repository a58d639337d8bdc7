"""Runs a keeper: from its settings through assembly and signals to an orderly end."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager

import structlog

from labkeeper import discovery, logs, scrub, shortage
from labkeeper.core.errors import BackendUnavailable, SettingsError, StoreError
from labkeeper.core.lifecycle import MAY_EXIST
from labkeeper.runtime import Keeper
from labkeeper.serve import consistency
from labkeeper.serve.assembly import VERSION, assemble
from labkeeper.serve.edge import certificate
from labkeeper.serve.edge.certificate import Certificate
from labkeeper.serve.edge.instances import Instances
from labkeeper.serve.edge.supervisor import Answering, Edge, running
from labkeeper.serve.first import own_client, start_first
from labkeeper.serve.listening import address, listen, local_socket, url_of
from labkeeper.serve.policies import hosts, lab_addresses, longest_stop, own_secrets
from labkeeper.serve.process import Ended, allow_descriptors, own_directories, tell_systemd
from labkeeper.settings.model import Settings
from labkeeper.settings.sources import unknown_variables

_log = structlog.get_logger("labkeeper.serve")


def run(
    chosen: Settings,
    *,
    first: bool = False,
    announce: Callable[[str], None] = print,
    at_terminal: bool = False,
) -> int:
    """Run a keeper until SIGTERM or SIGINT, then stop or leave its servers; return the exit code.

    With `first`, the server named `default` is started too. `announce` receives lines for the
    person who started the keeper. With `at_terminal` they are read only there and not stored; only
    then do they include a link with its token. Raises SettingsError.
    """
    # New files are private; what others must reach is opened to them where it is created.
    os.umask(0o077)
    logs.configure(level=chosen.log_level, form=chosen.log_format, debug=chosen.debug)
    announce = _unheard_is_no_harm(announce)
    consistency.check(chosen)
    with ExitStack() as stack:
        ended = stack.enter_context(closing(Ended()))
        own_directories(chosen.state_dir, chosen.server_dirs, stack)
        allow_descriptors()
        token = _token(chosen)
        scrub.KEEPER.learn(lambda: own_secrets(chosen, token))
        if chosen.lab_certificate is not None:
            # A mistake is reported now, and not by each server that cannot start.
            certificate.check(*chosen.lab_certificate, "LABKEEPER_LAB_")
        edge = stack.enter_context(_edge(chosen, ends=lambda: not _leaves(keeper, chosen)))
        listener = listen(chosen.host, chosen.port) if edge is None else edge.public
        stack.enter_context(listener)
        url = url_of(listener, "http" if chosen.certificate is None else "https")
        unix_socket = stack.enter_context(local_socket(discovery.socket_path(chosen.state_dir)))
        own = [listener] if edge is None else []
        with _start_errors():
            keeper = assemble(
                chosen,
                token,
                stack,
                sockets=[*own, *([] if unix_socket is None else [unix_socket])],
                edge=edge,
                url=url,
            )
        path = None if unix_socket is None else discovery.socket_path(chosen.state_dir)
        stack.enter_context(address(chosen.state_dir, url, path))
        announce(f"labkeeper {VERSION} answers on {url} (documentation: {url}/api/docs)")
        _warn(chosen, announce)
        if first:
            connect = functools.partial(own_client, url, path, token)
            shortage.start(
                threading.Thread(
                    target=start_first, args=(connect, announce, ended, at_terminal), daemon=True
                )
            )
        # Present objects stay: exclude them from later garbage collections.
        gc.freeze()
        tell_systemd("READY=1")
        _log.info("keeper is ready", url=url, state_dir=str(chosen.state_dir), pid=os.getpid())
        ended.wait()
        tell_systemd("STOPPING=1")
        return _stop(keeper, chosen, announce)


def _edge(chosen: Settings, ends: Callable[[], bool]) -> AbstractContextManager[Edge | None]:
    """Return the edge, as a context in which it runs; None if it is off. Raises SettingsError.

    `ends` is called after the keeper's end: whether the edge ends with it.
    """
    if chosen.edge == "off":
        return contextlib.nullcontext()
    labs = lab_addresses(chosen)
    # At other ports, Labs speak plain HTTP, which browsers would refuse for the whole host.
    pair = chosen.certificate and Certificate(*chosen.certificate, hsts=labs.mode != "port")
    instances = Instances(
        chosen.state_dir,
        chosen.server_dirs,
        (chosen.host, chosen.port),
        secure=pair is not None,
        log_max_bytes=chosen.log_max_bytes,
    )
    answering = Answering(
        labs,
        hosts(chosen),
        chosen.trusted_proxies,
        access_log=chosen.access_log,
        longest_body=chosen.max_body,
    )
    return running(
        instances,
        answering,
        listen,
        certificate=pair,
        ends=ends,
    )


@contextmanager
def _start_errors() -> Iterator[None]:
    """Raise SettingsError instead of errors on which the keeper's administrator has to act."""
    try:
        yield
    except StoreError as error:
        raise SettingsError(error.message) from error
    except BackendUnavailable as error:
        raise SettingsError(f"cannot start a keeper: {error.message}") from error


def _leaves(keeper: Keeper, chosen: Settings) -> bool:
    """Whether the keeper leaves servers to the next one."""
    return chosen.on_exit == "leave" and any(s.state in MAY_EXIST for s in keeper.all())


def _stop(keeper: Keeper, chosen: Settings, announce: Callable[[str], None]) -> int:
    """Stop all servers, or leave them for the next keeper; the API keeps answering meanwhile."""
    count = len([s for s in keeper.all() if s.endpoint is not None])
    if chosen.on_exit == "leave":
        _log.info("keeper ends; its servers are left for the next one", servers=count)
        return 0
    if count:
        announce(f"stopping {count} server{'s' if count > 1 else ''} ...")
    if keeper.stop_all(within=longest_stop(chosen)):
        _log.info("keeper ends; no server is left")
        return 0
    left = sorted(s.name for s in keeper.all() if s.state in MAY_EXIST)
    _log.error("keeper ends, but servers may be left", servers=left)
    announce(f"could not prove the end of: {', '.join(left)}")
    return 1


def _warn(chosen: Settings, announce: Callable[[str], None]) -> None:
    if chosen.auth == "none":
        where = f"{chosen.host} port {chosen.port}"
        text = (
            "access control is OFF (LABKEEPER_AUTH=none): "
            f"anyone who reaches {where} can run code as this user"
        )
        announce(f"WARNING: {text}")
        _log.warning(text)
    if os.geteuid() == 0 and chosen.user is None:
        _log.warning(
            "a server whose request names no user runs as root; "
            "set LABKEEPER_USER to run it as another user"
        )
    for name in unknown_variables():
        _log.warning("unknown setting in the environment; it has no effect", variable=name)


def _unheard_is_no_harm(announce: Callable[[str], None]) -> Callable[[str], None]:
    """Ignore output errors, so that a full disk or a closed pipe does not end the keeper."""

    def say(line: str) -> None:
        with contextlib.suppress(OSError):
            announce(line)

    return say


def _token(chosen: Settings) -> str | None:
    """Return the API token: the configured one, or the state directory's, created if missing."""
    if chosen.auth == "none":
        return None
    if chosen.token is not None:
        return chosen.token.get_secret_value()
    try:
        return discovery.read_token(chosen.state_dir) or discovery.make_token(chosen.state_dir)
    except OSError as error:
        raise SettingsError(
            f"cannot create a token in the state directory {chosen.state_dir}: {error.strerror}"
        ) from error
