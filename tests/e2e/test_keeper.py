"""The keeper itself: invalid input, shutdown, and a second keeper beside it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from harness import (
    PATIENCE,
    KeeperProcess,
    alive,
    free_port,
    processes_marked,
    servers_in,
    start_kernel,
    until,
)

GOOD_URL = "http://127.0.0.1:1"
BAD_BODIES = {
    "gateway-url null": ({"gateway-url": None}, "gateway_url"),
    "gateway-url None": ({"gateway-url": "None"}, "gateway_url"),
    "gateway-url empty": ({"gateway-url": ""}, "gateway_url"),
    "gateway-url ftp": ({"gateway-url": "ftp://x"}, "gateway_url"),
    "gateway-url no scheme": ({"gateway-url": "gateway:8888"}, "gateway_url"),
    "gateway-url with user": ({"gateway-url": "http://me:secret@gateway"}, "gateway_url"),
    "gateway-url bad port": ({"gateway-url": "http://gateway:99999"}, "gateway_url"),
    "gateway option alone": ({"gateway-auth-token": "x"}, "body"),
    "gateway CA missing": (
        {"gateway-url": GOOD_URL, "gateway-ca-certs": "/no/such/file"},
        "gateway_ca_certs",
    ),
    "header injection": (
        {"gateway-url": GOOD_URL, "gateway-headers": {"X": "a\r\nB: c"}},
        "gateway_headers.X",
    ),
    "unknown field": ({"colour": "blue"}, "colour"),
    "name with slash": ({"name": "a/b"}, "name"),
    "name of dots": ({"name": ".."}, "name"),
    "name too long": ({"name": "a" * 300}, "name"),
    "name in unicode": ({"name": "später"}, "name"),
    "name of wrong type": ({"name": 7}, "name"),
    "root missing": ({"root_dir": "no-such-directory"}, "root_dir"),
    "root is a file": ({"root-dir": "a-file"}, "root_dir"),
    "root with NUL": ({"root_dir": "a\0b"}, "root_dir"),
    "port too big": ({"port": 70000}, "port"),
    "port as text": ({"port": "8888"}, "port"),
    "timeout negative": (
        {"gateway-url": GOOD_URL, "gateway-request-timeout": -1},
        "gateway_request_timeout",
    ),
    "base_url upwards": ({"base_url": "/a/../b"}, "base_url"),
    "default_url elsewhere": ({"default_url": "//evil.example"}, "default_url"),
    "env of wrong type": ({"env": {"A": 1}}, "env.A"),
    "env with a bad name": ({"env": {"A=B": "1"}}, "env"),
    "env that is ours": ({"env": {"LABKEEPER_SERVER": "x"}}, "env"),
    "label with a bad key": ({"labels": {"": "x"}}, "labels"),
    "half a character in a label": ({"labels": {"a": "\ud800"}}, "body"),
    "half a character in env": ({"env": {"A": "\udfff"}}, "body"),
    "gateway CA is a directory": (
        {"gateway-url": GOOD_URL, "gateway-ca-certs": "/etc"},
        "gateway_ca_certs",
    ),
    "both spellings": ({"root_dir": ".", "root-dir": "."}, "root-dir"),
}


@pytest.fixture(scope="module")
def keeper_with_server(tmp_path_factory):
    """A keeper with one server."""
    keeper = KeeperProcess(tmp_path_factory.mktemp("settled"), launch_by="exec").start()
    (keeper.notebook_dir / "a-file").touch()
    keeper.post(name="settled").raise_for_status()
    yield keeper
    keeper.close()


@pytest.fixture
def shared_keeper(keeper_with_server):
    """The keeper that the tests of this module share; its server must not change."""

    def servers():
        # Usage changes all the time.
        return [
            server | {"usage": None, "limits": None}
            for server in keeper_with_server.http.get("/api/servers").json()["servers"]
        ]

    before = servers()
    yield keeper_with_server
    assert servers() == before
    assert alive(before[0]["pid"])
    assert len(servers_in(keeper_with_server.server_dirs)) == 1


@pytest.mark.promise
@pytest.mark.parametrize(("body", "field"), BAD_BODIES.values(), ids=BAD_BODIES)
def test_invalid_field_is_reported_with_the_rule_it_breaks(shared_keeper, body, field):
    answer = shared_keeper.http.post(
        "/api/servers", content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 422, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    problem = answer.json()
    assert problem["code"] == "invalid_spec"
    assert field.replace("-", "_") in [mistake["field"] for mistake in problem["errors"]], problem
    assert all(mistake["rule"] for mistake in problem["errors"])
    assert "secret" not in answer.text


@pytest.mark.promise
@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"[]", "application/json", 422),
        (b"null", "application/json", 422),
        (b'"{}"', "application/json", 422),
        (b"name=x", "application/x-www-form-urlencoded", 415),
        (b"[" * 100_000, "application/json", 422),
    ],
)
def test_body_that_is_not_a_json_object_is_rejected(shared_keeper, content, kind, status):
    answer = shared_keeper.http.post(
        "/api/servers", content=content, headers={"Content-Type": kind}
    )
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json()["detail"]


@pytest.mark.promise
def test_body_of_100_mb_is_rejected_with_a_readable_413(shared_keeper):
    answer = shared_keeper.http.post(
        "/api/servers", content=b"x" * 100_000_000, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 413
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert "body" in answer.json()["detail"]
    assert "1048576" in answer.json()["detail"]


@pytest.mark.promise
@pytest.mark.parametrize("query", ["wait=-1", "wait=nan", "wait=soon", "wait=1e9", "colour=blue"])
def test_invalid_query_parameter_is_reported(shared_keeper, query):
    answer = shared_keeper.http.post(f"/api/servers?{query}", json={})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == query.partition("=")[0]


@pytest.mark.promise
@pytest.mark.parametrize(
    "path",
    [
        "/api/servers/a%2Fb",
        "/api/servers/..%2f..",
        "/api/servers/" + "a" * 3000,
        "/api/servers/sp%C3%A4ter",
        "/nope",
    ],
)
def test_unknown_path_returns_404(shared_keeper, path):
    answer = shared_keeper.http.get(path)
    assert answer.status_code == 404
    assert answer.json()["code"] in {"server_not_found", "not_found"}


@pytest.mark.promise
@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", "Basic wrong", "Bearer \xff", "token {token}"]
)
def test_request_without_a_valid_token_reveals_nothing(shared_keeper, header):
    headers = (
        {}
        if header is None
        else {"Authorization": header.format(token=shared_keeper.token).encode("latin-1")}
    )
    with httpx.Client(
        base_url=shared_keeper.url, trust_env=False, headers=headers
    ) as unauthenticated:
        for path in (
            "/api/servers",
            "/api/servers/settled",
            "/api/servers/none",
            "/api/servers/settled/logs",
        ):
            answer = unauthenticated.get(path)
            assert answer.status_code == 401
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")
            assert "settled" not in answer.text.replace(path, "")
        assert unauthenticated.post("/api/servers", json={}).status_code == 401
        assert unauthenticated.delete("/api/servers/settled").status_code == 401
        for path in ("/healthz", "/readyz", "/api/version", "/api/openapi.json", "/api/docs"):
            assert unauthenticated.get(path).status_code == 200


def exchange(keeper, text):
    """Send bytes to the keeper's port, and return its response up to the end of the connection."""
    with socket.create_connection(("127.0.0.1", keeper.port), timeout=PATIENCE) as wire:
        wire.sendall(text)
        return wire.makefile("rb").read()


