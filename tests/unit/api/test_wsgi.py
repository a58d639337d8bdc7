"""The WSGI server: threads, connection limits, timeouts, slow readers, HTTP parsing, bodies."""

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

import pytest
import structlog

from harness import PATIENCE, until
from labkeeper.api.browser import HEADERS
from labkeeper.api.concurrency import ConcurrencyLimit, reserve
from labkeeper.api.wsgi import server
from labkeeper.api.wsgi.channel import _BODY_WITHIN, _HEAD_WITHIN, _IDLE_TIMEOUT, AHEAD, Channel
from labkeeper.api.wsgi.parser import IN_MEMORY
from labkeeper.api.wsgi.threads import _FIRST_THREADS, Threads
from labkeeper.identity.peers import identify
from serving import FILE, HOLD, ask, ask_json, is_closed


class Task:
    """A task that lasts until the test ends it."""

    def __init__(self):
        self.begun, self.end = threading.Event(), threading.Event()

    def service(self):
        self.begun.set()
        self.end.wait()

    def cancel(self):
        pass


@pytest.fixture
def capacities():
    return []


@pytest.fixture
def threads(capacities):
    made = Threads(20, capacities.append)
    yield made
    made.shutdown()


@pytest.fixture
def work(threads):
    """Give a thread a task that lasts until the end of the test."""
    given = []

    def give():
        task = Task()
        given.append(task)
        threads.add_task(task)
        return task

    yield give
    for task in given:
        task.end.set()


def test_threads_are_started_with_the_load_up_to_the_limit(threads, work):
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


def test_a_limit_below_the_initial_number_is_respected(capacities):
    few = Threads(2, capacities.append)
    few.begin()
    assert len(few.threads) == 2
    assert few.shutdown()


def test_idle_threads_are_reused(threads):
    threads.begin()
    # A new thread counts as active until it has looked for a task.
    until(lambda: threads.active_count == 0, what="the first threads to be idle")
    for _ in range(50):
        task = Task()
        task.end.set()
        threads.add_task(task)
        assert task.begun.wait(60)
        until(lambda: threads.active_count == 0, what="the thread to be idle again")
    assert len(threads.threads) == _FIRST_THREADS


def test_without_more_threads_the_pool_warns_once_and_continues(
    threads, work, capacities, monkeypatch
):
    threads.begin()
    with monkeypatch.context() as none_left, structlog.testing.capture_logs() as log:
        none_left.setattr(threading.Thread, "start", out_of_threads)
        tasks = [work() for _ in range(_FIRST_THREADS)]
        assert all(task.begun.wait(60) for task in tasks)
    (entry,) = log
    assert (entry["log_level"], entry["threads"], entry["wanted"]) == (
        "warning",
        _FIRST_THREADS,
        20,
    )
    assert set(capacities) == {_FIRST_THREADS}
    assert len(threads.threads) == _FIRST_THREADS
    # More threads may be available later.
    assert work().begun.wait(60)
    assert capacities[-1] == 20


def test_without_any_thread_starting_fails(threads, monkeypatch):
    monkeypatch.setattr(threading.Thread, "start", out_of_threads)
    with pytest.raises(RuntimeError):
        threads.begin()
    assert not threads.threads


def out_of_threads(_):
    raise RuntimeError("can't start new thread")


def test_no_thread_is_started_after_shutdown(threads):
    threads.begin()
    assert threads.shutdown()
    threads.add_task(Task())
    assert not threads.threads


@pytest.mark.parametrize(("threads_", "count"), [(1, 0), (3, 1), (4, 2), (256, 224)])
def test_some_threads_are_reserved_for_requests_that_do_not_wait(threads_, count):
    limit = ConcurrencyLimit(threads_)
    assert [limit.acquire() for _ in range(count + 1)] == [True] * count + [False]


def test_shrinking_the_limit_does_not_affect_current_holders():
    limit = ConcurrencyLimit(5)
    assert [limit.acquire() for _ in range(3)] == [True] * 3
    limit.resize(4)
    limit.release()
    assert not limit.acquire()
    limit.release()
    assert limit.acquire()


# With real connections


@pytest.fixture
def few_connections(monkeypatch):
    monkeypatch.setattr(server, "_connection_limit", lambda: 6)
    return 6


