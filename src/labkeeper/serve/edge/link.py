"""The connection by which a keeper commands one edge (see `labkeeper.edge.wire`)."""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from labkeeper import unix_sockets
from labkeeper.backends.local.processes import Process
from labkeeper.edge import wire
from labkeeper.edge.report import Report

CONTROL: Final = "control.sock"
"""An edge's control socket in its directory."""
_TAKE_WITHIN: Final = 0.2
"""Seconds in which an edge must take a command; its socket holds a thousand."""
_TAKE_LARGE_WITHIN: Final = 5.0
"""Seconds in which it must take one that its socket may not hold: all routes and sessions."""
_PIECE: Final = 64 * 1024


@dataclass(slots=True)
class Heard:
    """What an edge has reported."""

    at: float = field(default_factory=time.monotonic)
    """When it was last heard, by the monotonic clock."""
    report: Report = field(default_factory=Report)
    """Its last report."""
    used: dict[str, float] = field(default_factory=dict)
    """When sessions were last used, by digest and the monotonic clock, until taken."""
    in_use: set[str] = field(default_factory=set)
    """The digests of the sessions that are in use."""
    frames: wire.Frames = field(default_factory=wire.Frames)

    def hear(self, report: Report) -> None:
        """Note what a report says."""
        self.report = report
        for digest, ago in report.uses:
            if ago is None:
                self.in_use.add(digest)
            else:
                self.in_use.discard(digest)
                self.used[digest] = self.at - ago

    def take_uses(self, known: Collection[str]) -> dict[str, float]:
        """Return how many seconds ago known sessions were last used, as far as not returned yet."""
        now = time.monotonic()
        self.in_use.intersection_update(known)
        used, self.used = self.used, {}
        return {digest: now - at for digest, at in used.items()} | dict.fromkeys(self.in_use, 0.0)


@dataclass(frozen=True, slots=True)
class Link:
    """One running edge."""

    directory: Path
    process: Process
    build: str
    """Identifies what it was made from."""
    address: tuple[str, int]
    """The public address as the settings had it."""
    secure: bool
    """Whether it speaks TLS there."""
    public: socket.socket | None
    """Its listening socket; None if it only finishes what it has begun."""
    connection: socket.socket
    heard: Heard

    @classmethod
    def open(cls, directory: Path, key: str, *, within: float) -> Link:
        """Connect to the edge of a directory; each side proves that it knows the key.

        Raises OSError, EOFError, WireError.
        """
        connection = unix_sockets.connect(directory, CONTROL, timeout=within)
        received = _Received(connection)
        try:
            theirs, own = wire.nonce_of(received.next()), wire.nonce()
            proof = wire.proof(key, "keeper", theirs, own)
            connection.sendall(wire.encode({"nonce": own, "proof": proof}))
            told = received.next()
            wire.check_proof(told, key, "edge", theirs, own)
            match told:
                case {
                    "pid": int(pid),
                    "build": str(build),
                    "address": [str(host), int(port)],
                    "secure": bool(secure),
                }:
                    process = Process.find(pid)
                case _:
                    raise wire.WireError("it does not describe itself")
            if process is None:
                raise EOFError("it has ended")
        except BaseException:
            received.close()
            connection.close()
            raise
        heard = Heard(frames=received.decoder)
        return cls(
            directory, process, build, (host, port), secure, received.socket, connection, heard
        )

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a command. Raises OSError: nothing is known of the edge then."""
        frame = wire.encode(message)
        self.connection.settimeout(_TAKE_WITHIN if len(frame) < _PIECE else _TAKE_LARGE_WITHIN)
        self.connection.sendall(frame)

    def command(self, message: Mapping[str, Any]) -> None:
        """Send a command, or kill the edge: it must not serve without having received it.

        It takes none if it is suspended, or stuck, or has ended.
        """
        try:
            self.send(message)
        except OSError:
            self.process.send(signal.SIGKILL)
            with contextlib.suppress(OSError):
                # This wakes the thread that supervises it.
                self.connection.shutdown(socket.SHUT_RDWR)

    def receive(self) -> None:
        """Receive what has arrived. Raises OSError, EOFError, WireError, ReportError."""
        data = self.connection.recv(_PIECE)
        if not data:
            raise EOFError("it closed the connection")
        self.heard.at = time.monotonic()
        for frame in self.heard.frames.feed(data):
            match frame:
                case {"report": report}:
                    self.heard.hear(Report.parse(report))
                case _:
                    raise wire.WireError("it does not report")

    def ask(self, key: str, question: str, server: str, *, within: float) -> Any:
        """Return the answer to a question about a server. It is asked over a connection of its own.

        Raises OSError, EOFError, WireError.
        """
        with contextlib.closing(Link.open(self.directory, key, within=within)) as other:
            other.send({"do": question, "server": server})
            other.connection.settimeout(within)
            received = _Received(other.connection)
            while question not in (frame := received.next()):
                continue  # A frame that all keepers get.
            return frame[question]

    def close_public(self) -> None:
        """Close our descriptor of its listening socket; else an address would not be given up."""
        if self.public is not None:
            self.public.close()

    def close(self) -> None:
        """Close the connection. The edge serves on."""
        self.close_public()
        self.connection.close()


class _Received:
    """The frames that an edge has sent, and the socket that came with one."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket: socket.socket | None = None
        self._connection = connection
        self.decoder = wire.Frames()
        """Has the beginning of a frame that has not arrived as a whole."""
        self._frames: deque[dict[str, Any]] = deque()

    def next(self) -> dict[str, Any]:
        """Return the next frame. Raises OSError, EOFError, WireError."""
        while not self._frames:
            data, files, _, _ = socket.recv_fds(self._connection, _PIECE, 1)
            for file in files:
                self.close()
                self.socket = socket.socket(fileno=file)
                # The edge, which shares it, must not wait for a connection: `dup` keeps the mode.
                self.socket.setblocking(False)
            if not data:
                raise EOFError("it closed the connection")
            self._frames.extend(self.decoder.feed(data))
        return self._frames.popleft()

    def close(self) -> None:
        """Close the socket that came, if any."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None
