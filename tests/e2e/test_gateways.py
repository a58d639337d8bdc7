"""Servers with working, broken, slow and hostile gateways."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from pathlib import Path

import httpx
import pytest

from gateway_servers import (
    REAL,
    EnterpriseGateway,
    HostileGateway,
    KernelGateway,
    stopped_or_left,
)
from harness import (
    PATIENCE,
    KeeperProcess,
    alive,
    free_port,
    processes_marked,
    run_cell,
    start_kernel,
    until,
)

pytestmark = pytest.mark.gateways
GRACE = 4.0
GATEWAY_TIMEOUT = 1.5


@pytest.fixture(scope="module", params=REAL)
def _shared_real(request, tmp_path_factory):
    running = REAL[request.param](tmp_path_factory.mktemp(request.param)).start()
    yield running
    running.stop()


@pytest.fixture
def real_gateway(_shared_real):
    """Each of the real gateways, without kernels; shared by the tests of this module."""
    # Kernels of servers that the previous test force-deleted end a moment later.
    until(lambda: not _shared_real.kernels(), what="the gateway to have no kernels")
    return _shared_real


@pytest.fixture
def own_gateway(request, tmp_path):
    """A real gateway for one test, which may do anything to it."""
    running = REAL[getattr(request, "param", "kernel-gateway")](tmp_path / "gateway").start()
    yield running
    running.stop()


QUICK = {
    "gateway_timeout": GATEWAY_TIMEOUT,
    "gateway_period": 1,
    "stop_grace": GRACE,
    "kill_wait": 1,
    "probe_period": 0.5,
}


@pytest.fixture(scope="module")
def _shared(tmp_path_factory):
    running = KeeperProcess(
        tmp_path_factory.mktemp("quick") / "keeper", hung_after=4, **QUICK
    ).start_to_fork()
    yield running
    running.close()


@pytest.fixture
def shared_keeper(_shared):
    """A keeper that probes gateways often, with a short timeout; shared by this module's tests."""
    yield _shared
    _shared.clear()


@pytest.fixture
def own_keeper(make_keeper):
    """A keeper for one test, which may stop it."""
    return make_keeper(hung_after=4, **QUICK).start()


def jupyter_request(server, method, path, **given):
    """Send a request to a JupyterLab as its own pages do."""
    headers = {"Authorization": f"token {server['token']}"}
    answer = httpx.request(
        method,
        f"{server['url']}{path}",
        headers=headers,
        timeout=PATIENCE,
        trust_env=False,
        **given,
    )
    answer.raise_for_status()
    return answer.json()


def start_session(server, path="work.ipynb"):
    """Open a notebook, and return the id of its kernel."""
    body = {"path": path, "name": path, "type": "notebook", "kernel": {"name": "python3"}}
    return jupyter_request(server, "POST", "api/sessions", json=body)["kernel"]["id"]


def sessions(server):
    return {
        (session["path"], session["kernel"]["id"])
        for session in jupyter_request(server, "GET", "api/sessions")
    }


def orphans(keeper, gateway):
    """Return the ids of the orphaned kernels on this gateway.

    On a gateway of an earlier test, which has ended, some may be left for good.
    """
    return [
        orphan["kernel_id"]
        for orphan in keeper.http.get("/api/orphaned-kernels").json()["orphaned_kernels"]
        if orphan["gateway_url"] == gateway.url
    ]


def logged_events(keeper, events):
    """Return those of the given events that the keeper logged, in order."""
    lines = [
        json.loads(line) for line in keeper.log.read_text().splitlines() if line.startswith("{")
    ]
    return [line["event"] for line in lines if line["event"] in events]


def unread_bytes(port):
    """Return the number of bytes that the owner of a port has yet to read."""
    connections = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    established = [
        fields for fields in connections if fields[1].endswith(f":{port:04X}") and fields[3] == "01"
    ]
    return sum(int(fields[4].partition(":")[2], 16) for fields in established)


# Before a start


