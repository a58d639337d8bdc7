"""Start and stop real servers, with kernels here or on a gateway, and leave nothing behind."""

from __future__ import annotations

import concurrent.futures
import http.server
import threading

import httpx
import psutil
import pytest
import trustme

from gateway_servers import KernelGateway, stopped_or_left
from harness import (
    alive,
    everything_below,
    free_port,
    port_is_free,
    processes_marked,
    run_cell,
    servers_in,
    start_kernel,
    until,
)

SERVER_INFO = {
    "base_url",
    "hostname",
    "notebook_dir",
    "password",
    "pid",
    "port",
    "secure",
    "token",
    "url",
}


def assert_gone(keeper, server):
    assert not alive(server["pid"])
    assert not processes_marked(keeper.server_dirs / server["name"])
    assert not (keeper.server_dirs / server["name"]).exists()
    assert port_is_free(server["port"])


@pytest.mark.promise
def test_kernels_run_on_the_gateway_and_end_with_their_server(keeper, gateway):
    answer = keeper.http.post(
        "/api/servers",
        json={
            "gateway-url": gateway.url,
            "gateway-auth-token": gateway.token,
            "gateway-request-timeout": 20,
        },
    )
    assert answer.status_code == 201, answer.text
    server = answer.json()
    assert all(server[field] is not None for field in SERVER_INFO)
    assert (server["port"], server["notebook_dir"]) == (keeper.lab_port, str(keeper.notebook_dir))

    before = gateway.children()
    kernel = start_kernel(server)
    assert run_cell(server, kernel, "1+1") == "2"
    assert kernel in gateway.kernels()
    kernel_pid = int(run_cell(server, kernel, "import os; os.getpid()"))
    assert kernel_pid in gateway.children() - before
    listed = keeper.http.get("/api/servers/default/kernels").json()["kernels"]
    assert [entry["id"] for entry in listed] == [kernel]

    answer = keeper.delete()
    assert answer.status_code == 200, answer.text
    report = answer.json()["stop_report"]
    assert (report["method"], stopped_or_left(report)) == ("shutdown", {kernel})
    until(lambda: kernel not in gateway.kernels(), what="the kernel to be ended")
    until(lambda: not alive(kernel_pid), what="the kernel's process to end")
    assert_gone(keeper, server)
    assert keeper.http.get("/api/servers/default").status_code == 404


def test_gateway_with_a_private_ca_is_trusted_only_with_gateway_ca_certs(keeper, tmp_path):
    """Without a client certificate, too, where Jupyter ignores its own option; and by websocket."""
    gateway = KernelGateway(tmp_path / "gateway", authority=trustme.CA()).start()
    try:
        options = {"gateway_url": gateway.url, "gateway_auth_token": gateway.token}
        trusting = keeper.post(
            gateway_ca_certs=str(tmp_path / "gateway" / "ca.pem"), **options
        ).json()
        kernel = start_kernel(trusting)
        assert run_cell(trusting, kernel, "1+1") == "2"
        assert stopped_or_left(keeper.delete().json()["stop_report"]) == {kernel}
        until(lambda: gateway.kernels() == set(), what="the kernel to be ended")
        refused = keeper.post(name="wary", **options)
        assert (refused.status_code, refused.json()["failure_class"]) == (502, "gateway-tls")
        assert "gateway_ca_certs" in refused.json()["detail"]
    finally:
        gateway.stop()


def test_unreadable_gateway_ca_certs_fail_the_start(keeper, tmp_path):
    (tmp_path / "ca.der").write_bytes(b"\x30\x82\xff\xfe")
    answer = keeper.post(
        gateway_url="https://127.0.0.1:1", gateway_ca_certs=str(tmp_path / "ca.der")
    )
    assert (answer.status_code, answer.json()["failure_class"]) == (502, "config-error")


@pytest.mark.promise
def test_local_kernels_and_their_children_end_with_their_server(keeper):
    answer = keeper.post()
    assert answer.status_code == 201, answer.text
    assert answer.headers["Location"] == "/api/servers/default"
    server = answer.json()
    assert all(server[field] is not None for field in SERVER_INFO)

    kernel = start_kernel(server)
    assert run_cell(server, kernel, "1+1") == "2"
    kernel_pid = int(run_cell(server, kernel, "import os; os.getpid()"))
    # A child that leaves the kernel's session and outlives the kernel is still found.
    stray = int(
        run_cell(
            server,
            kernel,
            "import subprocess;"
            " print(subprocess.Popen(['sleep', '1000'], start_new_session=True).pid)",
        )
    )

    # So is one without its environment, as long as it has not left the kernel's process tree.
    hidden = int(
        run_cell(
            server,
            kernel,
            "print(subprocess.Popen(['/bin/sleep', '1000'], start_new_session=True, env={}).pid)",
        )
    )

    report = keeper.delete().json()["stop_report"]
    assert (report["method"], report["kernels_stopped"]) == ("shutdown", [kernel])
    assert not alive(hidden)
    assert report["seconds"] > 0
    assert not alive(kernel_pid)
    assert not alive(stray)
    assert_gone(keeper, server)


@pytest.mark.promise
def test_lab_url_at_a_port_opens_the_lab_without_a_login(make_keeper):
    server = make_keeper(lab_address="port").start().post().json()
    with httpx.Client(trust_env=False) as browser:
        page = browser.get(server["lab_url"], follow_redirects=True)
    assert page.status_code == 200
    assert "<title>JupyterLab</title>" in page.text