def test_tcp_and_unix_socket_are_served_and_unix_peers_identified_by_the_kernel(serve):
    served = serve()
    forged = ["labkeeper.peer: 1", "Labkeeper-Peer: root", "labkeeper_peer: 1"]
    over_tcp = ask_json(served.connect(), headers=forged)
    assert over_tcp["peer"] is None
    assert over_tcp["HTTP_LABKEEPER_PEER"] == "root"
    local = ask_json(served.connect_locally(), headers=forged)
    assert local["peer"] == [os.getpid(), os.getuid(), os.getgid()]
    assert (local["wsgi.url_scheme"], local["REMOTE_ADDR"]) == ("http", "localhost")


def test_a_connection_that_outlives_its_process_has_no_peer(serve):
    served = serve()
    ours, its = socket.socketpair()
    code = (
        "import socket, sys\n"
        "connection = socket.socket(socket.AF_UNIX)\n"
        "connection.connect(sys.argv[1])\n"
        "socket.send_fds(socket.socket(fileno=int(sys.argv[2])), [b'x'], [connection.fileno()])\n"
        "sys.stdin.read()\n"
    )
    with ours, its:
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(served.door), str(its.fileno())],
            pass_fds=[its.fileno()],
            stdin=subprocess.PIPE,
        )
        ((descriptor,), uid) = socket.recv_fds(ours, 1, 1)[1], os.getuid()
    with socket.socket(fileno=descriptor) as connection:
        assert ask_json(connection)["peer"] == [child.pid, uid, os.getgid()]
        child.communicate()
        assert ask_json(connection)["peer"] is None


def test_at_the_connection_limit_an_idle_connection_is_closed_for_a_new_one(serve, few_connections):
    served = serve()
    idle = [served.connect() for _ in range(few_connections)]
    served.settle(few_connections)
    assert ask_json(served.connect())["size"] == 0
    # The one that has waited longest is closed; the others stay.
    assert is_closed(idle[0])
    assert ask_json(idle[-1])["size"] == 0
    # On the Unix socket, too.
    assert ask_json(served.connect_locally())["peer"] is not None
    assert is_closed(idle[1])


def test_a_connection_with_a_request_in_progress_is_not_closed_for_a_new_one(
    serve, few_connections
):
    served = serve()
    asked = [served.connect() for _ in range(few_connections - 1)]
    for connection in asked:
        connection.sendall(b"GET /hold HTTP/1.1\r\nHost: x\r\n\r\n")
    until(
        lambda: (
            all(c.requests for c in served.server._doors[0].active_channels.values())
            and served.inside == few_connections - 1
        )
    )
    last = served.connect()
    served.settle(few_connections)
    for _ in range(3):
        newer = served.connect()
        assert ask_json(newer)["size"] == 0
        assert is_closed(last)
        last = newer
    last.sendall(b"GET /hold HTTP/1.1\r\nHost: x\r\n\r\n")
    until(lambda: all(c.requests for c in served.server._doors[0].active_channels.values()))
    # No connection can be closed: a new one waits until another ends.
    outside = served.connect()
    outside.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    wait_for_rounds(served.server, 3)
    assert served.inside == few_connections
    assert not select.select([outside], [], [], 0)[0]
    HOLD.set()
    answer = http.client.HTTPResponse(outside)
    answer.begin()
    assert answer.status == 200


def wait_for_rounds(server, count):
    """Wait until the server's loop has gone round; three times to deal with all that is pending.

    The first round may have begun before, and the second may meet the trigger before a socket.
    """
    for _ in range(count):
        met = threading.Event()
        server._doors[0].trigger.pull_trigger(met.set)
        assert met.wait(PATIENCE)


def test_thousands_of_idle_connections_do_not_block_requests(serve):
    """As many as the limit allows, and more all the time."""
    served = serve()
    connection_limit = server._connection_limit()
    crowd = [served.connect() for _ in range(min(connection_limit, 1500))]
    ended = threading.Event()

    def press():
        while not ended.is_set():
            crowd.append(served.connect())
            if len(crowd) > connection_limit + 500:
                crowd.pop(0).close()

    pressing = threading.Thread(target=press)
    pressing.start()
    try:
        until(lambda: served.inside >= connection_limit - 50, what="connections up to the limit")
        for _ in range(20):
            with socket.create_connection(served.address, timeout=PATIENCE) as connection:
                assert ask_json(connection)["size"] == 0
    finally:
        ended.set()
        pressing.join()


