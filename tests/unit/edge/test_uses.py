"""When sessions were last used, as a real edge sees it and reports it."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import time

import pytest

from edge_peers import SWITCH, WEBSOCKET, answer, get
from harness import until
from labkeeper.edge import wire
from labkeeper.edge.report import Report, ReportError
from labkeeper.edge.sessions import Session
from labkeeper.edge.uses import MOST, UseTable

COOKIE = b"Cookie: labkeeper-session=secret"
TARGET = b"/servers/lab/x"
DIGEST = hashlib.sha256(b"secret").hexdigest()


@pytest.fixture
def session(edge):
    """The session of a browser for the Lab."""
    made = Session(DIGEST, "lab", "ada", time.time() + 3600)
    edge.call(edge.proxy.sessions.add, [made])
    edge.call(edge.proxy.uses.tell_all, "keeper-1")
    return made


def report(edge, *, taken=True):
    """Return the next report of an edge, which keepers take or not."""
    told = []

    def tell(message):
        told.append(message["report"])
        return taken

    edge.call(edge.proxy.report, tell)
    return Report.parse(told[0])


def test_a_use_is_reported_once_and_until_a_keeper_takes_it(edge, lab, session):
    assert (report(edge).uses, report(edge).untold) == ([], 0)
    assert edge.connect().ask(get(TARGET, COOKIE)).status == 200
    edge.jump(100.0)
    for taken in (False, True):
        reported = report(edge, taken=taken)
        ((digest, ago),) = reported.uses
        assert (digest, reported.untold, reported.keeper) == (DIGEST, 0, "keeper-1")
        assert 100.0 <= ago < 200.0
    assert report(edge).uses == []


def test_an_open_websocket_is_a_use_that_lasts(edge, lab, session):
    lab.answers(SWITCH)
    client = edge.connect()
    assert client.ask(get(TARGET, COOKIE, *WEBSOCKET)).status == 101
    assert report(edge).uses == [(DIGEST, None)]
    edge.jump(100.0)
    # Nothing has changed.
    assert report(edge).uses == []
    client.close()
    edge.settle(0)
    ((_, ago),) = report(edge).uses
    assert 0 <= ago < 100.0


def test_a_request_is_a_use_while_it_lasts(edge, lab, session):
    lab.answers(None)
    client = edge.send(get(TARGET, COOKIE))
    until(lambda: lab.requests)
    assert report(edge).uses == [(DIGEST, None)]
    edge.call(lab.visits[0].say, answer())
    assert client.receive().status == 200
    until(lambda: not edge.call(lambda: edge.proxy._in_use))
    ((digest, ago),) = report(edge).uses
    assert (digest, ago is None) == (DIGEST, False)


def test_the_next_keeper_is_told_of_all_uses(edge, lab, session):
    assert edge.connect().ask(get(TARGET, COOKIE)).status == 200
    assert len(report(edge).uses) == 1
    edge.call(edge.proxy.uses.tell_all, "keeper-2")
    reported = report(edge)
    assert ([digest for digest, _ in reported.uses], reported.keeper) == ([DIGEST], "keeper-2")
    assert report(edge).uses == []


def test_a_program_uses_no_session_and_one_that_has_ended_is_forgotten(edge, lab, session):
    assert edge.connect().ask(get(TARGET)).status == 200
    assert report(edge).uses == []
    lab.answers(SWITCH)
    assert edge.connect().ask(get(TARGET, COOKIE, *WEBSOCKET)).status == 101
    ended = edge.call(edge.proxy.sessions.end, [DIGEST])
    edge.call(edge.proxy.shut_out, ended)
    until(lambda: not edge.call(lambda: edge.proxy._in_use))
    edge.jump(1.0)
    edge.call(edge.proxy.uses.tell_all, "keeper-2")
    assert report(edge).uses == []


def test_a_keeper_knows_all_uses_once_it_was_told_itself():
    """Not by what the edge has reported before it knew this keeper, nor if something is left."""
    assert Report(untold=0, keeper="own").tells_all("own")
    for report in (
        Report(),
        Report(untold=0),
        Report(untold=0, keeper="other"),
        Report(untold=1, keeper="own"),
        Report(keeper="own"),
    ):
        assert not report.tells_all("own")


def test_many_uses_are_told_in_several_reports():
    table, digests = UseTable(lambda: 0.0), [f"{number:064x}" for number in range(2 * MOST + 1)]
    for digest in digests:
        table.note(digest)
    table.tell_all("keeper-1")
    told, left = [], []
    while table.untold:
        news = table.news(())
        table.told(news)
        told += [digest for digest, _ in news]
        left.append(table.untold)
    assert (told, left) == (digests, [MOST + 1, 1, 0])
    assert table.news(()) == []


def test_the_largest_report_is_sent_as_a_whole_or_not_at_all():
    """Else a keeper that reads nothing for a while could not read what follows."""
    uses = [("f" * 64, 1234567.8)] * MOST
    answers = {(to, f"{kind}xx"): 10**9 for to in ("edge", "keeper", "lab") for kind in range(1, 6)}
    report = Report(10**5, 10**5, 512, 10**5, 10**9, answers, uses, 10**4, "f" * 16)
    frame = wire.encode({"report": report.message()})
    assert 16 * 1024 < len(frame) < 32 * 1024
    edge, keeper = socket.socketpair()
    with edge, keeper:
        for end in (edge, keeper):
            end.setblocking(False)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                edge.sendall(frame)
                sent += 1
        assert sent > 1
        arrived, frames = wire.Frames(), []
        with contextlib.suppress(BlockingIOError):
            while True:
                frames += arrived.feed(keeper.recv(65536))
        assert len(frames) == sent
        edge.sendall(frame)
        assert arrived.feed(keeper.recv(65536)) == frames[:1]


def test_the_report_of_an_earlier_version_says_nothing_of_uses():
    message = Report(1, 2, 3, 4, 5, {}, [("f" * 64, None)], 0, "k").message()
    assert Report.parse(message).uses == [("f" * 64, None)]
    older = {name: message[name] for name in message.keys() - {"uses", "untold", "keeper"}}
    assert (Report.parse(older).uses, Report.parse(older).untold) == ([], None)
    for bad in ({"uses": [1]}, {"uses": [["x", "y"]]}, {"untold": None}, {"keeper": 1}):
        with pytest.raises(ReportError):
            Report.parse(message | bad)
