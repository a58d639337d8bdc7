"""The edge: one address that survives the end of keepers, of edges, and of both."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import socket
import sys
import threading
from pathlib import Path

import brotli
import httpx
import pytest

from harness import (
    PATIENCE,
    alive,
    edges_of,
    execute,
    free_port,
    kernel_websocket,
    run_cell,
    send_cell,
    start_kernel,
    until,
    upgrade,
)
from labkeeper.api.routes import ROUTES
from labkeeper.core.access import Scope

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(sys.platform != "linux", reason="the edge needs Linux"),
]


def at_edge(keeper, server):
    """Return a server as its clients reach it at the public address."""
    return server | {"url": f"{keeper.url}/servers/{server['name']}/"}


def edge_of(keeper):
    """Return the only edge of a keeper."""
    (edge,) = edges_of(keeper)
    return edge


def send_in_background(keeper, path):
    """Send a request in a thread; return the thread and the list that gets the answer."""
    got = []

    def send():
        headers = {"Authorization": f"Bearer {keeper.token}"}
        url = f"{keeper.url}{path}"
        got.append(httpx.get(url, headers=headers, timeout=PATIENCE, trust_env=False))

    thread = threading.Thread(target=send)
    thread.start()
    return thread, got


@pytest.mark.promise
def test_api_and_labs_are_at_one_address(make_keeper):
    keeper = make_keeper().start()
    server = keeper.post(name="lab").json()
    assert server["base_url"] == "/servers/lab/"
    assert server["lab_url"] == f"{keeper.url}/servers/lab/lab"
    lab = at_edge(keeper, server)
    assert run_cell(lab, start_kernel(lab), "6 * 7") == "42"
    headers = {"Authorization": f"token {server['token']}"}
    page = httpx.get(server["lab_url"], headers=headers, trust_env=False)
    assert '"baseUrl": "/servers/lab/"' in page.text
    # Programs still reach it directly.
    assert run_cell(server, start_kernel(server), "1 + 1") == "2"
    assert keeper.delete("lab").status_code == 200
    gone = httpx.get(f"{keeper.url}/servers/lab/api", headers=headers, trust_env=False)
    assert (gone.status_code, gone.json()["code"]) == (404, "not_found")


def test_a_requested_base_url_is_below_the_servers_path(make_keeper):
    keeper = make_keeper().start()
    server = keeper.post(name="lab", base_url="/deep/er").json()
    assert server["base_url"] == "/servers/lab/deep/er/"
    headers = {"Authorization": f"token {server['token']}"}
    url = f"{keeper.url}/servers/lab/deep/er/api/status"
    assert httpx.get(url, headers=headers, trust_env=False).status_code == 200
    again = keeper.post(name="lab", base_url="/deep/er")
    assert (again.status_code, again.json()["generation"]) == (200, 1)


def test_settings_and_bundles_of_a_lab_arrive_compressed(make_keeper):
    """And are the same as those that the Lab sends directly."""
    keeper = make_keeper().start()
    server = keeper.post(name="lab").json()
    token = {"Authorization": f"token {server['token']}"}
    page = httpx.get(f"{server['url']}lab", headers=token, trust_env=False).text
    bundle = re.search(r"static/lab/main\.[0-9a-f]+\.js\?v=[0-9a-f]+", page)[0]
    for path in ("lab/api/settings", bundle):
        direct = httpx.get(f"{server['url']}{path}", headers=token, trust_env=False)
        assert "content-encoding" not in direct.headers
        for coding in ("br", "gzip"):
            headers = token | {"Accept-Encoding": coding}
            url = f"{at_edge(keeper, server)['url']}{path}"
            with httpx.stream("GET", url, headers=headers, trust_env=False) as answer:
                packed = b"".join(answer.iter_raw())
            assert answer.headers["content-encoding"] == coding
            assert len(packed) == int(answer.headers["content-length"])
            assert len(packed) < len(direct.content) / 3
            unpack = {"br": brotli.decompress, "gzip": gzip.decompress}[coding]
            assert unpack(packed) == direct.content
    assert "immutable" in answer.headers["cache-control"]
    # Jupyter knows its own ETag again.
    known = f"{at_edge(keeper, server)['url']}lsp/status"
    found = httpx.get(known, headers=token, trust_env=False)
    assert found.headers["content-encoding"] == "br"
    assert found.headers["etag"].startswith('W/"')
    again = token | {"If-None-Match": found.headers["etag"]}
    answer = httpx.get(known, headers=again, trust_env=False)
    assert (answer.status_code, answer.headers["etag"]) == (304, found.headers["etag"])


@pytest.mark.promise
def test_no_route_answers_without_a_token(make_keeper):
    """The edge has the keeper's user, so a check of the peer would let everyone in."""
    keeper = make_keeper().start()
    closed = [route for route in ROUTES if route.rule.scope is not None]
    assert {route.rule.scope for route in closed} == set(Scope)
    for route in closed:
        path = route.path.replace("<name>", "default")
        answer = httpx.request(route.method, f"{keeper.url}{path}", trust_env=False)
        assert answer.status_code == 401, route
    # The same request over the keeper's own socket is that of its user.
    transport = httpx.HTTPTransport(uds=str(keeper.state_dir / "keeper.sock"))
    with httpx.Client(transport=transport, base_url="http://localhost") as client:
        assert client.get("/api/servers").status_code == 200