@pytest.mark.parametrize(
    ("first", "next_", "limit"),
    [
        (b"G", b"G", _HEAD_WITHIN),
        (b"\r\n\r\n\r", b"\r\n\r\n\r", _HEAD_WITHIN),
        (b"GET / HTTP/1.1\r\n", b"X: y\r\n", _HEAD_WITHIN),
        (b"POST / HTTP/1.1\r\nContent-Length: 5000\r\n\r\n", b"x", _BODY_WITHIN),
        (b"", b"", _IDLE_TIMEOUT),
    ],
    ids=["line", "nothing", "head", "body", "silent"],
)
def test_a_slow_request_is_cut_off(clock, serve, first, next_, limit):
    """By the time since its first byte, however often bytes arrive."""
    served = serve()
    connection = served.connect()
    served.settle(1)
    (channel,) = channels(served)
    connection.sendall(first)
    until(lambda: not first or channel._begun is not None, what="the server to read the first byte")
    for _ in range(3):
        clock.jump(limit * 0.3)
        connection.sendall(next_)
        assert ask_json(served.connect())["size"] == 0  # The server has checked its timeouts since.
    assert not select.select([connection], [], [], 0)[0]
    clock.jump(limit * 0.2)
    assert is_closed(connection)


def test_a_connection_in_use_is_not_cut_off(clock, serve):
    """Neither between requests, nor during a long response, nor by a pipelined request."""
    served = serve()
    used, slow = served.connect(), served.connect()
    slow.sendall(b"GET /hold HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\n")
    for _ in range(20):
        ask_json(used)
        clock.jump(_HEAD_WITHIN * 0.6)
    HOLD.set()
    answer = http.client.HTTPResponse(slow)
    answer.begin()
    assert (answer.status, bool(answer.read())) == (200, True)
    assert said_next(slow)["size"] == 0


def test_a_client_that_reads_each_response_never_counts_as_slow(clock, serve, monkeypatch):
    """Even if each check happens just when a response is complete but not yet read."""
    served = serve()
    connection = served.connect()
    ask_json(connection)
    (channel,) = channels(served)
    monkeypatch.setattr(server, "_LOOK_EVERY", 1e9)
    clock.jump(_IDLE_TIMEOUT / 2)
    ask_json(connection)  # The loop has checked for the last time.
    clock.jump(2 * _IDLE_TIMEOUT)
    ask_json(connection)
    assert channel._keeping_up[0] == clock.monotonic()


def said_next(connection):
    connection.sendall(b"Host: x\r\n\r\n")
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return json.loads(answer.read())


THREADS = 8
"""Of the server under test."""


def ask_much(served, count, path, *, by=""):
    """Open connections, each with forty requests, and read no response."""
    crowd = [served.connect_locally() if by == "socket" else served.connect() for _ in range(count)]
    for connection in crowd:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode() * 40)
    until(
        lambda: sum(bool(channel.total_outbufs_len) for channel in channels(served)) == count,
        what="all responses to be buffered",
    )
    return crowd


def channels(served):
    return [
        channel for door in served.server._doors for channel in list(door.active_channels.values())
    ]


@pytest.mark.parametrize("by", ["port", "socket"])
def test_slow_readers_occupy_no_thread(serve, by):
    """More of them than threads request files and read nothing; other requests are answered."""
    served = serve()
    ask_much(served, 3 * THREADS, "/file", by=by)
    until(lambda: served.server._threads.active_count == 0, what="all threads to be idle")
    assert ask_json(served.connect())["size"] == 0
    # Further responses are not produced before the first is read.
    assert all(channel.total_outbufs_len <= FILE + 1024 for channel in channels(served))


def test_a_late_reader_receives_all_pipelined_responses(serve):
    """The connection accepts only `_AHEAD` requests, and is closed after the last response."""
    (connection,) = ask_much(serve(), 1, "/file")
    with connection.makefile("rb") as stream:
        _, *answers = stream.read().split(b"HTTP/1.1 200 OK\r\n")
    assert [len(answer.partition(b"\r\n\r\n")[2]) for answer in answers] == [FILE] * AHEAD
    assert [b"Connection: close" in answer for answer in answers] == [False] * (AHEAD - 1) + [True]