def test_expect_100_continue_with_a_large_body_returns_413(shared_keeper):
    """Curl sends this for bodies over a megabyte; answered with "100 Continue" it would hang."""
    head = b"POST /api/servers HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    response = exchange(
        shared_keeper, head + b"Content-Length: 3000000\r\nExpect: 100-continue\r\n\r\n"
    )
    assert b"100 Continue" not in response
    assert b"413 Request Entity Too Large" in response


@pytest.mark.parametrize(
    "line",
    [
        b"GET http://[ HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
    ],
)
def test_malformed_request_returns_400(shared_keeper, line):
    assert b"400 Bad Request" in exchange(shared_keeper, line)


def test_invalid_content_length_returns_a_problem_document(shared_keeper):
    response = exchange(shared_keeper, b"GET / HTTP/1.1\r\nContent-Length: minus one\r\n\r\n")
    assert b"400 Bad Request" in response
    assert b"application/problem+json" in response


def test_server_list_comes_in_pages_and_rejects_an_invalid_cursor(shared_keeper):
    created = shared_keeper.http.post("/api/servers?wait=0", json={"name": "another"})
    assert created.status_code == 202
    try:
        pages, cursor = [], {}
        while cursor is not None:
            page = shared_keeper.http.get("/api/servers", params={"limit": 1} | cursor).json()
            pages.append([server["name"] for server in page["servers"]])
            cursor = page["next"] and {"cursor": page["next"]}
        assert pages == [["another"], ["settled"]]
        answer = shared_keeper.http.get("/api/servers", params={"cursor": "!!"})
        assert answer.status_code == 422
    finally:
        shared_keeper.delete("another", force="true")