@pytest.mark.promise
def test_server_has_the_requested_settings(keeper):
    (keeper.notebook_dir / "class").mkdir()
    answer = keeper.post(
        name="alice",
        root_dir="class",
        base_url="/hub/alice",
        default_url="/tree",
        env={"COLOUR": "blue"},
        labels={"team": "a"},
    )
    assert answer.status_code == 201, answer.text
    server = answer.json()
    assert server["base_url"] == "/servers/alice/hub/alice/"
    assert server["notebook_dir"] == str(keeper.notebook_dir / "class")
    assert server["port"] != keeper.lab_port
    assert server["url"] == f"http://127.0.0.1:{server['port']}/servers/alice/hub/alice/"
    assert server["lab_url"] == f"{keeper.url}/servers/alice/hub/alice/tree"
    kernel = start_kernel(server)
    # None of the keeper's settings reach a kernel, least of all its token.
    assert (
        run_cell(server, kernel, "import os; print(os.environ['COLOUR'], os.getcwd())").strip()
        == f"blue {server['notebook_dir']}"
    )
    seen = run_cell(server, kernel, "print([n for n in os.environ if n.startswith('LABKEEPER')])")
    assert seen.strip() == "['LABKEEPER_SERVER']"
    listed = keeper.http.get("/api/servers", params={"label": "team=a", "state": "running"}).json()
    assert [entry["name"] for entry in listed["servers"]] == ["alice"]
    assert keeper.http.get("/api/servers", params={"label": "team=b"}).json()["servers"] == []


@pytest.mark.promise
def test_repeated_request_is_idempotent_and_a_different_spec_is_refused(keeper):
    first = keeper.post()
    second = keeper.post()
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json()["pid"] == second.json()["pid"]
    assert len(servers_in(keeper.server_dirs)) == 1

    other = keeper.post(base_url="/elsewhere", env={"A": "1"})
    assert other.status_code == 409
    assert set(other.json()["differs"]) == {"base_url", "env"}
    assert "base_url, env" in other.json()["detail"]
    assert keeper.get()["pid"] == first.json()["pid"]


@pytest.mark.promise
def test_64_identical_concurrent_requests_start_one_server(keeper):
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda _: keeper.post(), range(64)))
    assert sorted(answer.status_code for answer in answers) == [200] * 63 + [201]
    assert len({answer.json()["pid"] for answer in answers}) == 1
    assert len({answer.json()["token"] for answer in answers}) == 1
    assert len(servers_in(keeper.server_dirs)) == 1


class _FakeJupyter(http.server.BaseHTTPRequestHandler):
    """Answers every request with 200, as a Jupyter server without a token would."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_):
        pass


@pytest.fixture
def occupied_port():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", free_port()), _FakeJupyter)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.promise
def test_port_in_use_by_another_process_fails_the_start(keeper, occupied_port):
    answer = keeper.post(port=occupied_port)
    assert answer.status_code == 502
    problem = answer.json()
    assert (problem["code"], problem["failure_class"]) == ("start_failed", "port-in-use")
    assert str(occupied_port) in problem["detail"]
    server = keeper.get()
    assert (server["state"], server["port"], server["url"]) == ("failed", None, None)
    assert not processes_marked(keeper.server_dirs, rehearsals=False)


@pytest.mark.promise
def test_stopped_server_keeps_its_spec_and_can_be_started_again(keeper):
    first = keeper.post(labels={"kept": "yes"}).json()
    stopped = keeper.post("/default/stop")
    assert stopped.status_code == 200
    assert stopped.json()["state"] == "stopped"
    assert stopped.json()["pid"] is None
    assert_gone(keeper, first)

    again = keeper.post("/default/start")
    assert again.status_code == 201
    assert again.json()["labels"] == {"kept": "yes"}
    assert again.json()["token"] != first["token"]

    restarted = keeper.post("/default/restart")
    assert restarted.status_code == 201
    assert restarted.json()["pid"] != again.json()["pid"]
    assert not alive(again.json()["pid"])
    assert restarted.json()["restarts"] == 0


@pytest.mark.promise
def test_wait_0_returns_at_once_and_the_state_can_be_awaited_later(keeper):
    answer = keeper.http.post("/api/servers?wait=0", json={})
    assert answer.status_code == 202
    assert answer.json()["state"] == "starting"
    assert keeper.wait_for("running")["pid"]
    answer = keeper.delete(wait=0)
    assert (answer.status_code, answer.json()["state"]) == (202, "stopping")


@pytest.mark.promise
def test_force_kills_the_server(keeper):
    server = keeper.post().json()
    answer = keeper.delete(force="true")
    assert answer.status_code == 200
    assert answer.json()["stop_report"]["method"] == "sigkill"
    assert_gone(keeper, server)


@pytest.mark.promise
def test_secrets_are_in_no_argument_list_and_no_readable_file(keeper, gateway):
    answer = keeper.post(gateway_url=gateway.url, gateway_auth_token=gateway.token)
    assert answer.status_code == 201, answer.text
    secrets = [answer.json()["token"].encode(), gateway.token.encode(), keeper.token.encode()]
    for process in [psutil.Process(answer.json()["pid"]), psutil.Process(keeper.process.pid)]:
        assert not [secret for secret in secrets if secret in " ".join(process.cmdline()).encode()]
    for found in everything_below(keeper.base):
        if any(secret in found.content for secret in secrets):
            assert found.mode & 0o077 == 0, found.path
    for log in (keeper.log, *(keeper.state_dir / "logs").iterdir()):
        assert not [secret for secret in secrets if secret in log.read_bytes()], log
    assert (keeper.server_dirs / "default").stat().st_mode & 0o077 == 0
    assert keeper.state_dir.stat().st_mode & 0o777 == 0o700