@pytest.mark.promise
def test_a_notebook_does_not_notice_the_end_of_the_keeper(make_keeper):
    keeper = make_keeper().start()
    lab = at_edge(keeper, keeper.post(name="lab").json())
    (keeper.notebook_dir / "go").touch()
    with kernel_websocket(lab, start_kernel(lab)) as opened:
        code = "import os, time\nwhile os.path.exists('go'): time.sleep(0.01)\nprint('done')"
        message = send_cell(opened, code)
        edge = edge_of(keeper)
        keeper.kill()
        # At first, the next keeper only knows that there is a process.
        path = "/api/servers/lab?wait_for=running&wait=60"
        waiting, got = send_in_background(keeper, path)
        keeper.start()
        waiting.join()
        assert got[0].json()["state"] == "running"
        assert edge_of(keeper) == edge
        (keeper.notebook_dir / "go").unlink()
        printed = until(lambda: text_of(opened, message), what="the cell to end")
        assert printed == "done\n"
        assert execute(opened, "1 + 1") == "2"


def text_of(opened, message_id):
    """Return the next text that a cell prints."""
    while True:
        found = json.loads(opened.recv())
        of_cell = found["parent_header"].get("msg_id") == message_id
        if of_cell and found["header"]["msg_type"] == "stream":
            return found["content"]["text"]


@pytest.mark.promise
def test_a_killed_edge_comes_back_and_no_connection_is_refused(make_keeper):
    keeper = make_keeper().start()
    lab = at_edge(keeper, keeper.post(name="lab").json())
    kernel = start_kernel(lab)
    edge = edge_of(keeper)
    edge.kill()
    # A dying process may still accept a connection.
    until(lambda: not alive(edge.pid), what="the edge to end")
    # The keeper holds the listening socket, too: requests wait in its queue.
    with httpx.Client(base_url=keeper.url, trust_env=False, timeout=PATIENCE) as client:
        assert client.get("/edge/healthz").json() == {"status": "ok"}
    assert edge_of(keeper) != edge
    assert run_cell(lab, kernel, "1 + 1") == "2"
    assert "the edge has died" in keeper.log.read_text()


def test_the_next_keeper_starts_the_edge_if_both_have_died(make_keeper):
    keeper = make_keeper().start()
    lab = at_edge(keeper, keeper.post(name="lab").json())
    keeper.kill()
    edge = edge_of(keeper)
    edge.kill()
    until(lambda: not alive(edge.pid), what="the edge to end")
    keeper.start()
    assert run_cell(lab, start_kernel(lab), "1 + 1") == "2"
    # The directory of the dead edge was removed.
    assert len([path for path in (keeper.state_dir / "edge").iterdir() if path.is_dir()]) == 1


@pytest.mark.promise
def test_labs_are_reachable_while_the_next_keeper_looks_for_them(make_keeper):
    keeper = make_keeper().start()
    lab = at_edge(keeper, keeper.post(name="lab").json())
    headers = {"Authorization": f"token {lab['token']}"}
    keeper.kill()
    statuses = set()
    ended = threading.Event()

    def poll():
        with httpx.Client(headers=headers, trust_env=False, timeout=PATIENCE) as client:
            while not ended.is_set():
                statuses.add(client.get(f"{lab['url']}api/status").status_code)

    thread = threading.Thread(target=poll)
    thread.start()
    keeper.start()
    keeper.wait_for("running", "lab")
    ended.set()
    thread.join()
    assert statuses == {200}


def test_lab_that_ended_without_a_keeper_has_no_route(make_keeper):
    keeper = make_keeper().start()
    lab = at_edge(keeper, keeper.post(name="lab").json())
    keeper.kill()
    os.kill(lab["pid"], signal.SIGKILL)
    keeper.start()
    # It is launched again, with another token.
    again = at_edge(keeper, keeper.wait_for("running", "lab"))
    assert again["generation"] == 2
    assert run_cell(again, start_kernel(again), "1 + 1") == "2"
    assert keeper.http.post("/api/servers/lab/stop").status_code == 200
    headers = {"Authorization": f"token {again['token']}"}
    gone = httpx.get(f"{again['url']}api", headers=headers, trust_env=False)
    assert gone.status_code == 404


