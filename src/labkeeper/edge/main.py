"""The process of the edge: what it is started with, its loop, and its end."""

from __future__ import annotations

import asyncio
import concurrent.futures.thread  # noqa: F401 - see `main`
import encodings.idna  # noqa: F401 - likewise
import functools
import json
import logging
import os
import signal
import socket
import ssl
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Final

from labkeeper.edge.client import Client
from labkeeper.edge.control import Access, CertificateError, Control
from labkeeper.edge.forwarded import Network
from labkeeper.edge.limits import Limits, allow_descriptors
from labkeeper.edge.pieces import PieceProtocol
from labkeeper.edge.proxy import Proxy
from labkeeper.edge.tls import EncryptedKeyError, TlsConnection, context_of
from labkeeper.edge.wire import REPORT_EVERY
from labkeeper.forkserver import privileges

_BACKLOG: Final = 1024
_AT_ONCE: Final = 16
"""Connections that are accepted before everything else has its turn."""
_SWEEP_EVERY: Final = 1.0
"""Seconds between two looks at the connections' deadlines."""
_LONELY: Final = 600.0
"""Seconds after which an edge ends that has neither a keeper nor a connection."""

_log = logging.getLogger("labkeeper.edge")


@dataclass(frozen=True, slots=True)
class Start:
    """What a keeper gives to a new edge, by its standard input: others can read arguments."""

    public: int
    """Descriptor of the listening socket at the public address."""
    control: int
    """Descriptor of the control socket."""
    directory: int
    """Descriptor of the directory of the keeper's socket, which another user could not reach."""
    keeper: str
    """The name of that socket."""
    address: tuple[str, int]
    """The public address as the keeper's settings have it."""
    secure: bool
    """Whether it speaks TLS at that address, and never anything else."""
    build: str
    """Identifies what the edge was made from."""
    key: str = field(repr=False)
    server_dirs: str
    lock: int
    """The inode of the file that a running keeper has locked."""
    access_log: int
    """Descriptor of the access log."""
    user: tuple[int, int] | None
    """The user and group that it becomes; None: it remains the keeper's."""

    def encode(self) -> bytes:
        """Return it as bytes."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, text: bytes) -> Start:
        """Read it from bytes, which are a keeper's own."""
        given: Mapping[str, object] = json.loads(text)
        return cls(**given)  # type: ignore[arg-type]  # the sender is `encode`


def main() -> None:
    """Run an edge until it is told to end."""
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, stream=sys.stderr
    )
    start = Start.decode(sys.stdin.buffer.read())
    keeper_uid = os.geteuid()
    most = allow_descriptors(Limits())
    if start.user is not None:
        # Its user may be unable to read our files: what names of hosts need is imported already.
        uid, gid = start.user
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    # Secrets pass through its memory, and a server may have the same user.
    privileges.hide()
    asyncio.run(_Edge(start, keeper_uid, most).run())


class _Edge:
    """A running edge, and what keepers can command it."""

    def __init__(self, start: Start, keeper_uid: int, most: int) -> None:
        self._start = start
        self._keeper_uid = keeper_uid
        self._most = most
        self._informed: asyncio.Event
        self._ended: asyncio.Event
        self._proxy: Proxy
        self._report_at = 0.0
        """When keepers are next sent a report, by the loop's clock."""
        self._server: asyncio.Server | None = None
        self._context: ssl.SSLContext | None = None
        """With the certificate for new connections; None without TLS."""
        self._public: socket.socket | None = socket.socket(fileno=start.public)
        """The listening socket; None once it serves no more."""
        # It must not wait for a connection, and so must none that shares it: `dup` keeps the mode.
        self._public.setblocking(False)

    @property
    def proxy(self) -> Proxy:
        """See `Commands`."""
        return self._proxy

    async def run(self) -> None:
        """Serve until the end."""
        loop = asyncio.get_running_loop()
        start = self._start
        self._informed, self._ended = asyncio.Event(), asyncio.Event()
        directory = f"/proc/self/fd/{start.directory}"
        self._proxy = Proxy(
            os.path.join(directory, start.keeper),  # noqa: PTH118 - a Path would not keep the link
            limits=Limits(),
            most=self._most,
            loop=loop,
            log_file=start.access_log,
        )
        access = Access(start.key, self._keeper_uid, start.server_dirs, start.lock)
        control = Control(socket.socket(fileno=start.control), access, self, loop=loop)
        serving = loop.create_task(self._serve())
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        _log.info("the edge has started")
        await self._until_ended(control)
        serving.cancel()
        control.close()
        self._close_public()
        self._proxy.close()
        self._proxy.access_log.write()
        # Closed connections end in the next rounds of the loop.
        await asyncio.sleep(0)
        _log.info("the edge ends")

    async def _serve(self) -> None:
        """Serve once a keeper has told all routes and sessions; until then, clients wait."""
        await self._informed.wait()
        if self._public is not None:
            # Connections inherit it: a small answer must not wait for the next one.
            self._public.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._server = await self._proxy.loop.create_server(
                self._connection,
                sock=self._public.dup(),
                backlog=_AT_ONCE,
            )
            # For asyncio, that number is also the length of the queue.
            self._public.listen(_BACKLOG)
            _log.info("the edge serves on %s port %s", *self._start.address)

    def _connection(self) -> PieceProtocol:
        """Return the protocol of a new connection."""
        client = functools.partial(Client, self._proxy)
        if self._context is None:
            return client()
        return TlsConnection(self._proxy, self._context, client)

    def _close_public(self) -> None:
        """Stop listening, also with our own descriptor: its queue would fill unseen."""
        if self._server is not None:
            self._server.close()
        public, self._public = self._public, None
        if public is not None:
            public.close()

    async def _until_ended(self, control: Control) -> None:
        """Look after the connections until a command, or loneliness, ends the edge."""
        while not self._ended.is_set():
            try:
                async with asyncio.timeout(_SWEEP_EVERY):
                    await self._ended.wait()
            except TimeoutError:
                self._proxy.sweep()
            if self._proxy.loop.time() >= self._report_at:
                self._report_at = self._proxy.loop.time() + REPORT_EVERY
                self._proxy.report(control.tell)
            if self._proxy.draining and not self._proxy.open:
                return
            lonely = not control.keepers and not self._proxy.open
            if lonely and self._proxy.loop.time() - self._proxy.last_used > _LONELY:
                return

    # Commands

    def describe(self) -> tuple[Mapping[str, object], list[int]]:
        """See `Commands`."""
        told = {
            "pid": os.getpid(),
            "build": self._start.build,
            "address": list(self._start.address),
            "secure": self._start.secure,
        }
        return told, [] if self._public is None else [self._public.fileno()]

    def use_certificate(self, chain: bytes, key: bytes, *, hsts: bool) -> None:
        """See `Commands`."""
        if not self._start.secure:
            raise CertificateError("this edge speaks no TLS")
        try:
            self._context = context_of(chain, key)
        except (EncryptedKeyError, ssl.SSLError) as error:
            raise CertificateError("the certificate cannot be used") from error
        self._proxy.hsts = hsts

    def trust(self, proxies: tuple[Network, ...]) -> None:
        """See `Commands`."""
        self._proxy.trusted = proxies

    def serve(self) -> None:
        """See `Commands`."""
        if self._start.secure and self._context is None:
            raise CertificateError("there is no certificate")
        self._informed.set()

    def drain(self) -> None:
        """See `Commands`."""
        self._close_public()
        self._proxy.drain()

    def stop(self) -> None:
        """See `Commands`."""
        self._ended.set()