@pytest.mark.parametrize(
    ("mode", "kind", "advice"),
    [
        ("401", "gateway-refused", "gateway_auth_token"),
        ("403", "gateway-refused", "gateway_auth_token"),
        ("hang", "gateway-timeout", "LABKEEPER_GATEWAY_TIMEOUT"),
        ("drip", "gateway-timeout", "LABKEEPER_GATEWAY_TIMEOUT"),
        ("die", "gateway-unreachable", "look at it"),
        ("500", "gateway-unreachable", "try later"),
        ("html", "not-a-gateway", "host, port and path"),
        ("redirect", "not-a-gateway", "login.example"),
        ("garbage", "not-a-gateway", "port of gateway_url"),
    ],
)
def test_unusable_gateway_fails_the_start_with_a_class_and_advice(
    shared_keeper, mode, kind, advice
):
    with HostileGateway(mode) as gateway:
        answer = shared_keeper.post(**gateway.options)
        assert answer.status_code == 502, answer.text
        assert answer.json()["failure_class"] == kind
        assert gateway.url in answer.json()["detail"]
        assert advice in answer.json()["detail"]
        failed = shared_keeper.get()
        assert (failed["state"], failed["failure"]["failure_class"], failed["pid"]) == (
            "failed",
            kind,
            None,
        )
        assert not processes_marked(shared_keeper.server_dirs, rehearsals=False)


def test_closed_port_and_wrong_scheme_are_distinguished(shared_keeper, real_gateway):
    unreachable = shared_keeper.post(
        name="one", gateway_url=f"http://127.0.0.1:{free_port()}"
    ).json()
    assert (unreachable["failure_class"], "start it" in unreachable["detail"]) == (
        "gateway-unreachable",
        True,
    )
    tls = shared_keeper.post(
        name="two",
        gateway_url=real_gateway.url.replace("http:", "https:"),
        gateway_auth_token=real_gateway.token,
    ).json()
    assert (tls["failure_class"], "use http://" in tls["detail"]) == ("gateway-tls", True)


def test_wrong_gateway_token_fails_the_start(shared_keeper, real_gateway):
    answer = shared_keeper.post(
        name="one", gateway_url=real_gateway.url, gateway_auth_token="wrong"
    )
    assert (answer.status_code, answer.json()["failure_class"]) == (502, "gateway-refused")
    answer = shared_keeper.post(name="two", **real_gateway.options)
    assert answer.status_code == 201, answer.text
    health = answer.json()["gateway"]
    assert (health["reachable"], health["error"], health["kernelspecs"]) == (True, None, 1)


def test_server_starts_without_a_gateway_that_is_not_required(shared_keeper, own_gateway):
    own_gateway.process.terminate()
    own_gateway.process.wait()
    answer = shared_keeper.post(**own_gateway.options, require_gateway=False)
    assert answer.status_code == 201, answer.text
    gateway = until(
        lambda: (g := shared_keeper.get()["gateway"])["reachable"] is False and g,
        what="the API to report the gateway as unreachable",
    )
    assert (gateway["required"], gateway["error"]["failure_class"]) == (
        False,
        "gateway-unreachable",
    )


# While a server runs


def test_gateway_health_is_reported_while_a_server_runs(own_keeper):
    with HostileGateway() as gateway:
        own_keeper.post(**gateway.options)
        healthy = own_keeper.get()["gateway"]
        assert (healthy["reachable"], healthy["kernelspecs"]) == (True, 1)

        gateway.mode = "500"
        unhealthy = until(
            lambda: (g := own_keeper.get()["gateway"])["reachable"] is False and g,
            what="the API to report the gateway as unreachable",
        )
        assert unhealthy["since"] > healthy["since"]
        assert "500" in unhealthy["error"]["message"]
        gateway.mode = "well"
        recovered = until(
            lambda: (g := own_keeper.get()["gateway"])["reachable"] and g,
            what="the API to report the gateway as reachable",
        )
        assert recovered["since"] > unhealthy["since"]
        assert (recovered["error"], recovered["kernelspecs"]) == (None, 1)

        assert own_keeper.get()["state"] == "running"
        assert logged_events(own_keeper, {"gateway cannot be used", "gateway answers"}) == [
            "gateway cannot be used",
            "gateway answers",
        ]


def test_gateway_is_probed_once_for_all_of_its_servers(shared_keeper):
    with HostileGateway() as gateway, HostileGateway() as other:

        def looks(at=gateway):
            return at.count("GET", "/api/kernelspecs")

        def pass_time(seconds):
            """Wait until the other gateway has been probed that often, once a second."""
            end = looks(other) + seconds
            until(lambda: looks(other) >= end, what="probes of the other gateway")

        assert shared_keeper.post(name="other", **other.options).status_code == 201
        for name in ("one", "two", "three"):
            assert shared_keeper.post(name=name, **gateway.options).status_code == 201
        before = looks() - looks(other)
        pass_time(5)
        # The shared gateway is probed as often as the other one, give or take a probe in progress.
        assert abs(looks() - looks(other) - before) <= 2
        for name in ("one", "two", "three"):
            shared_keeper.delete(name)
        before = looks()
        pass_time(3)
        assert looks() == before