def test_a_suspended_edge_is_replaced_by_the_next_keeper(make_keeper):
    keeper = make_keeper().start()
    lab = at_edge(keeper, keeper.post(name="lab").json())
    keeper.kill()
    edge = edge_of(keeper)
    edge.suspend()
    keeper.start()
    assert not alive(edge.pid)
    assert run_cell(lab, start_kernel(lab), "1 + 1") == "2"


def test_another_build_takes_over_without_cutting_a_connection(make_keeper, tmp_path):
    """As after an upgrade of labkeeper: the new keeper brings another edge."""
    keeper = make_keeper().start()
    lab = at_edge(keeper, keeper.post(name="lab").json())
    old = edge_of(keeper)
    with kernel_websocket(lab, start_kernel(lab)) as opened:
        upgrade(keeper, tmp_path / "newer")
        assert set(edges_of(keeper)) > {old}
        assert execute(opened, "1 + 1") == "2"
        assert run_cell(lab, start_kernel(lab), "1 + 1") == "2"
    # The last connection of the old one is closed.
    until(lambda: not alive(old.pid), what="the old edge to end")
    left = (keeper.state_dir / "edge").iterdir
    until(lambda: sum(path.is_dir() for path in left()) == 1, what="its directory to be removed")


def test_a_changed_port_is_taken_and_the_old_one_given_up(make_keeper):
    keeper = make_keeper().start()
    lab = at_edge(keeper, keeper.post(name="lab").json())
    kernel, old = start_kernel(lab), keeper.port
    with kernel_websocket(lab, kernel) as opened:
        keeper.kill()
        keeper.port = free_port()
        keeper.start()
        assert execute(opened, "1 + 1") == "2"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", old))
    assert run_cell(at_edge(keeper, lab), kernel, "1 + 1") == "2"


@pytest.mark.promise
def test_it_is_left_with_the_servers_and_found_again(make_keeper):
    keeper = make_keeper(on_exit="leave").start()
    lab = at_edge(keeper, keeper.post(name="lab").json())
    kernel, edge = start_kernel(lab), edge_of(keeper)
    assert keeper.stop() == 0
    # Labs are there, without any keeper.
    assert run_cell(lab, kernel, "1 + 1") == "2"
    keeper.settings["on_exit"] = "stop"
    keeper.start()
    assert edge_of(keeper) == edge
    assert keeper.stop() == 0
    assert not edges_of(keeper)


def test_without_a_keeper_requests_get_a_clear_answer(make_keeper):
    keeper = make_keeper(on_exit="leave").start()
    keeper.post()
    assert keeper.stop() == 0
    answer = httpx.get(f"{keeper.url}/api/servers", timeout=PATIENCE, trust_env=False)
    assert answer.status_code == 503
    assert answer.headers["retry-after"].isdigit()
    assert answer.json()["detail"].startswith("cannot reach the keeper")
    keeper.settings["on_exit"] = "stop"
    keeper.start()


def test_it_ends_with_a_keeper_that_leaves_no_server(make_keeper):
    keeper = make_keeper(on_exit="leave").start()
    keeper.post()
    keeper.http.post("/api/servers/default/stop").raise_for_status()
    assert keeper.stop() == 0
    assert not edges_of(keeper)


def test_a_failed_start_leaves_no_edge(make_keeper):
    keeper = make_keeper()
    keeper.state_dir.mkdir()
    (keeper.state_dir / "labkeeper.sqlite").write_text("This is no database." * 100)
    failed = keeper.cli("serve")
    assert failed.returncode == 2, failed.stderr
    assert (keeper.state_dir / "edge").exists()
    assert not edges_of(keeper)


def test_it_does_not_take_a_port_that_another_program_has(make_keeper):
    keeper = make_keeper()
    with socket.create_server(("127.0.0.1", keeper.port)):
        failed = keeper.cli("serve")
    assert failed.returncode == 2
    assert f"cannot listen on 127.0.0.1 port {keeper.port}" in failed.stderr
    assert not edges_of(keeper)


