"""Webhooks: standard signatures, order, retries, and no effect on the keeper."""

from __future__ import annotations

import contextlib
import http.server
import itertools
import json
import socket
import threading
import time
import zlib

import pytest

from harness import PATIENCE, until
from labkeeper.core.messages import HistoryKind, Origin
from labkeeper.events import webhooks
from labkeeper.events.log import EventLog
from labkeeper.events.webhooks import Webhook, key_of, place_of, signed
from labkeeper.runtime import SystemClock
from labkeeper.store.queries import SqliteStore

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


class Receiver:
    """An HTTP server that responds as it is told, and records requests."""

    def __init__(self):
        self.status = 200
        self.headers = {}
        self.received = []
        self.accepted = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.received.append((dict(self.headers), body))
                if outer.status < 300:
                    outer.accepted.append(json.loads(body)["id"])
                self.send_response(outer.status)
                for name, value in outer.headers.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_address[1]}/hook?key=hidden"

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def receiver():
    receiver = Receiver()
    yield receiver
    receiver.close()


class World:
    """An event log over a real store, with a webhook, which a later keeper can continue."""

    def __init__(self, path, size=10_000):
        self.store = SqliteStore(path)
        self.clock = SystemClock()
        self.event_log = EventLog(self.store, self.clock, size=size)
        self.webhook = None

    def begin(self, url):
        body_of = lambda entry: {"id": entry.id, "message": entry.message}  # noqa: E731
        self.webhook = Webhook(url, key_of(SECRET), self.event_log, self.store, self.clock, body_of)
        self.webhook.start()
        return self.webhook

    def record(self, count=1):
        for number in range(count):
            self.event_log.record(HistoryKind.SNOOZED, "lab", str(number))


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setattr(webhooks, "_FIRST_PAUSE", 0.05)
    world = World(tmp_path / "store.sqlite")
    yield world
    with contextlib.suppress(OSError, AttributeError):
        world.webhook.close()
    world.store.close()


def test_a_signature_matches_the_standard():
    """An example of the reference implementation."""
    headers = signed(
        key_of(SECRET), "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330.4, b'{"test": 2432232314}'
    )
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert (headers["webhook-id"], headers["webhook-timestamp"]) == (
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "1614265330",
    )
    assert key_of(SECRET) == key_of(SECRET.removeprefix("whsec_"))


@pytest.mark.parametrize("secret", ["", "short", "whsec_", "ü" * 40, "QUJD", "!" * 44, "A" * 200])
def test_an_invalid_secret_is_refused(secret):
    with pytest.raises(ValueError, match="24 to 64 bytes in base64"):
        key_of(secret)


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://hooks.example/services/T0/B0/x?k=1", "https://hooks.example"),
        ("http://user:pass@h:8080/", "http://h:8080"),
        ("http://[::1]:9/x", "http://[::1]:9"),
    ],
)
def test_only_scheme_host_and_port_of_a_url_are_shown(url, origin):
    assert place_of(url) == origin


def test_events_are_posted_in_order_with_a_signature(world, receiver):
    world.record(3)
    webhook = world.begin(receiver.url)
    # A new webhook does not receive earlier events.
    world.record(50)
    until(lambda: len(receiver.accepted) == 50, what="the receiver to accept all events")
    assert receiver.accepted == [*range(4, 54)]
    for headers, body in receiver.received:
        given = {name.lower(): value for name, value in headers.items()}
        expected = signed(
            key_of(SECRET), given["webhook-id"], float(given["webhook-timestamp"]), body
        )
        assert given["webhook-signature"] == expected["webhook-signature"]
        assert given["webhook-id"].startswith(f"event_{json.loads(body)['id']}_")
        assert abs(float(given["webhook-timestamp"]) - time.time()) < 60
    until(lambda: webhook.status().pending == 0)
    status = webhook.status()
    assert (status.delivered, status.dead, status.error) == (50, 0, None)
    assert "hidden" not in repr(status)