def test_thousands_of_pipelined_requests_are_not_kept(serve):
    """They arrive in one read, and would take a hundred times the memory of their bytes."""
    served = serve()
    connection = served.connect()
    connection.sendall(b"GET /hold HTTP/1.1\r\n\r\n" + b"GET / HTTP/1.1\r\n\r\n" * 1500)
    until(
        lambda: (
            [
                channel.requests[-1].headers.get("CONNECTION")
                for channel in channels(served)
                if channel.requests
            ]
            == ["close"]
        )
    )
    assert len(channels(served)[0].requests) == AHEAD


def test_slow_readers_are_closed_at_the_connection_limit(serve, few_connections):
    """Despite their pending requests."""
    served = serve()
    crowd = ask_much(served, few_connections, "/file")
    assert ask_json(served.connect())["size"] == 0
    until(lambda: served.inside <= few_connections, what="one connection to be closed")
    assert len(crowd) == few_connections


def test_a_client_that_never_reads_is_disconnected(clock, serve):
    """Even if its thread has finished because the server buffers the rest of the response."""
    served = serve()
    ask_much(served, 1, "/file")
    (channel,) = channels(served)
    until(lambda: channel._held, what="the thread to leave the rest to the loop")
    # Bytes in the sockets' buffers count as read at the first check; after that, nothing is read.
    until(
        lambda: clock.jump(_IDLE_TIMEOUT + 1) or not served.inside,
        what="the client to be disconnected",
    )


def test_slow_readers_are_disconnected_if_too_much_output_is_unread_in_total(
    clock, serve, monkeypatch
):
    """Those idle for longest first. Unread output takes memory and descriptors."""
    served = serve()
    ask_much(served, 1, "/file")
    clock.jump(server._LOOK_EVERY + 1)
    for count in (2, 3, 4):
        served.connect().sendall(b"GET /file HTTP/1.1\r\nHost: x\r\n\r\n" * 40)
        served.settle(count)
    first, *others = channels(served)
    until(
        lambda: all(channel._held for channel in (first, *others)),
        what="all threads to leave the rest to the loop",
    )
    clock.jump(server._LOOK_EVERY + 1)
    assert ask_json(served.connect())["size"] == 0  # The server has checked since.
    assert not any(channel.will_close for channel in (first, *others))
    most = sum(channel.total_outbufs_len for channel in others) + first.total_outbufs_len // 2
    monkeypatch.setattr(server, "_UNTAKEN_OF_ALL", most)
    clock.jump(server._LOOK_EVERY + 1)
    until(lambda: not first.connected, what="the first client to be disconnected")
    assert ask_json(served.connect())["size"] == 0
    assert all(channel.connected for channel in others)


@pytest.mark.parametrize("taken", [0, 100], ids=["nothing", "little"])
def test_slow_readers_release_their_threads_in_time(clock, serve, taken):
    """All threads stall within a response; a new request is answered after the cut-off."""
    served = serve()
    crowd = ask_much(served, THREADS, "/large")
    newcomer = served.connect()
    newcomer.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    while not select.select([newcomer], [], [], 0.1)[0]:
        clock.jump(_IDLE_TIMEOUT * 0.3)
        for connection in crowd if taken else ():
            with contextlib.suppress(ConnectionResetError):
                connection.recv(taken)
    answer = http.client.HTTPResponse(newcomer)
    answer.begin()
    assert answer.status == 200


def test_a_reader_that_keeps_up_is_not_cut_off(clock, serve):
    """Here it takes twice as long as a client that reads nothing may."""
    connection = serve().connect()
    connection.sendall(b"GET /large HTTP/1.0\r\n\r\n")
    answer, size = http.client.HTTPResponse(connection), 0
    answer.begin()
    while piece := answer.read(2**20):
        size += len(piece)
        clock.jump(len(piece) * 2 * _IDLE_TIMEOUT / (40 * 2**20))
    assert size == 40 * 2**20


