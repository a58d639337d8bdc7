"""The edge's side of the control protocol: keepers connect, prove themselves, and command.

`wire` describes the protocol.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from labkeeper.edge import wire
from labkeeper.edge.forwarded import Network, NetworkError, networks
from labkeeper.edge.hosts import Hosts
from labkeeper.edge.proxy import Proxy
from labkeeper.edge.routes import Route, RouteError
from labkeeper.edge.sessions import Session, SessionError
from labkeeper.forkserver import peers

_PROVE_WITHIN: Final = 5.0
"""Seconds in which a connection has to prove that it is a keeper's."""
_PIECE: Final = 256 * 1024
_LOCK: Final = re.compile(rb"^\d+: FLOCK +ADVISORY +WRITE (\d+) \S+:(\d+) 0 EOF$", re.MULTILINE)
"""A line of /proc/locks."""

_log = logging.getLogger("labkeeper.edge")


class CertificateError(ValueError):
    """A certificate does not fit, or is missing."""


_MISFITS: Final = (CertificateError, NetworkError, RouteError, SessionError)
"""A command has something that does not fit."""


class Commands(Protocol):
    """What keepers can command."""

    @property
    def proxy(self) -> Proxy:
        """The state of the edge, which keepers change."""

    def use_certificate(self, chain: bytes, key: bytes, *, hsts: bool) -> None:
        """Use a certificate, with its chain and its key, for new connections.

        With `hsts`, browsers are told to use nothing but TLS. Raises CertificateError.
        """

    def trust(self, proxies: tuple[Network, ...]) -> None:
        """Believe what these proxies say about clients, and no others."""

    def serve(self) -> None:
        """Begin to serve, if it has not begun: all routes and sessions are known.

        Raises CertificateError: one is needed, and missing.
        """

    def describe(self) -> tuple[Mapping[str, Any], list[int]]:
        """Return what the edge is, and the descriptor of its listening socket if it has one."""

    def drain(self) -> None:
        """Finish what is in progress, and end."""

    def stop(self) -> None:
        """End at once."""


@dataclass(frozen=True, slots=True)
class Access:
    """Who may command."""

    key: str
    uid: int
    """The keeper's user."""
    server_dirs: str
    """The directory of the servers' own: what they start is refused, whatever it knows."""
    lock: int
    """The inode of the file that a keeper has locked as long as it runs."""


