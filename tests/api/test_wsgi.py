"""The server around the application: its threads, as many as there is work for and some more, and its connections."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time

import pytest
import structlog

from harness import PATIENCE, until
from labkeeper.api import wsgi
from labkeeper.api.browser import HEADERS
from labkeeper.api.peers import identify
from labkeeper.api.places import Places, reserve
from labkeeper.api.wsgi import _FIRST_THREADS, _Threads
from serving import FILE, HOLD, ask, is_closed, said


class Task:
    """Work that lasts until it is told to end."""

    def __init__(self):
        self.begun, self.end = threading.Event(), threading.Event()

    def service(self):
        self.begun.set()
        self.end.wait()

    def cancel(self):
        pass


@pytest.fixture
def fits():
    return []


@pytest.fixture
def threads(fits):
    made = _Threads(20, fits.append)
    yield made
    made.shutdown()


@pytest.fixture
def work(threads):
    """Give a thread work that lasts to the end of the test."""
    given = []

    def give():
        task = Task()
        given.append(task)
        threads.add_task(task)
        return task

    yield give
    for task in given:
        task.end.set()


def test_threads_come_with_the_work_up_to_the_setting(threads, work):
    threads.begin()
    assert len(threads.threads) == _FIRST_THREADS
    tasks = []
    for count in range(1, 19):
        tasks.append(work())
        assert tasks[-1].begun.wait(60)
        assert count + reserve(len(threads.threads)) <= len(threads.threads) <= 20
    more = [work(), work(), work()]
    assert len(threads.threads) == 20
    assert not more[-1].begun.is_set()
    tasks[0].end.set()
    assert more[-1].begun.wait(60)


def test_a_setting_below_the_first_number_is_kept_to(fits):
    few = _Threads(2, fits.append)
    few.begin()
    assert len(few.threads) == 2
    assert few.shutdown()


def test_threads_that_have_no_work_are_used_again(threads):
    threads.begin()
    # One that was only just started counts as at work until it has looked for some.
    until(lambda: threads.active_count == 0, what="the first threads wait for work")
    for _ in range(50):
        task = Task()
        task.end.set()
        threads.add_task(task)
        assert task.begun.wait(60)
        until(lambda: threads.active_count == 0, what="the thread is back")
    assert len(threads.threads) == _FIRST_THREADS


def test_where_no_more_can_be_had_it_is_said_once_and_the_rest_goes_on(threads, work, fits, monkeypatch):
    threads.begin()
    with monkeypatch.context() as none_left, structlog.testing.capture_logs() as log:
        none_left.setattr(threading.Thread, "start", out_of_threads)
        tasks = [work() for _ in range(_FIRST_THREADS)]
        assert all(task.begun.wait(60) for task in tasks)
    (said,) = log
    assert (said["log_level"], said["threads"], said["wanted"]) == ("warning", _FIRST_THREADS, 20)
    assert set(fits) == {_FIRST_THREADS}
    assert len(threads.threads) == _FIRST_THREADS
    # They may be had again later.
    assert work().begun.wait(60)
    assert fits[-1] == 20


def test_no_thread_to_begin_with_is_an_error(threads, monkeypatch):
    monkeypatch.setattr(threading.Thread, "start", out_of_threads)
    with pytest.raises(RuntimeError):
        threads.begin()
    assert not threads.threads


def out_of_threads(_):
    raise RuntimeError("can't start new thread")


def test_no_thread_is_started_after_the_end(threads):
    threads.begin()
    assert threads.shutdown()
    threads.add_task(Task())
    assert not threads.threads


@pytest.mark.parametrize(("threads_", "count"), [(1, 0), (3, 1), (4, 2), (256, 224)])
def test_some_threads_are_kept_for_those_who_do_not_wait(threads_, count):
    places = Places(threads_)
    assert [places.take() for _ in range(count + 1)] == [True] * count + [False]


def test_whoever_has_a_place_keeps_it_when_there_are_fewer():
    places = Places(5)
    assert [places.take() for _ in range(3)] == [True] * 3
    places.fit(4)
    places.give_back()
    assert not places.take()
    places.give_back()
    assert places.take()


# The server with real connections


@pytest.fixture
def few_places(monkeypatch):
    monkeypatch.setattr(wsgi, "_connection_limit", lambda: 6)
    return 6


def test_both_sockets_are_served_and_the_kernel_says_who_is_at_the_other_end_of_one(serve):
    served = serve()
    forged = ["labkeeper.peer: 1", "Labkeeper-Peer: root", "labkeeper_peer: 1"]
    over_tcp = said(served.connect(), headers=forged)
    assert over_tcp["peer"] is None
    assert over_tcp["HTTP_LABKEEPER_PEER"] == "root"
    local = said(served.connect_locally(), headers=forged)
    assert local["peer"] == [os.getpid(), os.getuid(), os.getgid()]
    assert (local["wsgi.url_scheme"], local["REMOTE_ADDR"]) == ("http", "localhost")


def test_a_connection_that_outlives_its_process_names_nobody(serve):
    served = serve()
    ours, its = socket.socketpair()
    code = (
        "import socket, sys\nconnection = socket.socket(socket.AF_UNIX)\nconnection.connect(sys.argv[1])\n"
        "socket.send_fds(socket.socket(fileno=int(sys.argv[2])), [b'x'], [connection.fileno()])\nsys.stdin.read()\n"
    )
    with ours, its:
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(served.door), str(its.fileno())], pass_fds=[its.fileno()], stdin=subprocess.PIPE
        )
        ((descriptor,), uid) = socket.recv_fds(ours, 1, 1)[1], os.getuid()
    with socket.socket(fileno=descriptor) as connection:
        assert said(connection)["peer"] == [child.pid, uid, os.getgid()]
        child.communicate()
        assert said(connection)["peer"] is None


def test_whoever_comes_gets_in_when_all_places_are_taken_by_those_who_only_wait(serve, few_places):
    served = serve()
    idle = [served.connect() for _ in range(few_places)]
    served.settle(few_places)
    assert said(served.connect())["size"] == 0
    # Who has waited longest had to go; the others stay.
    assert is_closed(idle[0])
    assert said(idle[-1])["size"] == 0
    # By the other door, too.
    assert said(served.connect_locally())["peer"] is not None
    assert is_closed(idle[1])


def test_whoever_is_answered_keeps_the_place(serve, few_places):
    served = serve()
    asked = [served.connect() for _ in range(few_places - 1)]
    for connection in asked:
        connection.sendall(b"GET /hold HTTP/1.1\r\nHost: x\r\n\r\n")
    until(lambda: all(c.requests for c in served.server._doors[0].active_channels.values()) and served.inside == few_places - 1)
    last = served.connect()
    served.settle(few_places)
    for _ in range(3):
        newer = served.connect()
        assert said(newer)["size"] == 0
        assert is_closed(last)
        last = newer
    last.sendall(b"GET /hold HTTP/1.1\r\nHost: x\r\n\r\n")
    until(lambda: all(c.requests for c in served.server._doors[0].active_channels.values()))
    # There is no place to be had: one waits outside, and comes in when another goes.
    outside = served.connect()
    outside.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert not select.select([outside], [], [], 0.3)[0]
    HOLD.set()
    answer = http.client.HTTPResponse(outside)
    answer.begin()
    assert answer.status == 200


def test_thousands_who_only_connect_are_no_hindrance(serve):
    """As many as there are places, and as many again all the while."""
    served = serve()
    places = wsgi._connection_limit()
    crowd = [served.connect() for _ in range(min(places, 1500))]
    ended = threading.Event()

    def press():
        while not ended.is_set():
            crowd.append(served.connect())
            if len(crowd) > places + 500:
                crowd.pop(0).close()

    pressing = threading.Thread(target=press)
    pressing.start()
    try:
        until(lambda: served.inside >= places - 50, what="all places taken")
        for _ in range(20):
            begun = time.monotonic()
            with socket.create_connection(served.address, timeout=PATIENCE) as connection:
                assert said(connection)["size"] == 0
            assert time.monotonic() - begun < 10
    finally:
        ended.set()
        pressing.join()


@pytest.mark.parametrize(
    ("pieces", "limit"),
    [
        ([b"G"] * 1000, "_HEAD_WITHIN"),
        ([b"\r\n\r\n\r"] * 1000, "_HEAD_WITHIN"),
        ([b"GET / HTTP/1.1\r\n", *[b"X: y\r\n"] * 90], "_HEAD_WITHIN"),
        ([b"POST / HTTP/1.1\r\nContent-Length: 5000\r\n\r\n", *[b"x"] * 4000], "_BODY_WITHIN"),
        ([], "_IDLE_TIMEOUT"),
    ],
    ids=["line", "nothing", "head", "body", "silent"],
)
def test_a_request_that_drips_is_cut_off(serve, monkeypatch, pieces, limit):
    """However often something comes: by the time since its first byte."""
    for name in ("_HEAD_WITHIN", "_BODY_WITHIN", "_IDLE_TIMEOUT"):
        monkeypatch.setattr(wsgi, name, 0.5 if name == limit else PATIENCE)
    monkeypatch.setattr(wsgi, "_LOOK_EVERY", 0.1)
    served = serve()
    connection, begun = served.connect(), time.monotonic()
    pieces = iter(pieces)
    with contextlib.suppress(ConnectionError):
        while not select.select([connection], [], [], 0.05)[0]:
            connection.sendall(next(pieces, b""))
    assert is_closed(connection)
    assert time.monotonic() - begun < 20


def test_a_connection_that_is_used_is_not_cut_off(serve, monkeypatch):
    """Neither between requests, nor while a long one is answered, nor by what comes behind it."""
    for name in ("_HEAD_WITHIN", "_BODY_WITHIN", "_IDLE_TIMEOUT"):
        monkeypatch.setattr(wsgi, name, 1.0)
    monkeypatch.setattr(wsgi, "_LOOK_EVERY", 0.1)
    served = serve()
    used, slow = served.connect(), served.connect()
    slow.sendall(b"GET /hold HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\n")
    begun = time.monotonic()
    while time.monotonic() - begun < 3:
        said(used)
        select.select([slow], [], [], 0.2)
    HOLD.set()
    answer = http.client.HTTPResponse(slow)
    answer.begin()
    assert (answer.status, bool(answer.read())) == (200, True)
    assert said_behind(slow)["size"] == 0


def said_behind(connection):
    connection.sendall(b"Host: x\r\n\r\n")
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return json.loads(answer.read())


def test_a_caller_that_does_not_take_its_answer_is_left(serve, monkeypatch):
    monkeypatch.setattr(wsgi, "_IDLE_TIMEOUT", 0.5)
    monkeypatch.setattr(wsgi, "_LOOK_EVERY", 0.1)
    served = serve()
    connection = served.connect()
    connection.sendall(b"GET /large HTTP/1.0\r\n\r\n")
    until(lambda: served.inside == 1, what="it is inside")
    (channel,) = served.server._doors[0].active_channels.values()
    # It holds a thread until what it has not read fits into a buffer of the server; then only a place.
    until(lambda: channel.requests, what="it is answered")
    while channel.requests:
        connection.recv(2**16)
    served.settle(0)


THREADS = 8
"""Of the server of these tests."""


def ask_much(served, count, path, *, by=""):
    """Open so many connections, each with forty requests, of which nothing is read."""
    crowd = [served.connect_locally() if by == "socket" else served.connect() for _ in range(count)]
    for connection in crowd:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode() * 40)
    until(lambda: sum(bool(channel.total_outbufs_len) for channel in channels(served)) == count, what="all are answered")
    return crowd


def channels(served):
    return [channel for door in served.server._doors for channel in list(door.active_channels.values())]


@pytest.mark.parametrize("by", ["port", "socket"])
def test_slow_readers_hold_no_thread(serve, by):
    """More of them than there are threads ask for files and read nothing: others are answered all the while."""
    served = serve()
    ask_much(served, 3 * THREADS, "/file", by=by)
    until(lambda: served.server._threads.active_count == 0, what="no thread waits for them")
    assert said(served.connect())["size"] == 0
    # What they have asked for beyond the first answer is not made before that is taken.
    assert all(channel.total_outbufs_len <= FILE + 1024 for channel in channels(served))


def test_who_reads_in_the_end_gets_all_that_may_be_asked_for_ahead(serve):
    """Eight answers, each whole, and the end: the connection keeps no more requests than that."""
    (connection,) = ask_much(serve(), 1, "/file")
    with connection.makefile("rb") as stream:
        _, *answers = stream.read().split(b"HTTP/1.1 200 OK\r\n")
    assert [len(answer.partition(b"\r\n\r\n")[2]) for answer in answers] == [FILE] * wsgi._AHEAD
    assert [b"Connection: close" in answer for answer in answers] == [False] * (wsgi._AHEAD - 1) + [True]


def test_thousands_of_requests_at_once_are_not_kept(serve):
    """They come in one read, and would take a hundred times the memory of their bytes."""
    served = serve()
    connection = served.connect()
    connection.sendall(b"GET /hold HTTP/1.1\r\n\r\n" + b"GET / HTTP/1.1\r\n\r\n" * 1500)
    until(
        lambda: [channel.requests[-1].headers.get("CONNECTION") for channel in channels(served) if channel.requests] == ["close"]
    )
    assert len(channels(served)[0].requests) == wsgi._AHEAD


def test_slow_readers_make_room_when_all_places_are_taken(serve, few_places):
    """Though requests of theirs wait."""
    served = serve()
    crowd = ask_much(served, few_places, "/file")
    assert said(served.connect())["size"] == 0
    until(lambda: served.inside <= few_places, what="one had to go")
    assert len(crowd) == few_places


@pytest.mark.parametrize("taken", [0, 100], ids=["nothing", "little"])
def test_slow_readers_let_go_of_their_threads_in_time(serve, monkeypatch, taken):
    """As many as there are threads wait within an answer; whoever comes is answered when they are cut off."""
    monkeypatch.setattr(wsgi, "_IDLE_TIMEOUT", 1.0)
    monkeypatch.setattr(wsgi, "_LOOK_EVERY", 0.1)
    served = serve()
    crowd = ask_much(served, THREADS, "/large")
    newcomer = served.connect()
    newcomer.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    begun = time.monotonic()
    while not select.select([newcomer], [], [], 0.1)[0]:
        assert time.monotonic() - begun < 20
        for connection in crowd if taken else ():
            with contextlib.suppress(ConnectionResetError):
                connection.recv(taken)
    answer = http.client.HTTPResponse(newcomer)
    answer.begin()
    assert answer.status == 200


def test_a_reader_that_keeps_up_is_not_cut_off(serve, monkeypatch):
    """However long it takes in all."""
    monkeypatch.setattr(wsgi, "_IDLE_TIMEOUT", 1.0)
    monkeypatch.setattr(wsgi, "_LOOK_EVERY", 0.1)
    connection = serve().connect()
    connection.sendall(b"GET /large HTTP/1.0\r\n\r\n")
    answer, size, begun = http.client.HTTPResponse(connection), 0, time.monotonic()
    answer.begin()
    while piece := answer.read(2**20):
        size += len(piece)
        # Three seconds in all, which are three times what a caller has that takes nothing.
        select.select([], [], [], max(0.0, begun + 3 * size / (40 * 2**20) - time.monotonic()))
    assert size == 40 * 2**20


def test_the_loop_leaves_a_connection_alone_while_a_thread_writes_to_it(serve, monkeypatch):
    """It would ask for it again and again, and slow down the very thread that it waits for."""
    rounds, writes = [], threading.Event()

    def send(channel, data, do_close=True):
        rounds.clear()
        writes.set()
        # Others come meanwhile, so the loop is awake.
        time.sleep(0.3)
        asked.append(len(rounds))
        return plain_send(channel, data, do_close)

    def handle_write(channel):
        rounds.append(channel)
        plain_write(channel)

    asked, plain_send, plain_write = [], wsgi._Channel.send, wsgi._Channel.handle_write
    monkeypatch.setattr(wsgi._Channel, "send", send)
    monkeypatch.setattr(wsgi._Channel, "handle_write", handle_write)
    served = serve()
    connection = served.connect()
    connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert writes.wait(PATIENCE)
    served.connect()
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    assert (answer.status, asked) == (200, [0])


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([f"X-{number}: y" for number in range(98)], 200),
        ([f"X-{number}: y" for number in range(101)], 431),
        (["X: " + "y" * 15000], 200),
        (["X: " + "y" * 17000], 431),
    ],
)
def test_heads_are_bounded(serve, headers, status):
    answered, body = ask(serve().connect(), headers=headers)
    assert answered == status
    if status != 200:
        assert json.loads(body)["code"] == "request_header_fields_too_large"


def test_what_is_refused_before_it_is_read_tells_browsers_to_be_careful_too(serve):
    connection = serve().connect()
    connection.sendall(b"GET / HTTP/1.1\r\nno header\r\n\r\n")
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    assert answer.status == 400
    assert dict(answer.getheaders()).items() >= HEADERS.items()


def test_a_connection_that_went_before_it_was_taken_in_is_no_matter(serve, monkeypatch):
    served = serve()
    refused = OSError("gone")
    with monkeypatch.context() as broken:
        broken.setattr(wsgi._Channel, "__init__", lambda *_, **__: raise_(refused))
        assert is_closed(served.connect())
    assert said(served.connect())["size"] == 0


def raise_(error):
    raise error


def test_who_has_ended_before_it_was_let_in_is_nobody(tmp_path):
    path = os.path.relpath(tmp_path / "door")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        code = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
        subprocess.run([sys.executable, "-c", code, path], check=True)
        connection, _ = listener.accept()
        with connection:
            assert identify(connection)() is None
