"""Tokens, one-time links and unauthenticated callers, against a real keeper and real Labs."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import httpx
import psutil
import pytest

from harness import PATIENCE, start_kernel, until

WRONG_TOKENS = int(os.environ.get("WRONG_TOKENS", "2000"))
"""Number of requests with a wrong token."""
PIPELINED = 4
"""Requests per write. A connection with more than eight pending requests is closed."""


def client_with_token(keeper, **fields):
    """Return a client that authenticates with a new token."""
    made = keeper.http.post("/api/tokens", json=fields)
    assert made.status_code == 201, made.text
    shown = {"Authorization": f"Bearer {made.json()['token']}"}
    return httpx.Client(base_url=keeper.url, headers=shown, timeout=PATIENCE, trust_env=False)


@pytest.mark.promise
def test_link_opens_a_lab_at_a_port_without_exposing_its_token(make_keeper):
    """Only one redirect contains the token, not the final page or its URL."""
    keeper = make_keeper(lab_address="port").start()
    server = keeper.post(default_url="/lab/tree/notes.txt").json()
    link = keeper.http.post("/api/servers/default/link", json={}).json()["url"]
    with httpx.Client(timeout=PATIENCE, trust_env=False) as browser:
        opened = browser.get(link, follow_redirects=True)
        assert opened.status_code == 200
        assert [answer.status_code for answer in opened.history] == [303, 302]
        assert [server["token"] in str(answer.url) for answer in (*opened.history, opened)] == [
            False,
            True,
            False,
        ]
        assert opened.url.path == "/lab/tree/notes.txt"
        assert server["token"] not in opened.text
        # From here on the cookie suffices.
        assert browser.get(f"{server['url']}api/kernels").status_code == 200
        assert browser.get(link).status_code == 410
    assert link.rpartition("/")[2] not in keeper.log.read_text()


@pytest.mark.promise
def test_rotated_token_is_refused_and_the_new_one_is_accepted(keeper):
    before = keeper.post().json()
    start_kernel(before)
    answer = keeper.http.post("/api/servers/default/rotate-token")
    assert answer.status_code == 201
    after = answer.json()
    assert (after["generation"], after["port"]) == (before["generation"] + 1, before["port"])
    assert len(bytes.fromhex(after["token"])) == 24
    statuses = [
        httpx.get(
            f"{after['url']}api/kernels",
            headers={"Authorization": f"token {token}"},
            trust_env=False,
        ).status_code
        for token in (before["token"], after["token"])
    ]
    assert statuses == [403, 200]


@pytest.mark.promise
def test_tokens_survive_a_restart_and_revocation_ends_open_streams(make_keeper):
    keeper = make_keeper(launch_by="fork").start_to_fork()
    with client_with_token(keeper, name="ci", scope="manage", servers=["ci-*"]) as ci:
        assert ci.post("/api/servers", json={"name": "ci-1"}, params={"wait": 0}).status_code == 202
        assert ci.post("/api/servers", json={"name": "other"}).status_code == 403
        keeper.kill()
        keeper.start()
        keeper.wait_for("running", "ci-1")
        assert ci.get("/api/me").json()["actor"] == "token:ci"
        with ci.stream("GET", "/api/events", params={"follow": "true"}) as events:
            lines = events.iter_lines()
            assert next(lines).startswith("retry")
            assert keeper.cli("token", "revoke", "ci").returncode == 0
            list(lines)
        assert ci.get("/api/me").status_code == 401
    events = keeper.http.get("/api/events", params={"after": 0, "limit": 1000}).json()["events"]
    assert {"token:ci", "token:owner"} <= {event["actor"] for event in events}


def test_cli_creates_lists_and_revokes_tokens(keeper):
    made = keeper.cli(
        "token", "create", "ci", "--scope", "read", "--label", "team=blue", "--expires", "1d"
    )
    assert made.returncode == 0, made.stderr
    shown = {"Authorization": f"Bearer {made.stdout.strip()}"}
    assert keeper.http.get("/api/me", headers=shown).json()["labels"] == {"team": "blue"}
    assert "team=blue" in keeper.cli("token", "ls").stdout
    assert keeper.cli("token", "revoke", "ci").returncode == 0
    again = keeper.cli("token", "revoke", "ci")
    assert (again.returncode, "cannot find token 'ci'" in again.stderr) == (1, True)


def test_large_bodies_do_not_reach_the_keeper_before_they_are_complete(make_keeper):
    """There, a body would take a file, and so another descriptor."""
    keeper = make_keeper().start()
    process = psutil.Process(keeper.process.pid)
    assert keeper.http.get("/api/me").status_code == 200
    before = process.num_fds()
    crowd = [send_half(keeper, shown) for shown in ("", "wrong", "lk_0123456789ab_" + 43 * "x") * 5]
    try:
        # The edge has read the first half of every body once its socket buffers are empty.
        until(
            lambda: not any(has_unread_bytes(keeper, one) for one in crowd),
            what="the edge to read the first half of every body",
        )
        assert process.num_fds() <= before
        for one in crowd:
            one.sendall(b" " * (LARGE // 2))
            assert one.recv(2**16).startswith(b"HTTP/1.1 401")
    finally:
        for one in crowd:
            one.close()


LARGE = 400_000
"""Size of a body in bytes: more than is buffered in memory."""


def send_half(keeper, shown):
    """Send the head of a request and half of its large body."""
    connection = socket.create_connection(("127.0.0.1", keeper.port), PATIENCE)
    proof = [f"Authorization: Bearer {shown}"] if shown else []
    head = ["POST /api/servers HTTP/1.1", "Host: localhost", f"Content-Length: {LARGE}", *proof]
    connection.sendall("\r\n".join([*head, "", ""]).encode() + b" " * (LARGE // 2))
    return connection


def has_unread_bytes(keeper, connection):
    """Return whether the edge has not yet read everything that was sent on a connection."""
    ours = connection.getsockname()[1]
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    (queues,) = [
        line[4]
        for line in lines
        if line[1].endswith(f":{keeper.port:04X}") and line[2].endswith(f":{ours:04X}")
    ]
    return int(queues.partition(":")[2], 16) > 0


@pytest.mark.soak
def test_flood_of_wrong_tokens_does_not_deny_service_or_fill_disk_or_memory(make_keeper):
    """Valid requests succeed meanwhile, and log, store and memory do not grow noticeably."""
    keeper = make_keeper(max_request_rate=0).start()
    keeper.http.get("/api/servers")
    files = [keeper.log, *keeper.state_dir.glob("labkeeper.sqlite*")]
    process = psutil.Process(keeper.process.pid)
    sizes, memory = sum(file.stat().st_size for file in files), process.memory_info().rss
    request = (
        b"GET /api/servers HTTP/1.1\r\nHost: localhost\r\n"
        b"Authorization: Bearer lk_0123456789ab_%043d\r\n\r\n"
    )
    refused = [0, 0]

    def send_wrong_tokens(which):
        with socket.create_connection(("127.0.0.1", keeper.port), PATIENCE) as stranger:
            for first in range(0, WRONG_TOKENS // 2, PIPELINED):
                stranger.sendall(b"".join(request % (first + at) for at in range(PIPELINED)))
                came = b""
                while came.count(b"HTTP/1.1 401") < PIPELINED or not came.endswith(b"}"):
                    piece = stranger.recv(2**16)
                    assert piece, f"connection closed after {refused[which]} responses"
                    came += piece
                refused[which] += came.count(b"HTTP/1.1 401")

    threads = [threading.Thread(target=send_wrong_tokens, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert keeper.http.get("/api/servers").status_code == 200
    assert refused == [WRONG_TOKENS // 2] * 2
    assert sum(file.stat().st_size for file in files) - sizes < 20_000
    assert process.memory_info().rss - memory < 50 * 2**20