@pytest.mark.promise
def test_sigterm_shuts_every_server_down_gracefully(make_keeper):
    keeper = make_keeper(launch_by="fork").start_to_fork()
    servers = [keeper.post(name=name).json() for name in ("one", "two")]
    start_kernel(servers[0])
    assert keeper.stop() == 0
    assert not processes_marked(keeper.server_dirs)
    assert not any(alive(server["pid"]) for server in servers)
    entries = [
        json.loads(line) for line in keeper.log.read_text().splitlines() if line.startswith("{")
    ]
    assert {entry["server"]: entry["method"] for entry in entries if entry.get("method")} == {
        "one": "shutdown",
        "two": "shutdown",
    }
    # The shutdown stopped them on purpose: the next keeper lists them, and starts none.
    keeper.start()
    assert {server["state"] for server in keeper.http.get("/api/servers").json()["servers"]} == {
        "stopped"
    }


def test_systemd_is_notified_when_the_keeper_is_ready_and_when_it_stops(make_keeper, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(PATIENCE)
        keeper = make_keeper()
        keeper.variables["NOTIFY_SOCKET"] = tmp_path / "notify"
        keeper.start()
        assert systemd.recv(100) == b"READY=1"
        server = keeper.post().json()
        assert b"NOTIFY_SOCKET" not in Path(f"/proc/{server['pid']}/environ").read_bytes()
        assert keeper.stop() == 0
        assert systemd.recv(100) == b"STOPPING=1"


@pytest.mark.promise
def test_second_keeper_on_the_same_state_directory_is_refused(make_keeper):
    keeper = make_keeper().start()
    second = subprocess.run(
        keeper.command("serve", "--port", str(free_port())),
        env=keeper.environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert second.returncode == 2
    assert len(second.stderr.strip().splitlines()) == 1
    assert "another keeper" in second.stderr
    assert str(keeper.process.pid) in second.stderr
    assert keeper.http.get("/readyz").status_code == 200


@pytest.mark.parametrize(
    "settings", [{}, {"runtime_dir": "servers"}], ids=["default", "configured"]
)
def test_second_keeper_on_the_same_runtime_directory_is_refused(make_keeper, tmp_path, settings):
    """However the directory is spelled: each keeper would end the other's servers."""
    keeper = make_keeper(**{name: tmp_path / value for name, value in settings.items()}).start()
    link = tmp_path / "link"
    link.symlink_to(keeper.server_dirs)
    for spelling in (
        keeper.server_dirs,
        link,
        f"{keeper.server_dirs}/../{keeper.server_dirs.name}",
    ):
        result = make_keeper(runtime_dir=spelling).cli("serve")
        assert result.returncode == 2
        assert (
            f"another keeper (pid {keeper.process.pid}) runs on the runtime directory"
            in result.stderr
        )
        assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.root
def test_second_keeper_on_a_bind_mount_of_the_runtime_directory_is_refused(make_keeper, tmp_path):
    keeper = make_keeper().start()
    mount = tmp_path / "mount"
    mount.mkdir()
    subprocess.run(["mount", "--bind", keeper.server_dirs, mount], check=True)
    try:
        result = make_keeper(runtime_dir=mount).cli("serve")
    finally:
        subprocess.run(["umount", mount], check=True)
    assert result.returncode == 2
    assert (
        f"another keeper (pid {keeper.process.pid}) runs on the runtime directory" in result.stderr
    )


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"port": "eighty"}, "LABKEEPER_PORT"),
        ({"token": "short"}, "LABKEEPER_TOKEN"),
        ({"start_timeout": "-1"}, "LABKEEPER_START_TIMEOUT"),
        ({"auth": "maybe"}, "LABKEEPER_AUTH"),
        ({"config": "/no/such/file.toml"}, "/no/such/file.toml"),
        ({"state_dir": "/proc/nowhere"}, "/proc/nowhere"),
    ],
)
def test_invalid_setting_is_reported_in_one_line_with_exit_code_2(make_keeper, settings, word):
    keeper = make_keeper(**settings)
    result = keeper.cli("serve")
    assert result.returncode == 2
    assert word in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_api_port_in_use_is_reported_in_one_line(make_keeper):
    keeper = make_keeper().start()
    other = make_keeper()
    other.port = keeper.port
    result = other.cli("serve")
    assert result.returncode == 2
    assert str(keeper.port) in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_disabled_access_control_is_logged(make_keeper):
    keeper = make_keeper(auth="none")
    (keeper.state_dir).mkdir()
    (keeper.state_dir / "token").write_text("unused")
    keeper.start()
    with httpx.Client(base_url=keeper.url, trust_env=False) as unauthenticated_client:
        assert unauthenticated_client.get("/api/servers").status_code == 200
    until(
        lambda: "access control is OFF" in keeper.log.read_text(),
        what="the log line about disabled access control",
    )


