"""How a keeper is reached: by its port, with TLS or without, and by its Unix socket. Real keepers, real servers."""

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
    """Write a new certificate and its key, over the ones before."""

    def write(which="", name="127.0.0.1"):
        leaf = authority.issue_cert(name)
        paths = {}
        for part, content in (("key", leaf.private_key_pem), ("cert", leaf.cert_chain_pems[0])):
            paths[f"{which}{part}_file"] = path = tmp_path / f"{which}{part}.pem"
            content.write_to_path(str(path))
            path.chmod(0o600)
        return paths

    return write


def serial(address, authority):
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with (
        socket.create_connection(address, timeout=PATIENCE) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
    ):
        return connection.getpeercert()["serialNumber"]


def local(keeper):
    path = discovery.read_socket(keeper.state_dir)
    return httpx.Client(
        transport=httpx.HTTPTransport(uds=str(path)), base_url="http://keeper", timeout=PATIENCE
    )


def test_the_unix_socket_is_its_users_only_outlives_a_crash_by_nothing_and_goes_with_the_keeper(
    make_keeper,
):
    keeper = make_keeper().start()
    path = discovery.read_socket(keeper.state_dir)
    assert path == keeper.state_dir / "keeper.sock"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with local(keeper) as client:
        assert client.get("/readyz").status_code == 200
    keeper.kill()
    assert path.exists()
    keeper.start()
    with local(keeper) as client:
        assert client.get("/readyz").status_code == 200
    assert keeper.stop() == 0
    assert not path.exists()
    assert discovery.read_socket(keeper.state_dir) is None


def test_where_no_unix_socket_can_be_made_the_keeper_says_so_once_and_goes_on(
    make_keeper, tmp_path
):
    keeper = make_keeper()
    keeper.state_dir = tmp_path / ("long" * 30)
    keeper.start()
    assert discovery.read_socket(keeper.state_dir) is None
    said = [
        json.loads(line) for line in keeper.log.read_text().splitlines() if "Unix socket" in line
    ]
    assert [entry["level"] for entry in said] == ["warning"]


def test_a_keeper_speaks_tls_and_takes_a_new_certificate_without_a_restart(
    make_keeper, authority, ca_file, issue
):
    keeper = make_keeper(**issue())
    keeper.verify = ssl.create_default_context(cafile=ca_file)
    keeper.start()
    assert discovery.read_address(keeper.state_dir) == keeper.url
    assert keeper.url.startswith("https:")
    # The command line finds it, and trusts whom it is told to.
    keeper.variables["LABKEEPER_CA_FILE"] = ca_file
    listed = keeper.cli("ls", "--url", keeper.url)
    assert listed.returncode == 0, listed.stderr
    del keeper.variables["LABKEEPER_CA_FILE"]
    assert keeper.cli("ls", "--url", keeper.url).returncode == 3
    # What has happened is told as it happens.
    with keeper.http.stream(
        "GET", "/api/events", headers={"Accept": "text/event-stream"}
    ) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("retry:")
        assert keeper.http.post("/api/servers", params={"wait": 0}, json={}).status_code == 202
        assert any('"server":"default"' in line.replace(" ", "") for line in lines)
    address = ("127.0.0.1", keeper.port)
    before = serial(address, authority)
    issue()
    until(lambda: serial(address, authority) != before, what="the new certificate")


HEALTHCHECK = Path(__file__).parents[2] / "docker" / "healthcheck"


def health(keeper):
    """Look as the engine of a container does; give the exit code, and what was said."""
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


def test_a_container_is_healthy_whatever_name_its_certificate_is_for(make_keeper, ca_file, issue):
    """Its check asks over the Unix socket; and when the keeper has ended it says so."""
    keeper = make_keeper(**issue(name="labs.example.org"))
    keeper.verify = ssl.create_default_context(cafile=ca_file)
    keeper.verify.check_hostname = False
    keeper.start()
    assert health(keeper) == (0, '{"status":"ok"}\n')
    keeper.stop()
    assert health(keeper) == (1, "")


def test_a_container_without_a_unix_socket_is_asked_by_its_port(make_keeper, tmp_path):
    keeper = make_keeper()
    keeper.state_dir = tmp_path / ("long" * 30)
    keeper.start()
    assert health(keeper) == (0, '{"status":"ok"}\n')
    keeper.kill()
    code, said = health(keeper)
    assert (code, said) == (1, "")


def test_a_certificate_that_cannot_be_used_ends_the_start_in_one_line(make_keeper, issue, tmp_path):
    keeper = make_keeper(**issue() | {"key_file": tmp_path / "absent.pem"})
    ended = keeper.cli("serve")
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
    assert "absent.pem (LABKEEPER_KEY_FILE)" in ended.stderr


def test_servers_speak_tls_and_take_a_new_certificate_without_a_restart(
    make_keeper, authority, ca_file, issue, monkeypatch
):
    keeper = make_keeper(**issue("lab_"), launch_by="fork").start()
    answer = keeper.post()
    assert answer.status_code == 201, answer.text
    server = answer.json()
    assert server["url"].startswith("https:")
    assert server["lab_url"].startswith("https:")
    assert server["secure"] is True
    known = {"Authorization": f"token {server['token']}"}
    trusting = ssl.create_default_context(cafile=ca_file)
    with httpx.Client(
        base_url=server["url"], headers=known, verify=trusting, trust_env=False, timeout=PATIENCE
    ) as lab:
        kernel = lab.post("api/kernels", json={"name": "python3"}).json()["id"]
    monkeypatch.setenv("WEBSOCKET_CLIENT_CA_BUNDLE", str(ca_file))
    assert run_cell(server, kernel, "6 * 7") == "42"
    # What the keeper asks it passes, too.
    assert [
        one["id"] for one in keeper.http.get("/api/servers/default/kernels").json()["kernels"]
    ] == [kernel]
    address = ("127.0.0.1", server["port"])
    before = serial(address, authority)
    issue("lab_")
    assert serial(address, authority) != before
    assert keeper.delete().json()["stop_report"]["method"] == "shutdown"


def test_a_crowd_that_only_connects_keeps_nobody_out(make_keeper):
    keeper = make_keeper().start()
    known = {"Authorization": f"Bearer {keeper.token}"}
    with contextlib.ExitStack() as crowd:
        for _ in range(2500):
            crowd.enter_context(
                socket.create_connection(("127.0.0.1", keeper.port), timeout=PATIENCE)
            )
        assert (
            httpx.get(
                f"{keeper.url}/api/servers", headers=known, timeout=PATIENCE, trust_env=False
            ).status_code
            == 200
        )
        with local(keeper) as client:
            assert client.get("/readyz").status_code == 200


def test_the_first_server_starts_also_where_the_certificate_is_for_another_name(
    make_keeper, authority, tmp_path
):
    leaf = authority.issue_cert("notebooks.example.org")
    leaf.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    leaf.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    keeper = make_keeper(cert_file=tmp_path / "cert.pem", key_file=tmp_path / "key.pem")
    with keeper.log.open("ab") as log:
        keeper.process = subprocess.Popen(
            keeper.command("serve", "--start"), env=keeper.environment, stdout=log, stderr=log
        )
    until(lambda: "JupyterLab is ready" in keeper.log.read_text(), what="a first server")
    assert keeper.process.poll() is None
    keeper.process.terminate()
    assert keeper.process.wait(PATIENCE) == 0