# Stop


@pytest.mark.parametrize("trouble", ["gone", "hangs", "answers 500"])
def test_stop_with_an_unusable_gateway_reports_and_later_ends_orphaned_kernels(
    shared_keeper, trouble
):
    with HostileGateway() as gateway:
        server = shared_keeper.post(**gateway.options).json()
        kernels = {start_kernel(server) for _ in range(3)}
        if trouble == "gone":
            gateway.stop()
        else:
            gateway.mode = {"hangs": "hang", "answers 500": "500"}[trouble]
        # A hanging gateway hangs for longer than the test waits.
        answer = shared_keeper.delete()
        assert answer.status_code == 200, answer.text
        report = answer.json()["stop_report"]
        assert set(report["kernels_left"]) == kernels
        assert report["kernels_stopped"] == []
        assert not alive(server["pid"])
        assert set(orphans(shared_keeper, gateway)) == kernels

        # The gateway recovers; it also has a kernel that was never ours.
        gateway.kernels["stranger"] = {"id": "stranger", "name": "python3"}
        gateway.mode = "well"
        if trouble == "gone":
            gateway.start()
        until(lambda: not orphans(shared_keeper, gateway), what="the orphaned kernels to be ended")
        assert set(gateway.kernels) == {"stranger"}


def test_kernel_missing_from_a_gateways_list_is_not_forgotten(shared_keeper):
    """Jupyter takes an unlisted kernel for ended, even if it started after the list was made."""
    with HostileGateway() as gateway:
        server = shared_keeper.post(**gateway.options).json()
        kernel = start_kernel(server)
        gateway.mode = "forget"
        assert [listed["id"] for listed in jupyter_request(server, "GET", "api/kernels")] == [
            kernel
        ]
        gateway.stop()
        assert shared_keeper.delete().json()["stop_report"]["kernels_left"] == [kernel]
        gateway.mode = "well"
        gateway.start()
        until(lambda: not orphans(shared_keeper, gateway), what="the orphaned kernel to be ended")
        assert gateway.kernels == {}


@pytest.mark.parametrize("own_gateway", REAL, indirect=True)
def test_next_keeper_ends_orphaned_kernels_once_a_hung_gateway_responds(own_keeper, own_gateway):
    server = own_keeper.post(**own_gateway.options).json()
    kernels = {start_kernel(server), start_kernel(server)}
    pids = {int(run_cell(server, kernel, "import os; os.getpid()")) for kernel in kernels}
    foreign_kernel = own_gateway.start_kernel()
    with own_gateway.suspended():
        report = own_keeper.delete().json()["stop_report"]
        assert set(report["kernels_left"]) == kernels
        own_keeper.kill()
        own_keeper.start()
        assert set(orphans(own_keeper, own_gateway)) == kernels
        listed = own_keeper.http.get("/api/orphaned-kernels").text
        assert own_gateway.token not in listed
        assert {orphan["server"] for orphan in json.loads(listed)["orphaned_kernels"]} == {
            "default"
        }
        assert all(alive(pid) for pid in pids)
    until(lambda: not orphans(own_keeper, own_gateway), what="the orphaned kernels to be ended")
    assert own_gateway.kernels() == {foreign_kernel}
    assert not any(alive(pid) for pid in pids)


def test_stop_and_kill_end_only_the_servers_own_kernels_on_a_shared_gateway(
    shared_keeper, real_gateway
):
    one, two = (
        shared_keeper.post(name=name, **real_gateway.options).json() for name in ("one", "two")
    )
    of_one, of_two, of_nobody = start_kernel(one), start_kernel(two), real_gateway.start_kernel()
    try:
        run_cell(two, of_two, "x = 42")
        report = shared_keeper.delete("one").json()["stop_report"]
        assert stopped_or_left(report) == {of_one}
        until(
            lambda: real_gateway.kernels() == {of_two, of_nobody},
            what="the kernel of 'one' to be ended",
        )
        assert run_cell(two, of_two, "x") == "42"
        # A forced delete does not end the kernels of others, either.
        shared_keeper.delete("two", force="true")
        until(lambda: real_gateway.kernels() == {of_nobody}, what="the kernel of 'two' to be ended")
    finally:
        real_gateway.end_kernel(of_nobody)