def test_damaged_store_is_refused_and_left_unchanged(make_keeper):
    keeper = make_keeper().start()
    assert keeper.stop() == 0
    store = keeper.state_dir / "labkeeper.sqlite"
    for part in keeper.state_dir.glob("labkeeper.sqlite-*"):
        part.unlink()
    store.write_bytes(b"no database at all" * 100)
    result = keeper.cli("serve")
    assert result.returncode == 2
    assert "damaged" in result.stderr
    assert store.read_bytes().startswith(b"no database at all")


def test_start_beyond_max_servers_returns_429_with_retry_after(make_keeper):
    keeper = make_keeper(max_servers=1).start()
    keeper.http.post("/api/servers?wait=0", json={}).raise_for_status()
    answer = keeper.post(name="other")
    assert answer.status_code == 429
    assert int(answer.headers["Retry-After"]) > 0
    assert keeper.http.get("/api/servers/other").status_code == 404


def test_server_that_became_ready_while_the_keeper_was_suspended_is_kept(make_keeper):
    start_timeout = 12
    keeper = make_keeper(start_timeout=start_timeout).start()
    assert keeper.post("?wait=0").status_code == 202
    started_at = time.monotonic()
    until((keeper.server_dirs / "default" / "launch.json").exists, what="the launch record")
    keeper.process.send_signal(signal.SIGSTOP)
    try:
        url = f"http://127.0.0.1:{keeper.lab_port}/servers/default/api"
        until(lambda: responds(url), what="the server to respond")
        until(lambda: time.monotonic() > started_at + start_timeout, what="the start to be overdue")
    finally:
        keeper.process.send_signal(signal.SIGCONT)
    server = keeper.wait_for("running")
    assert (server["generation"], server["restarts"]) == (1, 0)


def responds(url):
    """Return whether a server responds at an address."""
    try:
        return httpx.get(url, timeout=PATIENCE, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def test_second_signal_does_not_interrupt_a_graceful_shutdown(make_keeper):
    keeper = make_keeper().start()
    server = keeper.post().json()
    keeper.process.send_signal(signal.SIGINT)
    until(
        lambda: "running -> stopping" in keeper.log.read_text(),
        what="the keeper to handle the first SIGINT",
    )
    keeper.process.send_signal(signal.SIGTERM)
    assert keeper.process.wait(PATIENCE) == 0
    until(lambda: not alive(server["pid"]))
