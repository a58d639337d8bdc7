"""Tokens, links and strangers, against a real keeper and real Labs."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import httpx
import psutil
import pytest

from harness import PATIENCE, start_kernel, until

STRANGERS = int(os.environ.get("WRONG_TOKENS", "2000"))
"""Requests with a wrong token."""
AT_ONCE = 4
"""Requests in one write; a connection on which more than eight wait is closed."""


def with_token(keeper, **fields):
    """Give a client that shows a new token."""
    made = keeper.http.post("/api/tokens", json=fields)
    assert made.status_code == 201, made.text
    shown = {"Authorization": f"Bearer {made.json()['token']}"}
    return httpx.Client(base_url=keeper.url, headers=shown, timeout=PATIENCE, trust_env=False)


@pytest.mark.promise
def test_a_link_opens_the_lab_and_leaves_no_token_behind(keeper):
    """One redirect has the token; the page that the browser stays on, and all that it holds, do not."""
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
        # The cookie is all that it needs from now on.
        assert browser.get(f"{server['url']}api/kernels").status_code == 200
        assert browser.get(link).status_code == 410
    assert link.rpartition("/")[2] not in keeper.log.read_text()


@pytest.mark.promise
def test_a_rotated_token_opens_nothing_and_the_new_one_does(keeper):
    before = keeper.post().json()
    start_kernel(before)
    answer = keeper.http.post("/api/servers/default/rotate-token")
    assert answer.status_code == 201
    after = answer.json()
    assert (after["generation"], after["port"]) == (before["generation"] + 1, before["port"])
    assert len(bytes.fromhex(after["token"])) == 24
    told = [
        httpx.get(
            f"{after['url']}api/kernels",
            headers={"Authorization": f"token {token}"},
            trust_env=False,
        ).status_code
        for token in (before["token"], after["token"])
    ]
    assert told == [403, 200]


@pytest.mark.promise
def test_tokens_outlive_the_keeper_and_revoking_them_ends_what_goes_on(make_keeper):
    keeper = make_keeper(launch_by="fork").start_to_fork()
    with with_token(keeper, name="ci", scope="manage", servers=["ci-*"]) as ci:
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


def test_the_command_line_makes_lists_and_revokes_tokens(keeper):
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


def test_large_bodies_without_a_token_cost_no_more_than_their_connections(make_keeper):
    """A body that is kept has a file, and so takes one more descriptor: servers need those."""
    keeper = make_keeper().start()
    process = psutil.Process(keeper.process.pid)
    assert keeper.http.get("/api/me").status_code == 200
    before = process.num_fds()
    crowd = [
        send_half(keeper, shown) for shown in ("", "wrong", "lk_0123456789ab_" + 43 * "x") * 10
    ]
    try:
        # Half of each has been read when the keeper has nothing more to read: it is asked behind them all.
        until(lambda: not any(unread(keeper, one) for one in crowd), what="all halves are read")
        assert process.num_fds() - before <= len(crowd)
        for one in crowd:
            one.sendall(b" " * (LARGE // 2))
            assert one.recv(2**16).startswith(b"HTTP/1.1 401")
    finally:
        for one in crowd:
            one.close()


LARGE = 400_000
"""Bytes of a body: more than are kept in memory."""


def send_half(keeper, shown):
    """Begin a request with a large body."""
    connection = socket.create_connection(("127.0.0.1", keeper.port), PATIENCE)
    proof = [f"Authorization: Bearer {shown}"] if shown else []
    head = ["POST /api/servers HTTP/1.1", "Host: localhost", f"Content-Length: {LARGE}", *proof]
    connection.sendall("\r\n".join([*head, "", ""]).encode() + b" " * (LARGE // 2))
    return connection


def unread(keeper, connection):
    """Whether the keeper has yet to read what a connection has sent."""
    ours = connection.getsockname()[1]
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    (queues,) = [
        line[4]
        for line in lines
        if line[1].endswith(f":{keeper.port:04X}") and line[2].endswith(f":{ours:04X}")
    ]
    return int(queues.partition(":")[2], 16) > 0


@pytest.mark.soak
def test_wrong_tokens_keep_nobody_out_and_fill_neither_disk_nor_memory(make_keeper):
    """Who belongs is answered meanwhile; afterwards log, store and memory are as large as before."""
    keeper = make_keeper(max_request_rate=0).start()
    keeper.http.get("/api/servers")
    files = [keeper.log, *keeper.state_dir.glob("labkeeper.sqlite*")]
    process = psutil.Process(keeper.process.pid)
    sizes, memory = sum(file.stat().st_size for file in files), process.memory_info().rss
    request = b"GET /api/servers HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer lk_0123456789ab_%043d\r\n\r\n"
    refused = [0, 0]

    def knock(which):
        with socket.create_connection(("127.0.0.1", keeper.port), PATIENCE) as stranger:
            for first in range(0, STRANGERS // 2, AT_ONCE):
                stranger.sendall(b"".join(request % (first + at) for at in range(AT_ONCE)))
                came = b""
                while came.count(b"HTTP/1.1 401") < AT_ONCE or not came.endswith(b"}"):
                    piece = stranger.recv(2**16)
                    assert piece, f"closed after {refused[which]} answers"
                    came += piece
                refused[which] += came.count(b"HTTP/1.1 401")

    threads = [threading.Thread(target=knock, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert keeper.http.get("/api/servers").status_code == 200
    assert refused == [STRANGERS // 2] * 2
    assert sum(file.stat().st_size for file in files) - sizes < 20_000
    assert process.memory_info().rss - memory < 50 * 2**20
