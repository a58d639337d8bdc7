"""The keeper's side of a real edge: it is replaced when it dies or falls silent, and counted."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import signal
import socket
import struct
import sys
import time
from pathlib import Path

import httpx
import pytest

from edge_peers import Visitor
from harness import PATIENCE, alive, until
from labkeeper.core.access import Session
from labkeeper.edge.routes import Route
from labkeeper.lab_addresses import LabAddresses
from labkeeper.serve.edge import instances, supervisor
from labkeeper.serve.edge.supervisor import Answering

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the edge needs Linux")


def ask(edge, host="x"):
    """Return the status of a probe of the edge."""
    port = edge.public.getsockname()[1]
    url = f"http://127.0.0.1:{port}/servers/ghost/api"
    return httpx.get(url, headers={"Host": host}, trust_env=False, timeout=PATIENCE).status_code


def pid_of(edge):
    return edge._link.process.pid


def test_many_connections_can_wait_for_the_edge(run):
    """Those that it accepts at once are few."""
    with run() as edge:
        assert ask(edge) == 401
        told = edge.public.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
        # The length of a listening socket's queue is where others have a count (tcp(7)).
        (length,) = struct.unpack_from("I", told, 28)
        most = int(Path("/proc/sys/net/core/somaxconn").read_text())
        assert length == min(1024, most)


def test_an_edge_that_is_suspended_is_replaced(run, monkeypatch):
    monkeypatch.setattr(supervisor, "REPORT_EVERY", 0.05)
    monkeypatch.setattr(supervisor, "_LAST_CHANCE", 0.05)
    with run() as edge:
        assert ask(edge) == 401
        before = pid_of(edge)
        os.kill(before, signal.SIGSTOP)
        # As if it had been silent for long.
        edge._link.heard.at -= 1000
        until(lambda: pid_of(edge) != before, what="another edge")
        until(lambda: not alive(before), what="the end of the suspended one")
        assert ask(edge) == 401
        assert edge.use().restarts == 1


def test_an_edge_has_ended_before_another_one_is_started(run, monkeypatch):
    """A suspended one would go on with the sessions that it knew, at the same address."""
    monkeypatch.setattr(supervisor, "REPORT_EVERY", 0.05)
    monkeypatch.setattr(supervisor, "_LAST_CHANCE", 0.05)
    with run() as edge:
        before, start, ran = pid_of(edge), edge._instances.start, []

        def start_another(public):
            ran.append(alive(before))
            return start(public)

        monkeypatch.setattr(edge._instances, "start", start_another)
        os.kill(before, signal.SIGSTOP)
        edge._link.heard.at -= 1000
        until(lambda: pid_of(edge) != before, what="another edge")
        assert ran == [False]


def begun_request(edge, cookie):
    """Return a client that has sent the beginning of a request with a session's cookie."""
    client = Visitor(edge.public.getsockname())
    client.send(b"GET /servers/lab/ HTTP/1.1\r\nHost: x\r\n")
    client.send(b"Cookie: labkeeper-session=%b\r\n" % cookie)
    return client


@pytest.mark.parametrize("drains", [False, True])
def test_an_edge_that_takes_no_command_serves_nobody_any_more(run, monkeypatch, drains):
    """It may have missed that a session has ended."""
    digest = hashlib.sha256(b"secret").hexdigest()
    session = Session("id", digest, "lab", "token:ada", 0.0, time.time() + 3600)
    many = [
        dataclasses.replace(session, digest=hashlib.sha256(b"%d" % number).hexdigest())
        for number in range(5000)
    ]
    with contextlib.ExitStack() as stack:
        first = contextlib.ExitStack()
        edge = first.enter_context(run(ends=not drains))
        edge.set_sessions([session], [])
        before = pid_of(edge)
        client = stack.enter_context(contextlib.closing(begun_request(edge, b"secret")))
        if drains:
            first.close()
            monkeypatch.setattr(instances, "_build", lambda: "another")
            edge = stack.enter_context(run())
            assert [link.process.pid for link in edge._ending] == [before]
        stack.enter_context(first)
        os.kill(before, signal.SIGSTOP)
        edge.set_sessions(many, [session])
        with contextlib.suppress(ProcessLookupError):
            os.kill(before, signal.SIGCONT)
        # It is reset if the edge had not read all of it when it was killed.
        with contextlib.suppress(ConnectionError):
            client.send(b"\r\n")
        # Nothing, or the answer of the next edge if it had not been accepted.
        assert client.drain()[0].partition(b"\r\n")[0] in {b"", b"HTTP/1.1 401 Unauthorized"}
        until(lambda: not alive(before), what="its end")
    if drains:
        os.waitpid(before, 0)