@pytest.mark.parametrize("status", [500, 503, 429, 408, 302])
def test_failed_deliveries_are_retried_with_growing_delays(world, receiver, status, monkeypatch):
    webhook = world.begin(receiver.url)
    sleep, pauses = webhook._threads.sleep, []
    monkeypatch.setattr(
        webhook._threads, "sleep", lambda seconds: pauses.append(seconds) or sleep(seconds)
    )
    receiver.status = status
    world.record(2)
    until(lambda: len(receiver.received) >= 4, what="a retry")
    assert [pause for pause in pauses if pause != webhooks._LOOK_EVERY][:3] == [0.05, 0.1, 0.2]
    assert {json.loads(body)["id"] for _, body in receiver.received} == {1}
    assert str(status) in webhook.status().error
    assert webhook.status().pending == 2
    receiver.status = 204
    until(lambda: receiver.accepted == [1, 2], what="the receiver to accept both events")
    assert (webhook.status().dead, webhook.status().error) == (0, None)


def test_rejected_events_are_dropped_and_counted(world, receiver):
    webhook = world.begin(receiver.url)
    receiver.status = 410
    world.record(2)
    until(lambda: webhook.status().dead == 2, what="both events to be dead")
    receiver.status = 200
    world.record(1)
    until(lambda: webhook.status().delivered == 1)
    assert (receiver.accepted, webhook.status().pending) == ([3], 0)


@pytest.mark.parametrize(("requested", "honoured"), [("30", 30.0), ("86400", 300.0)])
def test_retry_after_is_honoured_up_to_a_limit(world, receiver, monkeypatch, requested, honoured):
    webhook = world.begin(receiver.url)
    sleep, pauses = webhook._threads.sleep, []

    def hurry(seconds):
        pauses.append(seconds)
        return sleep(min(seconds, 0.01))

    monkeypatch.setattr(webhook._threads, "sleep", hurry)
    receiver.status, receiver.headers = 429, {"Retry-After": requested}
    world.record(1)
    until(lambda: len(receiver.received) >= 3)
    assert [pause for pause in pauses if pause != webhooks._LOOK_EVERY][:2] == [honoured] * 2


def test_expired_events_are_dropped(world, receiver, monkeypatch):
    monkeypatch.setattr(webhooks, "_GIVEN_UP_AFTER", 2.0)
    receiver.status = 500
    webhook = world.begin(receiver.url)
    world.record(1)
    until(lambda: webhook.status().dead == 1, what="the event to be dead")
    assert len(receiver.received) > 1


def test_a_later_keeper_continues_with_the_next_event(world, receiver, tmp_path):
    world.begin(receiver.url)
    world.record(3)
    until(lambda: receiver.accepted == [1, 2, 3])
    until(lambda: world.webhook.status().pending == 0)
    receiver.status = 500
    world.record(2)
    until(lambda: len(receiver.received) > 4)
    world.webhook.close()
    world.store.close()
    receiver.status = 200
    later = World(tmp_path / "store.sqlite")
    later.record(1)
    webhook = later.begin(receiver.url)
    until(lambda: receiver.accepted == [1, 2, 3, 4, 5, 6], what="the receiver to accept all events")
    until(lambda: webhook.status().delivered == 6)
    webhook.close()
    later.store.close()


def test_two_events_with_the_same_id_have_different_webhook_ids(receiver, tmp_path, monkeypatch):
    """The state directory may have been restored from a backup in between."""
    monkeypatch.setattr(webhooks, "_FIRST_PAUSE", 0.05)
    for directory in ("before", "restored"):
        world = World(tmp_path / f"{directory}.sqlite")
        webhook = world.begin(receiver.url)
        world.record()
        until(lambda: webhook.status().delivered == 1)  # noqa: B023 - called at once
        webhook.close()
        world.store.close()
    assert receiver.accepted == [1, 1]
    assert (
        len(
            {
                {name.lower(): value for name, value in headers.items()}["webhook-id"]
                for headers, _ in receiver.received
            }
        )
        == 2
    )


def test_delivery_continues_if_the_end_of_the_history_was_lost(world, receiver):
    """A full disk may have stored the position, but not the events."""
    world.record(3)
    world.store.note_webhook(receiver.url, 5, 5, 0)
    webhook = world.begin(receiver.url)
    assert webhook.status().pending == 0
    world.record(3)
    until(lambda: receiver.accepted == [4, 5, 6], what="the receiver to accept all new events")