def test_the_loop_ignores_a_connection_while_a_thread_writes_to_it(serve, monkeypatch):
    """It would poll it constantly, and slow down that thread."""
    rounds, writes = [], threading.Event()

    def send(channel, data, do_close=True):
        rounds.clear()
        writes.set()
        # Other connections keep the loop awake.
        until(lambda: served.inside == 3, what="the other connections to be accepted")
        asked.append(len(rounds))
        return plain_send(channel, data, do_close)

    def handle_write(channel):
        rounds.append(channel)
        plain_write(channel)

    asked, plain_send, plain_write = [], Channel.send, Channel.handle_write
    monkeypatch.setattr(Channel, "send", send)
    monkeypatch.setattr(Channel, "handle_write", handle_write)
    served = serve()
    connection = served.connect()
    connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert writes.wait(PATIENCE)
    for count in (2, 3):
        served.connect()
        served.settle(count)
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    assert (answer.status, set(asked)) == (200, {0})


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([f"X-{number}: y" for number in range(98)], 200),
        ([f"X-{number}: y" for number in range(101)], 431),
        (["X: " + "y" * 15000], 200),
        (["X: " + "y" * 17000], 431),
    ],
)
def test_headers_are_limited_in_number_and_size(serve, headers, status):
    answered, body = ask(serve().connect(), headers=headers)
    assert answered == status
    if status != 200:
        assert json.loads(body)["code"] == "request_header_fields_too_large"


# HTTP


def sends(served, *lines, body=b""):
    """Send a raw request; return the status, the headers, and the rest until the end."""
    connection = served.connect()
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
    with connection.makefile("rb") as stream:
        head, _, rest = stream.read().partition(b"\r\n\r\n")
    return int(head.split()[1]), head.decode(), rest


@pytest.mark.parametrize(
    "headers",
    [
        ["Content-Length: 3", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked", "content-length: 3"],
        ["Content-Length: 3", "transfer-encoding:"],
        ["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked, chunked"],
    ],
)
def test_an_ambiguous_length_is_refused(serve, headers):
    """A proxy could read it differently, and take the body for a request (RFC 9112, 6.1)."""
    body = b"0\r\n\r\nGET /smuggled HTTP/1.1\r\n\r\n"
    status, head, rest = sends(serve(), "POST / HTTP/1.1", "Host: x", *headers, body=body)
    assert (status, json.loads(rest)["code"]) == (400, "bad_request")
    assert "Connection: close" in head


def test_chunks_in_http_1_0_are_refused(serve):
    status, _, rest = sends(
        serve(), "POST / HTTP/1.0", "Transfer-Encoding: chunked", body=b"0\r\n\r\n"
    )
    assert (status, json.loads(rest)["code"]) == (400, "bad_request")


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (["HEAD / HTTP/1.1", "no header"], 400),
        (["", "HEAD /[ HTTP/1.1", "Content-Length: x"], 400),
        (["HEAD / HTTP/1.1", "X: " + "y" * 17000], 431),
        (["HEAD / HTTP/1.1", *["X: y"] * 200], 431),
        (["HEAD / HTTP/1.1", f"Content-Length: {2**21}", "Expect: 100-continue"], 413),
        (["HEAD / HTTP/1.1", "Transfer-Encoding: gzip"], 501),
    ],
)
def test_an_error_response_to_head_has_no_body(serve, lines, status):
    refused, head, rest = sends(serve(), *lines)
    assert (refused, rest) == (status, b"")
    assert "Content-Type: application/problem+json" in head


@pytest.mark.parametrize("path", ["/", "/events", "/large"])
def test_a_response_to_head_has_no_body(serve, path):
    """Not even the final chunk."""
    status, head, rest = sends(serve(), f"HEAD {path} HTTP/1.1", "Host: x", "Connection: close")
    assert (status, rest) == (200, b"")
    assert ("Transfer-Encoding: chunked" in head) == (path != "/")