class Control:
    """The control socket."""

    def __init__(
        self,
        listener: socket.socket,
        access: Access,
        commands: Commands,
        *,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """Begin to listen."""
        self._listener = listener
        self._access = access
        self._commands = commands
        self.loop = loop
        self.keepers: set[_Connection] = set()
        """Connections that have proved to be a keeper's."""
        # From now on, whoever connects sees this process as the one that listens.
        listener.listen()
        listener.setblocking(False)
        loop.add_reader(listener, self._accept)

    def close(self) -> None:
        """Stop listening, and close every connection."""
        self.loop.remove_reader(self._listener)
        self._listener.close()
        for connection in list(self.keepers):
            connection.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        try:
            self._check(connection)
        except OSError as error:
            _log.warning("refused a control connection: %s", error)
            connection.close()
            return
        _Connection(connection, self)

    def _check(self, connection: socket.socket) -> None:
        """Raise OSError unless the peer is a keeper's process.

        An edge with a user of its own cannot see whether a process has the mark of a server. The
        lock has one holder, which everyone can see.
        """
        peers.check(connection, self._access.uid, self._access.server_dirs)
        pid, *_ = peers.credentials(connection)
        if not _holds(pid, self._access.lock):
            raise PermissionError(f"process {pid} is not the keeper")

    def prove(self, frame: Mapping[str, Any], nonce: str) -> tuple[bytes, list[int]]:
        """Check a keeper's proof; return ours, and what goes with it. Raises WireError."""
        key, theirs = self._access.key, wire.nonce_of(frame)
        wire.check_proof(frame, key, "keeper", nonce, theirs)
        description, files = self._commands.describe()
        own = {"proof": wire.proof(key, "edge", nonce, theirs), **description}
        return wire.encode(own), files

    def tell(self, message: Mapping[str, Any]) -> bool:
        """Send a message to all keepers; return whether there is one, and each took it."""
        took = [connection.send(message) for connection in list(self.keepers)]
        return bool(took) and all(took)

    def obey(self, frame: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Execute a command; return the answer if it is a question.

        Raises WireError, and those of `_MISFITS`.
        """
        proxy = self._commands.proxy
        routes, sessions = proxy.routes, proxy.sessions
        match frame:
            case {
                "do": "all",
                "domain": str(domain),
                "hosts": list(hosts),
                "access_log": bool(log),
                "longest_body": int(longest_body),
                "routes": list(found),
                "sessions": list(known),
            }:
                proxy.access_log.on = log
                proxy.large_bodies.longest = longest_body
                proxy.hosts = Hosts(map(str, hosts))
                proxy.shut_out(sessions.replace([Session.parse(session) for session in known]))
                kept = frame.get("kept")
                routes.replace(
                    [Route.parse(route) for route in found], kept if isinstance(kept, dict) else {}
                )
                routes.domain = domain
                proxy.uses.tell_all(str(frame.get("keeper", "")))
                self._commands.serve()
            case {"do": "sessions", "begun": list(begun), "ended": list(digests)}:
                sessions.add([Session.parse(session) for session in begun])
                proxy.shut_out(sessions.end(map(str, digests)))
            case {"do": "certificate", "chain": str(chain), "key": str(key), "hsts": bool(hsts)}:
                self._commands.use_certificate(chain.encode(), key.encode(), hsts=hsts)
            case {"do": "trust", "proxies": list(proxies)}:
                self._commands.trust(networks(map(str, proxies)))
            case {"do": "route", "route": route}:
                routes.set(Route.parse(route))
            case {"do": "unroute", "server": str(server)}:
                routes.remove(server)
            case {"do": "visits", "server": str(server)}:
                return {"visits": {"open": proxy.visitors(server), "ago": proxy.visits.ago(server)}}
            case {"do": "drain"}:
                self._commands.drain()
            case {"do": "stop"}:
                self._commands.stop()
            case _:
                raise wire.WireError("the command is unknown")
        return None


def _holds(pid: int, inode: int) -> bool:
    """Whether a process has locked a file, by flock(2) (proc_locks(5)). Raises OSError."""
    locks = _LOCK.findall(Path("/proc/locks").read_bytes())
    return (b"%d" % pid, b"%d" % inode) in locks


class _Connection:
    """One control connection. Its messages are small: sending them does not block in practice."""

    def __init__(self, connection: socket.socket, control: Control) -> None:
        self._socket = connection
        self._control = control
        self._frames = wire.Frames()
        self._nonce: str | None = wire.nonce()
        """None once the keeper has proved itself."""
        connection.setblocking(False)
        control.loop.add_reader(connection, self._guarded(self._read))
        self._timer = control.loop.call_later(_PROVE_WITHIN, self.close)
        self._guarded(self._greet)()

    def _greet(self) -> None:
        self._socket.sendall(wire.encode({"version": wire.VERSION, "nonce": self._nonce}))

    def _guarded(self, act: Callable[[], None]) -> Callable[[], bool]:
        """Return `act` so that an error in it closes the connection, and whether it succeeds."""

        def guarded() -> bool:
            try:
                act()
            except BlockingIOError:
                pass
            except (OSError, EOFError):
                self.close()
            except (wire.WireError, *_MISFITS) as error:
                _log.warning("closed a control connection: %s", error)
                self.close()
            else:
                return True
            return False

        return guarded

    def _read(self) -> None:
        data = self._socket.recv(_PIECE)
        if not data:
            raise EOFError
        for frame in self._frames.feed(data):
            if self._nonce is None:
                if (answer := self._control.obey(frame)) is not None:
                    self.send(answer)
            else:
                socket.send_fds(self._socket, *self._prove(frame, self._nonce))
                self._nonce = None
                self._timer.cancel()
                self._control.keepers.add(self)

    def _prove(self, frame: Mapping[str, Any], nonce: str) -> tuple[list[bytes], list[int]]:
        own, files = self._control.prove(frame, nonce)
        return [own], files

    def send(self, message: Mapping[str, Any]) -> bool:
        """Send a message; return whether the keeper took it: it may read nothing at the moment.

        One that has ended may have left commands, which are still to be read.
        """
        try:
            self._socket.sendall(wire.encode(message))
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Close it. Idempotent."""
        self._timer.cancel()
        self._control.keepers.discard(self)
        if self._socket.fileno() >= 0:
            self._control.loop.remove_reader(self._socket)
            self._socket.close()