def test_it_has_no_secrets_of_its_keeper(make_keeper):
    keeper = make_keeper(token="a-token-that-is-a-secret")
    keeper.variables["CLOUD_PASSWORD"] = "another-secret"
    keeper.start()
    keeper.post(name="lab")
    edge = edge_of(keeper)
    seen = str(edge.environ()) + str(edge.cmdline())
    assert "a-token-that-is-a-secret" not in seen
    assert "another-secret" not in seen
    key = (keeper.state_dir / "edge.key").read_text().strip()
    assert len(key) == 64
    assert key not in str(edge.environ()) + str(edge.cmdline())
    assert (keeper.state_dir / "edge.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.root
def test_a_root_keepers_edge_has_no_rights(make_keeper):
    keeper = make_keeper().start()
    edge = edge_of(keeper)
    assert 0 not in {*edge.uids(), *edge.gids()}
    capabilities = Path(f"/proc/{edge.pid}/status").read_text()
    assert "CapEff:\t0000000000000000" in capabilities
    assert "CapPrm:\t0000000000000000" in capabilities


COMMAND = """
import glob, sys
from pathlib import Path
from labkeeper.edge import wire
from labkeeper.serve.edge.link import Link
(directory,) = glob.glob({pattern!r})
try:
    Link.open(Path(directory), Path({key!r}).read_text().strip(), within=5)
except (OSError, EOFError, wire.WireError) as error:
    print("refused")
else:
    print("accepted")
"""


def test_what_a_server_starts_cannot_command_the_edge(make_keeper):
    """Even with the key, which a server of the keeper's own user can read."""
    keeper = make_keeper().start()
    server = keeper.post(name="lab").json()
    code = COMMAND.format(
        pattern=f"{keeper.state_dir}/edge/*/", key=str(keeper.state_dir / "edge.key")
    )
    kernel = start_kernel(server)
    assert run_cell(server, kernel, code) == "refused\n"
    hidden = (
        "import subprocess, sys\n"
        f"print(subprocess.run([sys.executable, '-c', {code!r}], env={{}}, start_new_session=True,"
        " capture_output=True, text=True).stdout, end='')"
    )
    assert run_cell(server, kernel, hidden) == "refused\n"


def test_large_files_pass_in_constant_memory(make_keeper):
    keeper = make_keeper().start()
    lab = at_edge(keeper, keeper.post(name="lab").json())
    size, piece = 200 * 2**20, os.urandom(2**20)
    (keeper.notebook_dir / "large").write_bytes(piece * (size // len(piece)))
    edge = edge_of(keeper)
    before = edge.memory_info().rss
    headers = {"Authorization": f"token {lab['token']}"}
    with httpx.stream(
        "GET", f"{lab['url']}files/large", headers=headers, timeout=PATIENCE, trust_env=False
    ) as answer:
        received = 0
        for data in answer.iter_bytes():
            received += len(data)
    assert received == size
    assert edge.memory_info().rss - before < 20 * 2**20


def test_an_interrupt_at_the_terminal_ends_keeper_and_edge(make_keeper):
    keeper = make_keeper().start()
    edge = edge_of(keeper)
    keeper.process.send_signal(signal.SIGINT)
    assert keeper.process.wait(PATIENCE) == 0
    assert not alive(edge.pid)


@pytest.mark.promise
def test_labs_can_stay_at_their_own_ports(make_keeper):
    keeper = make_keeper(lab_address="port").start()
    server = keeper.post(name="lab").json()
    assert server["base_url"] == "/"
    assert server["lab_url"] == f"{server['url']}lab?token={server['token']}"
    assert run_cell(server, start_kernel(server), "1 + 1") == "2"
    headers = {"Authorization": f"token {server['token']}"}
    refused = httpx.get(f"{keeper.url}/servers/lab/api", headers=headers, trust_env=False)
    assert refused.status_code == 404
    # A Lab keeps its address until it is launched again.
    keeper.kill()
    keeper.settings["lab_address"] = "path"
    keeper.start()
    assert keeper.wait_for("running", "lab")["lab_url"] == server["lab_url"]
    assert keeper.http.post("/api/servers/lab/restart").status_code in {200, 201}
    assert keeper.get("lab")["lab_url"] == f"{keeper.url}/servers/lab/lab"


# Without it


def test_without_the_edge_the_keeper_listens_itself(make_keeper):
    keeper = make_keeper(edge="off").start()
    server = keeper.post().json()
    assert server["lab_url"] == f"{server['url']}lab?token={server['token']}"
    assert keeper.http.post("/api/servers", content=b"x" * 2**21).status_code == 413
    assert httpx.get(f"{keeper.url}/api/servers", trust_env=False).status_code == 401
    assert edges_of(keeper) == []


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"host": "0.0.0.0"}, "LABKEEPER_HOST"),
        ({"host": "::"}, "LABKEEPER_HOST"),
        ({"lab_domain": "labs.example.org"}, "LABKEEPER_LAB_DOMAIN"),
        ({"trusted_proxies": "127.0.0.1"}, "LABKEEPER_TRUSTED_PROXIES"),
        ({"cert_file": "cert.pem", "key_file": "key.pem"}, "LABKEEPER_CERT_FILE"),
    ],
)
def test_what_needs_the_edge_is_refused_without_it(make_keeper, settings, name):
    refused = make_keeper(edge="off", **settings).cli("serve")
    assert refused.returncode == 2
    assert name in refused.stderr
    assert "LABKEEPER_EDGE=off" in refused.stderr