@pytest.mark.parametrize("value", ["close", "Upgrade, close", "close,keep-alive", "Close , x"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_connection_is_closed_on_request(serve, value, version):
    """Whatever else the Connection header contains."""
    connection = serve().connect()
    connection.sendall(f"GET / HTTP/{version}\r\nHost: x\r\nConnection: {value}\r\n\r\n".encode())
    with connection.makefile("rb") as stream:
        assert b"Connection: close" in stream.read()


# Bodies


BODY = 3 * IN_MEMORY
"""Bytes."""


def knows_right_token(authorization, peer):
    return authorization == "right" or peer is not None


def start_body(served, *headers, chunked=False):
    """Send the headers, and more of the body than is kept in memory, but not all of it."""
    connection = served.connect()
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {BODY}"
    size = f"{BODY:x}\r\n" if chunked else ""
    head = "\r\n".join(["POST / HTTP/1.1", "Host: x", length, *headers, "", size])
    connection.sendall(head.encode() + b"x" * (BODY - 1))
    until(
        lambda: any(
            body_of(channel) >= BODY - 1
            for channel in channels(served)
            if channel.addr[1] == port_of(connection)
        )
    )
    return connection


def port_of(connection):
    return connection.getsockname()[1]


def body_of(channel):
    return channel.request.body_bytes_received if channel.request is not None else 0


def finish_body(connection, *, chunked=False):
    connection.sendall(b"x\r\n0\r\n\r\n" if chunked else b"x")
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return json.loads(answer.read())


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunks"])
def test_the_body_of_an_unauthenticated_request_is_read_and_discarded(serve, chunked):
    served = serve(knows=knows_right_token)
    unknown = [
        start_body(served, *proof, chunked=chunked) for proof in ([], ["Authorization: wrong"])
    ]
    known = start_body(served, "Authorization: right", chunked=chunked)
    assert [len(channel.request.body_rcv.getbuf()) for channel in channels(served)] == [
        0,
        0,
        BODY - 1,
    ]
    for connection in unknown:
        answer = finish_body(connection, chunked=chunked)
        assert (answer["unread"], answer["size"]) == (True, 0)
        # The connection can be used for further requests.
        assert (
            ask_json(connection, headers=["Authorization: right"], method="POST", body=b"abc")[
                "size"
            ]
            == 3
        )
    answer = finish_body(known, chunked=chunked)
    assert (answer["unread"], answer["size"]) == (False, BODY)
    # On the Unix socket the peer is authenticated.
    assert ask_json(served.connect_locally(), method="POST", body=b"abc")["size"] == 3


def test_expect_100_continue_without_authentication_is_answered_at_once(serve):
    served = serve(knows=knows_right_token)
    for proof, status in (
        ("Authorization: right", b"100 Continue"),
        ("Authorization: wrong", b"200 OK"),
    ):
        connection = served.connect()
        connection.sendall(
            (
                f"POST / HTTP/1.1\r\nContent-Length: 9\r\nExpect: 100-continue\r\n{proof}\r\n\r\n"
            ).encode()
        )
        with connection.makefile("rb") as stream:
            assert stream.readline() == b"HTTP/1.1 %s\r\n" % status
            if status != b"100 Continue":
                assert b"Connection: close\r\n" in stream.read()


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunks"])
def test_the_number_of_concurrent_large_bodies_is_limited(serve, monkeypatch, chunked):
    """Small ones, and those in memory, are not affected."""
    monkeypatch.setattr(server, "_LARGE_BODIES", 2)
    served = serve()
    first, second, third = (start_body(served, chunked=chunked) for _ in range(3))
    assert ask_json(served.connect(), method="POST", body=b"x" * 1000)["size"] == 1000
    assert finish_body(third, chunked=chunked)["unread"]
    assert finish_body(first, chunked=chunked)["size"] == BODY
    until(lambda: not channels(served)[0].requests, what="the first request to be finished")
    assert finish_body(start_body(served, chunked=chunked), chunked=chunked)["size"] == BODY
    second.close()
    served.settle(4)
    assert finish_body(start_body(served, chunked=chunked), chunked=chunked)["size"] == BODY


def test_a_response_from_the_http_parser_has_security_headers_too(serve):
    connection = serve().connect()
    connection.sendall(b"GET / HTTP/1.1\r\nno header\r\n\r\n")
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    assert answer.status == 400
    assert dict(answer.getheaders()).items() >= HEADERS.items()


def test_a_connection_that_is_gone_before_it_is_accepted_is_ignored(serve, monkeypatch):
    served = serve()
    refused = OSError("gone")
    with monkeypatch.context() as broken:
        broken.setattr(Channel, "__init__", lambda *_, **__: raise_(refused))
        assert is_closed(served.connect())
    assert ask_json(served.connect())["size"] == 0


def raise_(error):
    raise error


def test_a_process_that_ended_before_it_was_accepted_is_not_a_peer(tmp_path):
    path = os.path.relpath(tmp_path / "door")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        code = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
        subprocess.run([sys.executable, "-c", code, path], check=True)
        connection, _ = listener.accept()
        with connection:
            assert identify(connection)() is None
