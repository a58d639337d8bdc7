"""The keeper's side of the edge in processes that can be killed at any moment, and its clients.

`python edge_keepers.py` is a process that has imported all that a keeper needs, and forks one for
each socket that it receives: so a keeper takes milliseconds to start. It has the real store, the
real sessions and tokens, and the real supervisor of the edge. There is no fleet: the test says what
has become of its servers, and a keeper stores and publishes that as a fleet would. `Nursery` is the
test's side.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
import types
from pathlib import Path

import flask

from harness import PATIENCE
from labkeeper.api.handlers import access
from labkeeper.core.access import EVERYTHING, Scope
from labkeeper.core.controller import Controller
from labkeeper.core.errors import LabkeeperError, ServerNotFound
from labkeeper.core.lifecycle import Event, Goal, State
from labkeeper.core.messages import Change
from labkeeper.core.policy import Policy
from labkeeper.core.server import Endpoint, Snapshot
from labkeeper.events.log import EventLog
from labkeeper.forkserver.programs import adopt_orphans, end_programs
from labkeeper.identity.sessions import Sessions
from labkeeper.identity.tokens import OWNER, Tokens
from labkeeper.lab_addresses import LabAddresses
from labkeeper.runtime import SystemClock
from labkeeper.schema.queries import TokenPath
from labkeeper.serve.edge import instances as edge_instances
from labkeeper.serve.edge import supervisor
from labkeeper.serve.edge.instances import Instances
from labkeeper.serve.edge.link import Link
from labkeeper.serve.edge.supervisor import Answering, running
from labkeeper.serve.listening import listen
from labkeeper.serve.process import LOCK
from labkeeper.store.queries import SqliteStore
from labkeeper.testing.fakes import a_spec
from labkeeper.threads import ThreadGroup

KEEPERS_LABS = LabAddresses("path")
LARGEST = 64 * 1024
"""Bytes of a message between the test and a keeper."""


class Keeper:
    """A keeper, without a fleet and without an API."""

    def __init__(self, stack, directory, *, port, build):
        directory = Path(directory)
        lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        self.store, self.clock = SqliteStore(directory / "labkeeper.sqlite"), SystemClock()
        self.dies_at, self.dies_in = "", 0
        for act in ("save_session", "forget_sessions", "forget_token"):
            setattr(self.store, act, self._watched(act, getattr(self.store, act)))
        Link.command = self._watched("command", Link.command)
        events = EventLog(self.store, self.clock, size=100)
        self.tokens = Tokens(self.store, self.clock, events, owner=None)
        self.instances = Instances(directory, directory / "run", ("127.0.0.1", port))
        self.instances.build = build
        answering = Answering(KEEPERS_LABS, [], [], access_log=False, longest_body=2**20)
        self.edge = stack.enter_context(
            running(self.instances, answering, listen, ends=lambda: False)
        )
        self.sessions = Sessions(
            self.store, self.clock, events, self.edge.set_sessions, stands=self.tokens.stands
        )
        self.snapshots = {}
        for snapshot in self.store.load():
            found = Controller.recovered(snapshot, Policy(), self.clock)
            self._commit(found.event, None, found.after.snapshot)
            self._forget_deleted(snapshot)
        self.edge.supervise(ThreadGroup(), self.sessions.observe)

    def _watched(self, what, act):
        """Return `act`, with the points before and after it at which this process may die."""

        @functools.wraps(act)
        def watched(*arguments):
            self._reach(f"before {what}")
            result = act(*arguments)
            self._reach(f"after {what}")
            return result

        return watched

    def _reach(self, point):
        if point == self.dies_at:
            self.dies_in -= 1
            if self.dies_in == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    # Servers, as a fleet changes them

    def _commit(self, event, before, after):
        self.snapshots[after.qualified_name] = after
        change = Change(event, before, after, self.clock.time())
        self.sessions.changed(change)
        self.edge.changed(change)

    def _change(self, event, name, **changed):
        before = self.snapshots.get(name)
        if before is None:
            now = self.clock.time()
            before = Snapshot(a_spec(name), State.STOPPED, Goal.UP, now, now)
        after = dataclasses.replace(before, **changed)
        self.store.save(after)
        self._commit(event, before, after)

    def starts(self, name, generation):
        self._change(Event.START, name, state=State.STARTING, generation=generation, endpoint=None)

    def runs(self, name, port):
        """It is ready; or an observation has found it."""
        base = f"/servers/{name}/"
        url = f"http://127.0.0.1:{port}{base}"
        endpoint = Endpoint(
            url, "token", base, "127.0.0.1", port, False, False, "/", behind_edge=True
        )
        self._change(Event.READY, name, state=State.RUNNING, endpoint=endpoint)

    def ends(self, name):
        self._change(Event.EXITED, name, state=State.STOPPED, endpoint=None)

    def deletes(self, name):
        if name not in self.snapshots:
            raise ServerNotFound.called(name)
        self._change(Event.DELETE, name, state=State.STOPPED, goal=Goal.ABSENT, endpoint=None)
        self._forget_deleted(self.snapshots[name])

    def _forget_deleted(self, snapshot):
        if snapshot.forgotten:
            del self.snapshots[snapshot.qualified_name]
            self.store.forget(snapshot.qualified_name)

    # Sessions and tokens

    def make_token(self, name):
        return self.tokens.make(name, Scope.MANAGE, EVERYTHING, lifetime=None)[1]

    def make_session(self, server, token, lifetime):
        """Begin a session, as the handler of a link does that the token has made."""
        caller, valid = self.tokens.caller(token)
        session, cookie = self.sessions.make(
            server, caller.actor, until=self.clock.time() + lifetime, still_valid=valid
        )
        return {"id": session.id, "cookie": cookie, "until": session.expires_at}

    def revoke(self, session):
        self.sessions.revoke(session)

    def revoke_token(self, name):
        """By the handler of the API."""
        services = types.SimpleNamespace(tokens=self.tokens, sessions=self.sessions)
        with flask.Flask("test").test_request_context():
            flask.g.caller, flask.g.request_id = OWNER, "test"
            access.revoke_token(services, TokenPath(name=name))

    # The edge

    def edges(self):
        with self.edge._lock:
            links = [self.edge._link, *self.edge._ending]
        return [link.process.pid for link in links]

    def suspects(self):
        """The edge has been silent for long."""
        self.edge._link.heard.at -= 1000

    def obey(self, connection):
        """Execute commands until the test closes the connection."""
        while data := connection.recv(LARGEST):
            command = json.loads(data)
            self.dies_at, self.dies_in = command.get("dies") or ("", 0)
            try:
                result = {"done": getattr(self, command["do"])(*command["with"])}
            except LabkeeperError as error:
                result = {"failed": type(error).__name__}
            connection.send(json.dumps(result).encode())


def run_keeper(connection, options):
    """Be a keeper; only its death ends it."""
    # An edge that is suspended is noticed at once, if the keeper is told to suspect it.
    supervisor.REPORT_EVERY, supervisor._LAST_CHANCE = 0.05, 0.05
    edge_instances._ANSWER_WITHIN = 2.0
    with contextlib.ExitStack() as stack:
        keeper = Keeper(stack, **options)
        connection.send(b'{"done": null}')
        keeper.obey(connection)
        os._exit(0)


def main():
    """Fork keepers until the test closes the connection; then end all that is left of them."""
    adopt_orphans()
    control = socket.socket(fileno=int(sys.argv[1]))

    def reap(*_):
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    signal.signal(signal.SIGCHLD, reap)
    while True:
        data, files, _, _ = socket.recv_fds(control, LARGEST, 1)
        if not data:
            break
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            control.close()
            try:
                run_keeper(socket.socket(fileno=files[0]), json.loads(data))
            finally:
                traceback.print_exc()
                os._exit(1)
        os.close(files[0])
        control.send(b"%d" % pid)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    end_programs()


class KeeperDiedError(Exception):
    """The keeper has not answered: whether it has done what it was told is unknown."""


class RefusedError(Exception):
    """The keeper has refused; the message is the kind of the error."""


class KeeperProcess:
    """A keeper, as its test sees it."""

    def __init__(self, pid, connection):
        self.pid = pid
        self._connection = connection

    def ask(self, do, *arguments, dies=None):
        """Return what a command returns. With `dies`, the keeper dies at a point: (which, nth)."""
        self._connection.send(json.dumps({"do": do, "with": arguments, "dies": dies}).encode())
        return self.answer()

    def answer(self):
        data = self._connection.recv(LARGEST)
        if not data:
            self.close()
            raise KeeperDiedError
        answer = json.loads(data)
        if "failed" in answer:
            raise RefusedError(answer["failed"])
        return answer["done"]

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        # Its end of the connection is closed when it has ended.
        while self._connection.recv(LARGEST):
            pass
        self.close()

    def close(self):
        self._connection.close()


class Nursery:
    """Starts keepers."""

    def __init__(self, log):
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(PATIENCE)
        with theirs, log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdout=output,
                stderr=output,
            )

    def keeper(self, directory, *, port, build):
        """Start a keeper, and return when it serves."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(PATIENCE)
        options = {"directory": str(directory), "port": port, "build": build}
        with theirs:
            socket.send_fds(self._control, [json.dumps(options).encode()], [theirs.fileno()])
        keeper = KeeperProcess(int(self._control.recv(LARGEST)), ours)
        keeper.answer()
        return keeper

    def close(self):
        """End all keepers and edges."""
        self._control.close()
        self._process.wait(PATIENCE)


if __name__ == "__main__":
    main()
