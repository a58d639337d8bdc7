"""A machine that kills keepers and edges in any order, and asks for what was answered before.

Keepers and edges are real processes (`edge_keepers`). The servers are not JupyterLab, but say who
they are: what is tried is where requests get, and with which sessions.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import h11
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from edge_keepers import KeeperDiedError, RefusedError
from edge_peers import SWITCH, WEBSOCKET, Visitor, answer
from harness import PATIENCE, alive, free_port, kill_all, until, working_in
from labkeeper.forkserver import identity

NAMES = st.sampled_from(["a", "b"])
TOKENS = st.sampled_from(["ada", "bob"])
BUILDS = st.sampled_from(["one", "two"])
DYING = st.none() | st.tuples(
    st.sampled_from(
        [
            f"{when} {what}"
            for what in ("save_session", "forget_sessions", "forget_token", "command")
            for when in ("before", "after")
        ]
    ),
    st.integers(1, 2),
)
"""Where the keeper is killed as it changes sessions: a point, and how often it is reached first."""
LONG, SHORT = 3600.0, 1.0
"""Seconds for which a session is valid."""
MOST = 5
"""Sessions and connections of a kind that are looked at."""
CUT = (ConnectionError, h11.RemoteProtocolError)
"""What a client raises whose connection ends before the answer does."""


# Servers


class Lab(asyncio.Protocol):
    """A connection to a server; it answers who it is, or echoes what comes after an upgrade."""

    def __init__(self, name, generation, secret, transports):
        self._who = f"{name} {generation}"
        self._key = identity.key_of(secret, name, generation)
        self._transports = transports
        self._head, self._echoes = b"", False

    def connection_made(self, transport):
        self._transport = transport
        self._transports.add(transport)

    def connection_lost(self, _error):
        self._transports.discard(self._transport)

    def data_received(self, data):
        if self._echoes:
            self._transport.write(data)
            return
        self._head += data
        if not self._head.endswith(b"\r\n\r\n"):
            return
        lines = [line.partition(": ") for line in self._head.decode().splitlines()]
        headers = {name.lower(): value for name, _, value in lines}
        self._head, self._echoes = b"", "upgrade" in headers
        signed = headers.get(identity.HEADER.lower(), "")
        user = identity.read(self._key, signed, time.time())
        self._transport.write(SWITCH if self._echoes else answer(f"{self._who} {user}".encode()))


class Labs:
    """Servers, in the loop of a thread."""

    def __init__(self):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def start(self, name, generation, port, secret):
        """Start one; return a function that ends it with its connections, as a kill would."""
        transports = set()

        async def listen():
            return await self._loop.create_server(
                lambda: Lab(name, generation, secret, transports), "127.0.0.1", port
            )

        async def end():
            server.close()
            for transport in list(transports):
                transport.abort()

        server = self._do(listen())
        return lambda: self._do(end())

    def _do(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE)

    def close(self):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


# What was answered


@dataclasses.dataclass
class Server:
    """A server, as the last answers have it."""

    generation: int
    port: int
    end: object = None
    """Ends it; None if it has ended."""
    known: bool = True
    """Whether the keeper knows how it is: that it runs, and where, or that it has ended."""


@dataclasses.dataclass(eq=False)
class Session:
    """A session, as the last answers have it."""

    id: str
    cookie: str
    until: float
    server: str
    token: str
    ended: bool = False
    doubtful: bool = False
    """Whether the keeper died as it was ending."""

    def head(self, *headers):
        """Return a request with its cookie, as bytes."""
        lines = [
            b"GET /servers/%b/x HTTP/1.1" % self.server.encode(),
            b"Host: x",
            b"Cookie: labkeeper-session=" + self.cookie.encode(),
            *headers,
        ]
        return b"\r\n".join([*lines, b"", b""])


@dataclasses.dataclass
class Opened:
    """A connection of a client with a session: a websocket, or one that has sent half a head."""

    visitor: Visitor
    session: Session
    edge: int
    """The process at its other end."""
    server: Server = None
    """The launch that a websocket leads to."""


class EdgeMachine(RuleBasedStateMachine):
    """See above. `nursery` starts keepers, and `labs` servers.

    No rule has a precondition: which edges live at a time is a matter of chance, and hypothesis
    needs the same choices each time. A rule that needs a keeper starts one.
    """

    def __init__(self, nursery, labs):
        super().__init__()
        self._nursery, self._labs = nursery, labs
        self._stack = contextlib.ExitStack()
        self._dir = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        (self._dir / "logs").mkdir()
        self._port = free_port()
        self._keeper = None
        self._edge = None
        """The pid of the one that serves."""
        self._build = None
        """The build of the last keeper's edge."""
        self._draining = []
        """The pids of those that finish what they have begun."""
        self._suspended = set()
        self._servers, self._sessions, self._tokens = {}, [], {}
        self._generations = itertools.count(1)
        self._free = []
        """Ports of servers that have ended."""
        self._websockets, self._halves = [], []
        self._kept = {}
        """A connection of each session, over which it asks again."""
        self.start_keeper("one")
        self.begin_session("a", "ada", LONG, None)

    def teardown(self):
        """End everything."""
        for visitor in [one.visitor for one in self._websockets + self._halves]:
            visitor.close()
        for visitor in self._kept.values():
            visitor.close()
        if self._rules:
            self._keeper.kill()
        kill_all(working_in(self._dir / "edge"))
        for server in self._servers.values():
            if server.end is not None:
                server.end()
        self._stack.close()

    # Keepers and edges

    @property
    def _rules(self):
        """Whether a keeper runs."""
        return self._keeper is not None

    @property
    def _pids(self):
        return [pid for pid in (self._edge, *self._draining) if pid is not None]

    @property
    def _serves(self):
        """Whether clients are answered now, or as soon as an edge is started."""
        return (self._rules or self._edge is not None) and self._edge not in self._suspended

    def _signal(self, pid, number):
        """Send a signal to an edge, which may have ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def _look(self):
        """See which edges run."""
        if self._rules:
            self._edge, *self._draining = self._keeper.ask("edges")
        if self._edge is not None and not alive(self._edge):
            self._edge = None
        self._draining = [pid for pid in self._draining if alive(pid)]
        self._suspended &= set(self._pids)

    def _tell(self, *command, dies=None, refusal=""):
        """Have the keeper execute a command, which it may refuse with one kind of error.

        Return the result, or the refusal. Raises KeeperDiedError, RefusedError.
        """
        try:
            return self._keeper.ask(*command, dies=dies)
        except KeeperDiedError:
            self._keeper = None
            raise
        except RefusedError as error:
            if str(error) != refusal:
                raise
            return refusal

    @rule(build=BUILDS)
    def start_keeper(self, build):
        """In the place of one that may run; its edge is the one that it finds, if of this build."""
        if self._rules:
            self._kill_keeper()
        self._build = build
        self._keeper = self._nursery.keeper(self._dir, port=self._port, build=build)
        self._look()
        for server in self._servers.values():
            server.known = False

    @rule(
        what=st.sampled_from(
            ["keeper", "edge", "draining", "keeper, then edge", "edge, then keeper", "upgrade"]
        )
    )
    def kill(self, what):
        """Kill with SIGKILL. As an edge is killed, its keeper may begin to start another one."""
        edge = self._edge
        if what == "draining":
            pids = self._draining
        else:
            pids = [edge] if edge is not None and "edge" in what else []
        if self._rules and what in {"keeper", "keeper, then edge", "upgrade"}:
            self._kill_keeper()
        for pid in pids:
            self._signal(pid, signal.SIGKILL)
        if self._rules and what == "edge, then keeper":
            self._kill_keeper()
        until(lambda: not any(map(alive, pids)), what="the edge to end")
        if self._rules:
            until(lambda: not {*pids} & {*self._keeper.ask("edges")}, what="another edge")
        if what == "upgrade":
            self.start_keeper("two" if self._build == "one" else "one")
        self._look()

    def _need_keeper(self):
        if not self._rules:
            self.start_keeper(self._build)

    def _kill_keeper(self):
        self._keeper.kill()
        self._keeper = None

    @rule(which=st.integers(0, 1))
    def suspend_edge(self, which):
        for pid in self._pids[which : which + 1]:
            self._signal(pid, signal.SIGSTOP)
            self._suspended.add(pid)

    @rule()
    def resume_edges(self):
        for pid in self._suspended:
            self._signal(pid, signal.SIGCONT)
        self._suspended = set()

    @rule()
    def suspect_edge(self):
        """The keeper replaces one that is suspended."""
        if not self._rules or self._edge not in self._suspended:
            return
        pid = self._edge
        self._keeper.ask("suspects")
        until(lambda: pid not in self._keeper.ask("edges"), what="another edge")
        assert not alive(pid)
        self._look()

    # Servers

    @rule(name=NAMES, reuse=st.booleans())
    def launch(self, name, reuse):
        """Launch a server, for the first time or again, perhaps on a port that was in use."""
        self._need_keeper()
        if name in self._servers:
            self.end(name)
            self._keeper.ask("ends", name)
        generation = next(self._generations)
        port = self._free.pop() if reuse and self._free else free_port()
        self._keeper.ask("starts", name, generation)
        secret = (self._dir / "edge.key").read_text().strip()
        server = Server(generation, port, self._labs.start(name, generation, port, secret))
        self._servers[name] = server
        self._keeper.ask("runs", name, port)

    @rule(name=NAMES)
    def end(self, name):
        """A server ends, and the keeper does not know yet."""
        server = self._servers.get(name)
        if server is not None and server.end is not None:
            server.end()
            server.end, server.known = None, False
            self._free.append(server.port)

    @rule()
    def observe(self):
        """The keeper finds the servers of an earlier one, and notices which have ended."""
        self._need_keeper()
        for name, server in self._servers.items():
            if server.known:
                continue
            if server.end is None:
                self._keeper.ask("ends", name)
            else:
                self._keeper.ask("runs", name, server.port)
            server.known = True

    @rule(which=st.integers(0, 1), dies=DYING)
    def delete(self, which, dies):
        self._need_keeper()
        if not self._servers:
            return
        name = sorted(self._servers)[which % len(self._servers)]
        of_it = [session for session in self._sessions if session.server == name]
        self.end(name)
        try:
            # It is refused if an earlier keeper had died after it had deleted it.
            self._tell("deletes", name, dies=dies, refusal="ServerNotFound")
        except KeeperDiedError:
            for session in of_it:
                session.doubtful = True
        if self._rules:
            del self._servers[name]
            for session in of_it:
                session.ended = True
        self._look()

    # Sessions

    @rule(name=NAMES, token=TOKENS, lifetime=st.sampled_from([LONG, LONG, SHORT]), dies=DYING)
    def begin_session(self, name, token, lifetime, dies):
        """A link is opened."""
        self._need_keeper()
        if name not in self._servers:
            self.launch(name, True)
        if token not in self._tokens:
            self._tokens[token] = self._keeper.ask("make_token", token)
        order = ("make_session", name, self._tokens[token], lifetime)
        with contextlib.suppress(KeeperDiedError):
            made = self._tell(*order, dies=dies, refusal="NotAuthenticated")
            if made == "NotAuthenticated":
                # An earlier keeper had died after it had revoked the token.
                self._token_is_gone(token)
            else:
                self._sessions.append(Session(**made, server=name, token=token))
        self._look()

    @rule(which=st.integers(0, MOST), dies=DYING)
    def revoke_session(self, which, dies):
        self._need_keeper()
        session = self._sessions[which % len(self._sessions)]
        try:
            found = self._tell("revoke", session.id, dies=dies, refusal="SessionNotFound")
        except KeeperDiedError:
            session.doubtful = True
        else:
            over = session.ended or session.until <= time.time()
            assert found != "SessionNotFound" or session.doubtful or over
            session.ended = True
        self._look()

    @rule(which=st.integers(0, 1), dies=DYING)
    def revoke_token(self, which, dies):
        self._need_keeper()
        if not self._tokens:
            return
        token = sorted(self._tokens)[which % len(self._tokens)]
        try:
            # It is refused if an earlier keeper had died after it had revoked it.
            self._tell("revoke_token", token, dies=dies, refusal="TokenNotFound")
        except KeeperDiedError:
            for session in self._sessions:
                session.doubtful |= session.token == token
        else:
            self._token_is_gone(token)
        self._look()

    def _token_is_gone(self, token):
        """It was answered that there is no such token."""
        del self._tokens[token]
        for session in self._sessions:
            session.ended |= session.token == token

    # What is answered now

    def _ask(self, session):
        """Return the status and the body of a request, over the connection of the one before.

        If that is cut, over a new one.
        """
        begun = time.monotonic()
        while True:
            visitor = self._kept.pop(session.id, None)
            try:
                if visitor is None:
                    visitor = Visitor(("127.0.0.1", self._port))
                reply = visitor.ask(session.head())
            except CUT:
                if visitor is not None:
                    visitor.close()
                assert time.monotonic() - begun < PATIENCE
                continue
            if reply.headers.get(b"connection") == b"close":
                visitor.close()
            else:
                self._kept[session.id] = visitor
            return reply.status, reply.body.decode()

    @invariant()
    def sessions_get_where_they_may(self):
        if not self._serves:
            return
        for session in self._sessions[-MOST:]:
            begun = time.time()
            status, body = self._ask(session)
            self._check(session, status, body, begun)

    def _check(self, session, status, body, begun):
        """Check the answer to a request that was sent later than `begun`."""
        assert status in {200, 401, 404, 502}
        if session.ended or session.until <= begun:
            assert status == 401, "a session has outlived its end"
            return
        server = self._servers[session.server]
        if status == 200:
            assert body == f"{session.server} {server.generation} {session.token}"
            assert server.end is not None
        if not session.doubtful and time.time() < session.until:
            assert status != 401, "a valid session is refused"
            if server.known and server.end is not None:
                assert status == 200, "a server is not reachable"

    @rule(which=st.integers(0, MOST), as_websocket=st.booleans())
    def open_connection(self, which, as_websocket):
        """Open a websocket, or send half of a request."""
        sessions = [session for session in self._sessions if not session.ended]
        open_ = len(self._websockets) + len(self._halves)
        if not self._serves or not sessions or open_ >= MOST:
            return
        session = sessions[which % len(sessions)]
        with contextlib.suppress(*CUT), contextlib.ExitStack() as unless_kept:
            visitor = Visitor(("127.0.0.1", self._port))
            unless_kept.callback(visitor.close)
            opened = Opened(visitor, session, self._edge, self._servers[session.server])
            if not as_websocket:
                visitor.send(session.head()[:-2])
                self._halves.append(opened)
                unless_kept.pop_all()
                return
            begun = time.time()
            reply = visitor.ask(session.head(*WEBSOCKET))
            if reply.status == 101:
                self._websockets.append(opened)
                unless_kept.pop_all()
            else:
                self._check(session, reply.status, "", begun)

    @rule()
    def send_the_other_half(self):
        """To an edge that may have been told to end since."""
        if not self._halves:
            return
        half = self._halves.pop()
        if half.edge not in self._suspended:
            begun = time.time()
            with contextlib.suppress(*CUT):
                reply = half.visitor.ask(b"\r\n")
                if reply.status not in {408, 503}:
                    self._check(half.session, reply.status, reply.body.decode(), begun)
        half.visitor.close()

    @invariant()
    def websockets_stay_as_long_as_they_may(self):
        for one in list(self._websockets):
            session = one.session
            if one.edge in self._suspended or (session.doubtful and not session.ended):
                continue
            over = session.ended or session.until <= time.time()
            lost = one.server.end is None or one.edge not in self._pids
            if over or lost:
                self._websockets.remove(one)
                one.visitor.drain()
                one.visitor.close()
            elif time.time() < session.until - 0.5:
                one.visitor.send(b"ping")
                assert one.visitor.read(4) == b"ping"