@pytest.mark.parametrize("own_gateway", ["enterprise-gateway"], indirect=True)
def test_kernel_requested_just_before_its_server_was_killed_is_ended(shared_keeper, own_gateway):
    server = shared_keeper.post(**own_gateway.options).json()
    record = shared_keeper.server_dirs / "default" / "jupyter" / "kernels.json"

    def begin():
        with contextlib.suppress(httpx.HTTPError, AssertionError):
            start_kernel(server)

    asking = threading.Thread(target=begin)
    with own_gateway.suspended():
        asking.start()
        until(lambda: unread_bytes(own_gateway.port), what="a request to reach the gateway")
        (starting,) = json.loads(record.read_text())["starting"]
        shared_keeper.delete(force="true")
        asking.join()
        assert orphans(shared_keeper, own_gateway) == [starting]
    until(lambda: not orphans(shared_keeper, own_gateway), what="the orphaned kernel to be ended")
    assert own_gateway.kernels() == set()


# Restarts that keep kernels


def test_restart_can_keep_kernels_with_their_variables_and_sessions(shared_keeper, real_gateway):
    before = shared_keeper.post(**real_gateway.options).json()
    kernel, other = start_session(before), start_kernel(before)
    run_cell(before, kernel, "x = 42")
    run_cell(before, other, "y = 43")

    answer = shared_keeper.post(
        "/default/restart",
        **{"keep-kernels": True, "default_url": "/tree", "kernel-env": {"KERNEL_NEW": "1"}},
    )
    assert answer.status_code == 201, answer.text
    after = answer.json()
    assert after["pid"] != before["pid"]
    assert after["token"] != before["token"]
    assert after["default_url"] == "/tree"
    assert (after["kernels_kept"], after["gateway"]["kernel_env_passed"]) == ([], ["KERNEL_NEW"])
    assert real_gateway.kernels() == {kernel, other}
    assert sessions(after) == {("work.ipynb", kernel)}
    assert (run_cell(after, kernel, "x"), run_cell(after, other, "y")) == ("42", "43")
    with pytest.raises(httpx.HTTPStatusError, match="403"):
        jupyter_request(before | {"url": after["url"]}, "GET", "api/kernels")

    # A server owns the kernels that it kept as much as those that it starts.
    assert stopped_or_left(shared_keeper.delete().json()["stop_report"]) == {kernel, other}
    until(lambda: not real_gateway.kernels(), what="both kernels to be ended")


def test_restart_ends_kernels_by_default(shared_keeper, real_gateway):
    server = shared_keeper.post(**real_gateway.options).json()
    kernel = start_kernel(server)
    after = shared_keeper.post("/default/restart").json()
    assert (after["state"], jupyter_request(after, "GET", "api/kernels")) == ("running", [])
    until(lambda: not real_gateway.kernels(), what="the kernel to be ended")
    until(
        lambda: kernel not in orphans(shared_keeper, real_gateway),
        what="the kernel to leave the list of orphaned kernels",
    )


def test_cli_restart_can_keep_kernels(shared_keeper, real_gateway):
    server = shared_keeper.post(**real_gateway.options).json()
    kernel = start_kernel(server)
    run_cell(server, kernel, "x = 42")
    result = shared_keeper.cli("restart", "default", "--keep-kernels", "--json")
    assert result.returncode == 0, result.stderr
    after = json.loads(result.stdout)
    assert run_cell(after, kernel, "x") == "42"


@pytest.mark.parametrize("how", ["crashes", "hangs", "crashes while the keeper is dead"])
def test_server_restarted_after_a_failure_keeps_its_kernels(own_keeper, real_gateway, how):
    before = own_keeper.post(**real_gateway.options).json()
    kernel = start_session(before)
    run_cell(before, kernel, "x = 42")
    if "keeper" in how:
        own_keeper.kill()
    os.kill(before["pid"], signal.SIGSTOP if how == "hangs" else signal.SIGKILL)
    if "keeper" in how:
        own_keeper.start()

    def again():
        server = own_keeper.get()
        return server["state"] == "running" and server["pid"] != before["pid"] and server

    after = until(again, what="the server to be relaunched")
    assert after["restarts"] == 1
    assert sessions(after) == {("work.ipynb", kernel)}
    assert run_cell(after, kernel, "x") == "42"
    assert orphans(own_keeper, real_gateway) == []
    assert stopped_or_left(own_keeper.delete().json()["stop_report"]) == {kernel}
    until(lambda: not real_gateway.kernels(), what="the kernel to be ended")