def test_events_dropped_in_the_middle_of_the_history_count_as_dead(tmp_path, receiver, monkeypatch):
    monkeypatch.setattr(webhooks, "_FIRST_PAUSE", 0.05)
    world = World(tmp_path / "store.sqlite", size=100)
    world.begin(receiver.url)
    world.webhook.close()
    world.event_log.record(HistoryKind.TOKEN, None, "of another", origin=Origin("ada"))
    world.record(299)
    world.store.close()
    world = World(tmp_path / "store.sqlite", size=100)
    webhook = world.begin(receiver.url)
    until(lambda: webhook.status().pending == 0)
    assert receiver.accepted == [1, *range(202, 301)]
    assert (webhook.status().delivered, webhook.status().dead) == (100, 200)
    webhook.close()
    world.store.close()


def test_events_dropped_from_the_history_count_as_dead(tmp_path, receiver, monkeypatch):
    monkeypatch.setattr(webhooks, "_FIRST_PAUSE", 0.05)
    world = World(tmp_path / "store.sqlite", size=100)
    world.begin(receiver.url)
    world.webhook.close()
    world.record(300)
    world.store.close()
    world = World(tmp_path / "store.sqlite", size=100)
    webhook = world.begin(receiver.url)
    until(lambda: webhook.status().pending == 0)
    status = webhook.status()
    assert (status.delivered, status.dead) == (100, 200)
    assert receiver.accepted == [*range(201, 301)]
    webhook.close()
    world.store.close()


def test_pending_events_are_delivered_at_shutdown(world, receiver):
    world.begin(receiver.url)
    world.record(1)
    until(lambda: receiver.accepted == [1])
    world.record(2)
    world.webhook.close()
    assert receiver.accepted == [1, 2, 3]


@pytest.mark.parametrize("trouble", ["nobody listens", "it hangs", "no URL that can be asked"])
def test_an_unreachable_receiver_does_not_block_the_keeper(world, tmp_path, trouble):
    with contextlib.ExitStack() as stack:
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = silent.getsockname()[1]
        if trouble == "nobody listens":
            silent.close()
        url = "http://host\x7f.invalid/" if "URL" in trouble else f"http://127.0.0.1:{port}/"
        webhook = world.begin(url)
        world.record(200)
        if trouble != "it hangs":
            until(lambda: webhook.status().error is not None, what="the webhook to report an error")
            webhook.close()
        assert webhook.status().pending == 200


class Liar:
    """Accepts each POST with 200, then sends a body that must not be awaited."""

    def __init__(self, headers, pieces):
        self.headers, self.pieces = headers, pieces
        self.accepted = 0
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self.serve)
        self.over = threading.Event()
        self.thread.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.listening.getsockname()[1]}/"

    def serve(self):
        while not self.over.is_set():
            with contextlib.suppress(OSError), self.listening.accept()[0] as connection:
                connection.settimeout(PATIENCE)
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\n" + self.headers + b"\r\n\r\n")
                self.accepted += 1
                for piece in self.pieces():
                    connection.sendall(piece)
                    if self.over.is_set():
                        return

    def close(self):
        self.over.set()
        with contextlib.suppress(OSError):
            socket.create_connection(self.listening.getsockname()).close()
        self.thread.join()
        self.listening.close()


def drip(pause):
    while True:
        time.sleep(pause)
        yield b"x"


def gzipped(size):
    """Yield gzip data that decompresses to this size."""
    packer = zlib.compressobj(wbits=31)
    for _ in range(size // 2**20):
        yield packer.compress(bytes(2**20))
    yield packer.flush()


@pytest.mark.parametrize(
    ("headers", "pieces"),
    [
        pytest.param(b"Content-Length: 1000000", lambda: drip(0.01), id="drips"),
        pytest.param(b"Connection: close", lambda: itertools.repeat(bytes(65536)), id="endless"),
        pytest.param(
            b"Content-Encoding: gzip\r\nConnection: close", lambda: gzipped(2**30), id="bomb"
        ),
        pytest.param(
            b"Content-Encoding: gzip\r\nConnection: close", lambda: [b"no gzip"], id="garbage"
        ),
        pytest.param(b"Content-Length: 10", lambda: [b"x"], id="cut off"),
    ],
)
def test_the_body_of_a_response_is_neither_awaited_nor_kept(world, monkeypatch, headers, pieces):
    monkeypatch.setattr(webhooks, "_TIMEOUT", 0.5)
    liar = Liar(headers, pieces)
    try:
        webhook = world.begin(liar.url)
        world.record(3)
        until(lambda: webhook.status().delivered == 3, what="all events to be delivered")
        webhook.close()
        assert liar.accepted == 3
    finally:
        liar.close()
