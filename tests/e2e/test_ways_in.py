"""Ways to reach a keeper: its port, with and without TLS, and its Unix socket."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import trustme

from harness import PATIENCE, run_cell, until
from labkeeper import discovery


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture
def ca_file(authority, tmp_path):
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return path


@pytest.fixture
def issue(authority, tmp_path):
    """Return a function that writes a new certificate and key, replacing earlier ones."""

    def write(which="", name="127.0.0.1"):
        leaf = authority.issue_cert(name)
        paths = {}
        for part, content in (("key", leaf.private_key_pem), ("cert", leaf.cert_chain_pems[0])):
            paths[f"{which}{part}_file"] = path = tmp_path / f"{which}{part}.pem"
            content.write_to_path(str(path))
            path.chmod(0o600)
        return paths

    return write


def certificate_serial(address, authority):
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with (
        socket.create_connection(address, timeout=PATIENCE) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        return connection.getpeercert()["serialNumber"]


def unix_socket_client(keeper):
    path = discovery.read_socket(keeper.state_dir)
    return httpx.Client(
        transport=httpx.HTTPTransport(uds=str(path)), base_url="http://keeper", timeout=PATIENCE
    )


def test_unix_socket_is_private_replaced_after_a_crash_and_removed_on_exit(
    make_keeper,
):
    keeper = make_keeper().start()
    path = discovery.read_socket(keeper.state_dir)
    assert path == keeper.state_dir / "keeper.sock"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with unix_socket_client(keeper) as client:
        assert client.get("/readyz").status_code == 200
    keeper.kill()
    assert path.exists()
    keeper.start()
    with unix_socket_client(keeper) as client:
        assert client.get("/readyz").status_code == 200
    assert keeper.stop() == 0
    assert not path.exists()
    assert discovery.read_socket(keeper.state_dir) is None


def test_keeper_runs_without_a_unix_socket_if_its_path_is_too_long(make_keeper, tmp_path):
    keeper = make_keeper()
    keeper.state_dir = tmp_path / ("long" * 30)
    keeper.start()
    assert discovery.read_socket(keeper.state_dir) is None
    entries = [
        json.loads(line) for line in keeper.log.read_text().splitlines() if "Unix socket" in line
    ]
    assert [entry["level"] for entry in entries] == ["warning"]


def test_keeper_serves_tls_and_reloads_its_certificate(make_keeper, authority, ca_file, issue):
    keeper = make_keeper(**issue())
    keeper.verify = ssl.create_default_context(cafile=ca_file)
    keeper.start()
    assert discovery.read_address(keeper.state_dir) == keeper.url
    assert keeper.url.startswith("https:")
    # The CLI finds the keeper, and trusts only the authority it is given.
    keeper.variables["LABKEEPER_CA_FILE"] = ca_file
    listed = keeper.cli("ls", "--url", keeper.url)
    assert listed.returncode == 0, listed.stderr
    del keeper.variables["LABKEEPER_CA_FILE"]
    assert keeper.cli("ls", "--url", keeper.url).returncode == 3
    # Events are streamed as they happen.
    with keeper.http.stream(
        "GET", "/api/events", headers={"Accept": "text/event-stream"}
    ) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("retry:")
        assert keeper.http.post("/api/servers", params={"wait": 0}, json={}).status_code == 202
        assert any('"server":"default"' in line.replace(" ", "") for line in lines)
    address = ("127.0.0.1", keeper.port)
    before = certificate_serial(address, authority)
    issue()
    until(lambda: certificate_serial(address, authority) != before, what="the new certificate")


HEALTHCHECK = Path(__file__).parents[2] / "docker" / "healthcheck"


def run_healthcheck(keeper):
    """Run the healthcheck as a container engine does; return its exit code and output."""
    command = [sys.executable, HEALTHCHECK]
    done = subprocess.run(
        command,
        env=keeper.environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return done.returncode, done.stdout


def test_healthcheck_passes_whatever_the_name_in_the_certificate(make_keeper, ca_file, issue):
    """The healthcheck uses the Unix socket; once the keeper has stopped, it fails."""
    keeper = make_keeper(**issue(name="labs.example.org"))
    keeper.verify = ssl.create_default_context(cafile=ca_file)
    keeper.verify.check_hostname = False
    keeper.start()
    assert run_healthcheck(keeper) == (0, '{"status":"ok"}\n')
    keeper.stop()
    assert run_healthcheck(keeper) == (1, "")


def test_healthcheck_falls_back_to_the_port_without_a_unix_socket(make_keeper, tmp_path):
    keeper = make_keeper()
    keeper.state_dir = tmp_path / ("long" * 30)
    keeper.start()
    assert run_healthcheck(keeper) == (0, '{"status":"ok"}\n')
    keeper.kill()
    code, output = run_healthcheck(keeper)
    assert (code, output) == (1, "")


def test_unusable_certificate_is_reported_in_one_line(make_keeper, issue, tmp_path):
    keeper = make_keeper(**issue() | {"key_file": tmp_path / "absent.pem"})
    ended = keeper.cli("serve")
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
    assert "absent.pem (LABKEEPER_KEY_FILE)" in ended.stderr


def test_servers_serve_tls_and_reload_their_certificate(
    make_keeper, authority, ca_file, issue, monkeypatch
):
    keeper = make_keeper(**issue("lab_"), launch_by="fork").start()
    answer = keeper.post()
    assert answer.status_code == 201, answer.text
    server = answer.json()
    assert server["url"].startswith("https:")
    assert server["lab_url"].startswith("https:")
    assert server["secure"] is True
    headers = {"Authorization": f"token {server['token']}"}
    trusting = ssl.create_default_context(cafile=ca_file)
    with httpx.Client(
        base_url=server["url"], headers=headers, verify=trusting, trust_env=False, timeout=PATIENCE
    ) as lab:
        kernel = lab.post("api/kernels", json={"name": "python3"}).json()["id"]
    monkeypatch.setenv("WEBSOCKET_CLIENT_CA_BUNDLE", str(ca_file))
    assert run_cell(server, kernel, "6 * 7") == "42"
    # The keeper passes on what it requests from the server, too.
    assert [
        one["id"] for one in keeper.http.get("/api/servers/default/kernels").json()["kernels"]
    ] == [kernel]
    address = ("127.0.0.1", server["port"])
    before = certificate_serial(address, authority)
    issue("lab_")
    assert certificate_serial(address, authority) != before
    assert keeper.delete().json()["stop_report"]["method"] == "shutdown"


def test_idle_connections_do_not_deny_service(make_keeper):
    keeper = make_keeper().start()
    headers = {"Authorization": f"Bearer {keeper.token}"}
    with contextlib.ExitStack() as crowd:
        for _ in range(2500):
            crowd.enter_context(
                socket.create_connection(("127.0.0.1", keeper.port), timeout=PATIENCE)
            )
        assert (
            httpx.get(
                f"{keeper.url}/api/servers", headers=headers, timeout=PATIENCE, trust_env=False
            ).status_code
            == 200
        )
        with unix_socket_client(keeper) as client:
            assert client.get("/readyz").status_code == 200


def test_serve_start_works_with_a_certificate_for_another_name(make_keeper, authority, tmp_path):
    leaf = authority.issue_cert("notebooks.example.org")
    leaf.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    leaf.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    keeper = make_keeper(cert_file=tmp_path / "cert.pem", key_file=tmp_path / "key.pem")
    with keeper.log.open("ab") as log:
        keeper.process = subprocess.Popen(
            keeper.command("serve", "--start"), env=keeper.environment, stdout=log, stderr=log
        )
    until(lambda: "JupyterLab is ready" in keeper.log.read_text(), what="the server to be ready")
    assert keeper.process.poll() is None
    keeper.process.terminate()
    assert keeper.process.wait(PATIENCE) == 0