def test_an_edge_that_was_suspended_with_its_keeper_is_kept(run, monkeypatch):
    monkeypatch.setattr(supervisor, "REPORT_EVERY", 0.05)
    with run() as edge:
        before = pid_of(edge)
        edge._link.heard.at -= 1000
        until(lambda: edge._link.heard.at > time.monotonic() - 1000, what="its next report")
        assert (pid_of(edge), edge.use().restarts) == (before, 0)


def test_what_edges_have_done_is_counted_beyond_their_ends(run):
    with run() as edge:
        assert [ask(edge), ask(edge, "ours.example"), ask(edge, "other.example")] == [401, 401, 421]
        until(lambda: edge.use().answers == {("edge", "4xx"): 3}, what="a report")
        before = pid_of(edge)
        os.kill(before, signal.SIGKILL)
        until(lambda: pid_of(edge) != before, what="another edge")
        assert ask(edge) == 401
        until(lambda: edge.use().answers == {("edge", "4xx"): 4}, what="another report")
        assert (edge.use().held, edge.use().refused, edge.use().restarts) == (0, 0, 1)


def test_the_next_keeper_goes_on_counting_and_logging(run, tmp_path):
    log = tmp_path / "logs" / "_access.log"
    with run(ends=False) as edge:
        assert ask(edge) == 401
        until(lambda: edge.use().answers, what="a report")
        pid = pid_of(edge)
    quiet = Answering(LabAddresses("path"), [], [], access_log=False, longest_body=1)
    with run(quiet) as edge:
        assert not os.get_blocking(edge.public.fileno())
        until(lambda: edge.use().answers == {("edge", "4xx"): 1}, what="a report")
        until(lambda: ask(edge, "ours.example") == 421, what="the new names")
        lines = log.read_text().count("\n")
        assert ask(edge) == 401
    assert lines == log.read_text().count("\n")
    # It was this process, in its first role, that started it.
    os.waitpid(pid, 0)


def test_the_access_log_is_rotated(run, tmp_path):
    log = tmp_path / "logs" / "_access.log"
    with run(log_max_bytes=1024) as edge:
        while not log.exists() or log.stat().st_size <= 1024:
            ask(edge)
        until((tmp_path / "logs" / "_access.log.1").exists, what="a rotation")
        assert (ask(edge), ask(edge)) == (401, 401)
        until(lambda: b'"status": 401' in log.read_bytes(), what="lines after it")


ADA = Session(
    "a1", hashlib.sha256(b"ada").hexdigest(), "lab", "token:ada", time.time(), time.time() + 3600
)
ROUTE = {"host": "127.0.0.1", "port": 1, "base_url": "/servers/lab/", "key": "key"}
"""Nothing listens there."""


class Observed:
    """What was observed of the uses of sessions."""

    def __init__(self):
        self.used = {}
        self.complete = []

    def __call__(self, used, *, complete):
        self.used |= used
        self.complete.append(complete)

    @property
    def is_complete(self):
        return bool(self.complete) and self.complete[-1]


def use(edge):
    """Send a request of a browser with a session."""
    with edge._lock:
        edge._routes["lab"] = Route("lab", 1, **ROUTE)
        edge._tell({"do": "route", "route": {"server": "lab", "generation": 1, **ROUTE}})
    port = edge.public.getsockname()[1]
    url = f"http://127.0.0.1:{port}/servers/lab/api"
    cookie = {"Cookie": "labkeeper-session=ada"}
    assert httpx.get(url, headers=cookie, trust_env=False, timeout=PATIENCE).status_code == 502


def test_uses_of_sessions_are_observed_until_all_are_known(run):
    observed = Observed()
    with run(observe=observed) as edge:
        edge.set_sessions([ADA], [])
        until(lambda: observed.is_complete, what="a report")
        assert (observed.used, edge.was_found) == ({}, False)
        use(edge)
        until(lambda: observed.used, what="a report of it")
        assert observed.used.keys() == {ADA.digest}
        assert 0.0 <= observed.used[ADA.digest] <= PATIENCE
        # Another edge knows nothing of what the one before has seen.
        os.kill(pid_of(edge), signal.SIGKILL)
        until(lambda: edge.use().restarts, what="another edge")
        observed.complete.clear()
        until(lambda: observed.is_complete, what="its report")


def test_the_next_keeper_hears_of_all_uses_before_it_judges(run):
    with run(observe=Observed(), ends=False) as edge:
        edge.set_sessions([ADA], [])
        use(edge)
        pid = pid_of(edge)
    observed = Observed()
    with run(observe=observed) as edge:
        edge.set_sessions([ADA], [])
        until(lambda: observed.is_complete, what="a report")
        assert edge.was_found
        assert observed.used.keys() == {ADA.digest}
    os.waitpid(pid, 0)