def test_kept_kernels_survive_a_restart_refused_by_the_gateway(own_keeper, own_gateway):
    server = own_keeper.post(**own_gateway.options).json()
    kernel = start_kernel(server)
    run_cell(server, kernel, "x = 42")
    answer = own_keeper.post("/default/restart", keep_kernels=True, gateway_auth_token="wrong")
    assert (answer.status_code, answer.json()["failure_class"]) == (502, "gateway-refused")
    failed = own_keeper.get()
    assert (failed["state"], failed["kernels_kept"]) == ("failed", [kernel])
    right = own_keeper.post(
        "/default/restart", keep_kernels=True, gateway_auth_token=own_gateway.token
    )
    assert right.status_code == 201, right.text
    assert run_cell(right.json(), kernel, "x") == "42"

    own_keeper.post("/default/restart", keep_kernels=True, gateway_auth_token="wrong")
    assert own_keeper.get()["kernels_kept"] == [kernel]
    assert own_gateway.kernels() == {kernel}
    own_keeper.delete()
    # They cannot be ended with the wrong token, and stay orphaned kernels until they can be.
    assert orphans(own_keeper, own_gateway) == [kernel]


def test_keeping_kernels_requires_the_same_gateway(shared_keeper):
    local = shared_keeper.post(name="local").json()
    refused = shared_keeper.post("/local/restart", keep_kernels=True)
    assert (refused.status_code, "gateway" in refused.json()["detail"]) == (409, True)
    assert shared_keeper.get("local")["pid"] == local["pid"]
    with HostileGateway() as one, HostileGateway() as other:
        remote = shared_keeper.post(name="remote", **one.options).json()
        moved = shared_keeper.post("/remote/restart", keep_kernels=True, **other.options)
        assert (moved.status_code, "gateway" in moved.json()["detail"]) == (409, True)
        assert shared_keeper.get("remote")["pid"] == remote["pid"]


# The environment of kernels


@pytest.mark.parametrize("where", [*REAL, "beside the server"])
def test_kernel_env_reaches_kernels_as_reported(shared_keeper, tmp_path, where):
    with contextlib.ExitStack() as stack:
        options = {}
        if where in REAL:
            gateway = REAL[where](tmp_path / "gateway").start()
            stack.callback(gateway.stop)
            options = gateway.options
        server = shared_keeper.post(
            kernel_env={"KERNEL_USERNAME": "ada", "KERNEL_X": "1", "FOO": "2", "BAR": "3"},
            **options,
        ).json()
        kernel = start_kernel(server)
        code = (
            "import os; print([os.environ.get(name)"
            " for name in ('KERNEL_USERNAME', 'KERNEL_X', 'FOO', 'BAR')])"
        )
        # The fixture configures Enterprise Gateway to pass FOO on.
        foo = {KernelGateway: "None", EnterpriseGateway: "'2'"}.get(REAL.get(where), "'2'")
        bar = "None" if where in REAL else "'3'"
        assert run_cell(server, kernel, code).strip() == f"['ada', '1', {foo}, {bar}]"
        if where in REAL:
            health = server["gateway"]
            assert health["kernel_env_passed"] == ["KERNEL_USERNAME", "KERNEL_X"]
            assert health["kernel_env_if_allowed"] == ["BAR", "FOO"]
        # The variables are for kernels, not for the server.
        assert "KERNEL_X" not in Path(f"/proc/{server['pid']}/environ").read_text()
        shared_keeper.delete()


def test_gateway_secrets_are_in_no_response_and_no_log(own_keeper, real_gateway):
    headers = {"X-Secret": "swordfish-of-headers"}
    server = own_keeper.post(
        **real_gateway.options,
        gateway_headers=headers,
        kernel_env={"KERNEL_SECRET": "swordfish-of-kernels"},
    ).json()
    start_kernel(server)
    with real_gateway.suspended():
        own_keeper.delete()
        texts = [
            own_keeper.http.get(path).text
            for path in ("/api/servers", "/api/orphaned-kernels", "/healthz")
        ]
    until(lambda: not orphans(own_keeper, real_gateway), what="the orphaned kernels to be ended")
    texts += [
        own_keeper.log.read_text(),
        *(path.read_text() for path in (own_keeper.state_dir / "logs").iterdir()),
    ]
    for secret in (real_gateway.token, *headers.values(), "swordfish-of-kernels"):
        assert not [text for text in texts if secret in text]
