"""Gateways that are right, wrong, dead, slow and lying, and what a server of ours makes of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from pathlib import Path

import httpx
import pytest

from gateway_servers import REAL, EnterpriseGateway, HostileGateway, KernelGateway
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
TRIED_WITHIN = 1.5


@pytest.fixture(scope="module", params=REAL)
def _shared_real(request, tmp_path_factory):
    running = REAL[request.param](tmp_path_factory.mktemp(request.param)).start()
    yield running
    running.stop()


@pytest.fixture
def real(_shared_real):
    """Each of the real gateways, which the tests of this module share; it has no kernels."""
    # Kernels of servers force-deleted after the previous test end a moment later.
    until(lambda: not _shared_real.kernels(), what="a gateway without kernels")
    return _shared_real


@pytest.fixture
def own(request, tmp_path):
    """A real gateway that a test may do anything to."""
    running = REAL[getattr(request, "param", "kernel-gateway")](tmp_path / "gateway").start()
    yield running
    running.stop()


QUICK = {
    "gateway_timeout": TRIED_WITHIN,
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
def quick(_shared):
    """A keeper that looks at gateways often, and does not wait for them long; the tests of this module share it."""
    yield _shared
    _shared.clear()


@pytest.fixture
def own_quick(make_keeper):
    """Another one, which its test may end."""
    return make_keeper(hung_after=4, **QUICK).start()


def ask(server, method, path, **given):
    """Ask a JupyterLab as its own pages do."""
    known = {"Authorization": f"token {server['token']}"}
    answer = httpx.request(
        method, f"{server['url']}{path}", headers=known, timeout=PATIENCE, trust_env=False, **given
    )
    answer.raise_for_status()
    return answer.json()


def start_session(server, path="work.ipynb"):
    """Open a notebook; give the id of its kernel."""
    body = {"path": path, "name": path, "type": "notebook", "kernel": {"name": "python3"}}
    return ask(server, "POST", "api/sessions", json=body)["kernel"]["id"]


def sessions(server):
    return {
        (session["path"], session["kernel"]["id"]) for session in ask(server, "GET", "api/sessions")
    }


def disposed(report):
    """The kernels that a stop was about: those that a slow gateway has not ended within the grace are owed an end."""
    return {*report["kernels_stopped"], *report["kernels_left"]}


def orphans(keeper):
    return [
        orphan["kernel_id"]
        for orphan in keeper.http.get("/api/orphaned-kernels").json()["orphaned_kernels"]
    ]


def told(keeper, events):
    """What the keeper's log tells of some events, in its order."""
    lines = [
        json.loads(line) for line in keeper.log.read_text().splitlines() if line.startswith("{")
    ]
    return [line["event"] for line in lines if line["event"] in events]


def unread(port):
    """How many bytes wait at a port for its owner to read them."""
    connections = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    established = [
        fields for fields in connections if fields[1].endswith(f":{port:04X}") and fields[3] == "01"
    ]
    return sum(int(fields[4].partition(":")[2], 16) for fields in established)


# Before the start


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
def test_a_gateway_that_cannot_be_used_fails_the_start_with_its_class_and_what_to_do(
    quick, mode, kind, advice
):
    with HostileGateway(mode) as gateway:
        answer = quick.post(**gateway.options)
        assert answer.status_code == 502, answer.text
        assert answer.json()["failure_class"] == kind
        assert gateway.url in answer.json()["detail"]
        assert advice in answer.json()["detail"]
        failed = quick.get()
        assert (failed["state"], failed["failure"]["failure_class"], failed["pid"]) == (
            "failed",
            kind,
            None,
        )
        assert not processes_marked(quick.server_dirs, rehearsals=False)


def test_a_port_without_a_gateway_and_the_wrong_scheme_are_told_apart(quick, real):
    nobody = quick.post(name="one", gateway_url=f"http://127.0.0.1:{free_port()}").json()
    assert (nobody["failure_class"], "start it" in nobody["detail"]) == (
        "gateway-unreachable",
        True,
    )
    tls = quick.post(
        name="two", gateway_url=real.url.replace("http:", "https:"), gateway_auth_token=real.token
    ).json()
    assert (tls["failure_class"], "use http://" in tls["detail"]) == ("gateway-tls", True)


def test_a_wrong_token_is_refused_by_a_real_gateway_before_the_start_and_not_by_a_right_one(
    quick, real
):
    answer = quick.post(name="one", gateway_url=real.url, gateway_auth_token="wrong")
    assert (answer.status_code, answer.json()["failure_class"]) == (502, "gateway-refused")
    answer = quick.post(name="two", **real.options)
    assert answer.status_code == 201, answer.text
    health = answer.json()["gateway"]
    assert (health["reachable"], health["error"], health["kernelspecs"]) == (True, None, 1)


def test_a_gateway_that_is_not_required_may_come_later(quick, own):
    own.process.terminate()
    own.process.wait()
    answer = quick.post(**own.options, require_gateway=False)
    assert answer.status_code == 201, answer.text
    gateway = until(
        lambda: (g := quick.get()["gateway"])["reachable"] is False and g, what="it was tried"
    )
    assert (gateway["required"], gateway["error"]["failure_class"]) == (
        False,
        "gateway-unreachable",
    )


# While it runs


def test_the_health_of_a_gateway_is_told_while_a_server_runs(own_quick):
    with HostileGateway() as gateway:
        own_quick.post(**gateway.options)
        healthy = own_quick.get()["gateway"]
        assert (healthy["reachable"], healthy["kernelspecs"]) == (True, 1)

        gateway.mode = "500"
        ill = until(
            lambda: (g := own_quick.get()["gateway"])["reachable"] is False and g,
            what="it is told to be ill",
        )
        assert ill["since"] > healthy["since"]
        assert "500" in ill["error"]["message"]
        gateway.mode = "well"
        well = until(
            lambda: (g := own_quick.get()["gateway"])["reachable"] and g,
            what="it is told to be well",
        )
        assert well["since"] > ill["since"]
        assert (well["error"], well["kernelspecs"]) == (None, 1)

        assert own_quick.get()["state"] == "running"
        assert told(own_quick, {"gateway cannot be used", "gateway answers"}) == [
            "gateway cannot be used",
            "gateway answers",
        ]


def test_a_gateway_is_looked_at_once_for_all_its_servers_and_less_often_while_it_is_away(quick):
    with HostileGateway() as gateway, HostileGateway() as other:

        def looks(at=gateway):
            return at.count("GET", "/api/kernelspecs")

        def pass_time(seconds):
            """Wait until the other gateway was looked at so often, once a second."""
            end = looks(other) + seconds
            until(lambda: looks(other) >= end, what="looks at the other gateway")

        assert quick.post(name="other", **other.options).status_code == 201
        for name in ("one", "two", "three"):
            assert quick.post(name=name, **gateway.options).status_code == 201
        before = looks() - looks(other)
        pass_time(5)
        # As often as the one that only one server has, but for a look that is just going on.
        assert abs(looks() - looks(other) - before) <= 2
        for name in ("one", "two", "three"):
            quick.delete(name)
        before = looks()
        pass_time(3)
        assert looks() == before


# A stop


@pytest.mark.parametrize("trouble", ["gone", "hangs", "answers 500"])
def test_a_stop_takes_no_longer_than_its_grace_and_names_the_kernels_that_may_be_left(
    quick, trouble
):
    with HostileGateway() as gateway:
        server = quick.post(**gateway.options).json()
        kernels = {start_kernel(server) for _ in range(3)}
        if trouble == "gone":
            gateway.stop()
        else:
            gateway.mode = {"hangs": "hang", "answers 500": "500"}[trouble]
        # A gateway that hangs does so for longer than anybody waits here.
        answer = quick.delete()
        assert answer.status_code == 200, answer.text
        report = answer.json()["stop_report"]
        assert set(report["kernels_left"]) == kernels
        assert report["kernels_stopped"] == []
        assert not alive(server["pid"])
        assert set(orphans(quick)) == kernels

        # It is better again, and there is one that was never ours.
        gateway.kernels["stranger"] = {"id": "stranger", "name": "python3"}
        gateway.mode = "well"
        if trouble == "gone":
            gateway.start()
        until(lambda: not orphans(quick), what="the orphaned kernels are ended")
        assert set(gateway.kernels) == {"stranger"}


def test_a_kernel_that_a_gateway_could_not_be_asked_about_is_not_forgotten(quick):
    """Jupyter takes one that is not listed for ended, also when it was started while the list was on its way."""
    with HostileGateway() as gateway:
        server = quick.post(**gateway.options).json()
        kernel = start_kernel(server)
        gateway.mode = "forget"
        assert [listed["id"] for listed in ask(server, "GET", "api/kernels")] == [kernel]
        gateway.stop()
        assert quick.delete().json()["stop_report"]["kernels_left"] == [kernel]
        gateway.mode = "well"
        gateway.start()
        until(lambda: not orphans(quick), what="the orphaned kernel is ended")
        assert gateway.kernels == {}


@pytest.mark.parametrize("own", REAL, indirect=True)
def test_what_a_hanging_gateway_keeps_is_ended_by_a_later_keeper_when_it_answers(own_quick, own):
    server = own_quick.post(**own.options).json()
    kernels = {start_kernel(server), start_kernel(server)}
    pids = {int(run_cell(server, kernel, "import os; os.getpid()")) for kernel in kernels}
    stranger = own.start_kernel()
    with own.suspended():
        report = own_quick.delete().json()["stop_report"]
        assert set(report["kernels_left"]) == kernels
        own_quick.kill()
        own_quick.start()
        assert set(orphans(own_quick)) == kernels
        listed = own_quick.http.get("/api/orphaned-kernels").text
        assert own.token not in listed
        assert {orphan["server"] for orphan in json.loads(listed)["orphaned_kernels"]} == {
            "default"
        }
        assert all(alive(pid) for pid in pids)
    until(lambda: not orphans(own_quick), what="the orphaned kernels are ended")
    assert own.kernels() == {stranger}
    assert not any(alive(pid) for pid in pids)


def test_a_gateway_that_two_servers_share_keeps_the_kernels_of_the_other(quick, real):
    one, two = (quick.post(name=name, **real.options).json() for name in ("one", "two"))
    of_one, of_two, of_nobody = start_kernel(one), start_kernel(two), real.start_kernel()
    try:
        run_cell(two, of_two, "x = 42")
        report = quick.delete("one").json()["stop_report"]
        assert disposed(report) == {of_one}
        until(lambda: real.kernels() == {of_two, of_nobody}, what="the kernel of one was ended")
        assert run_cell(two, of_two, "x") == "42"
        # Nor does a kill end more than its own.
        quick.delete("two", force="true")
        until(lambda: real.kernels() == {of_nobody}, what="the kernel of two was ended")
    finally:
        real.end_kernel(of_nobody)


@pytest.mark.parametrize("own", ["enterprise-gateway"], indirect=True)
def test_a_kernel_that_was_only_asked_for_when_its_server_was_killed_is_ended(quick, own):
    server = quick.post(**own.options).json()
    record = quick.server_dirs / "default" / "jupyter" / "kernels.json"

    def begin():
        with contextlib.suppress(httpx.HTTPError, AssertionError):
            start_kernel(server)

    asking = threading.Thread(target=begin)
    with own.suspended():
        asking.start()
        until(lambda: unread(own.port), what="the gateway was asked")
        (starting,) = json.loads(record.read_text())["starting"]
        quick.delete(force="true")
        asking.join()
        assert orphans(quick) == [starting]
    until(lambda: not orphans(quick), what="the orphaned kernel is ended")
    assert own.kernels() == set()


# A restart that keeps kernels


def test_a_restart_keeps_the_kernels_with_their_variables_and_notebooks(quick, real):
    before = quick.post(**real.options).json()
    kernel, other = start_session(before), start_kernel(before)
    run_cell(before, kernel, "x = 42")
    run_cell(before, other, "y = 43")

    answer = quick.post(
        "/default/restart",
        **{"keep-kernels": True, "default_url": "/tree", "kernel-env": {"KERNEL_NEW": "1"}},
    )
    assert answer.status_code == 201, answer.text
    after = answer.json()
    assert after["pid"] != before["pid"]
    assert after["token"] != before["token"]
    assert after["default_url"] == "/tree"
    assert (after["kernels_kept"], after["gateway"]["kernel_env_passed"]) == ([], ["KERNEL_NEW"])
    assert real.kernels() == {kernel, other}
    assert sessions(after) == {("work.ipynb", kernel)}
    assert (run_cell(after, kernel, "x"), run_cell(after, other, "y")) == ("42", "43")
    with pytest.raises(httpx.HTTPStatusError, match="403"):
        ask(before | {"url": after["url"]}, "GET", "api/kernels")

    # What was taken over is as much its own as what it starts.
    assert disposed(quick.delete().json()["stop_report"]) == {kernel, other}
    until(lambda: not real.kernels(), what="they are ended")


def test_a_restart_without_asking_ends_them(quick, real):
    server = quick.post(**real.options).json()
    kernel = start_kernel(server)
    after = quick.post("/default/restart").json()
    assert (after["state"], ask(after, "GET", "api/kernels")) == ("running", [])
    until(lambda: not real.kernels(), what="the kernel is ended")
    until(lambda: kernel not in orphans(quick), what="nothing is owed")


def test_the_command_line_keeps_kernels_too(quick, real):
    server = quick.post(**real.options).json()
    kernel = start_kernel(server)
    run_cell(server, kernel, "x = 42")
    said = quick.cli("restart", "default", "--keep-kernels", "--json")
    assert said.returncode == 0, said.stderr
    after = json.loads(said.stdout)
    assert run_cell(after, kernel, "x") == "42"


@pytest.mark.parametrize("how", ["crashes", "hangs", "crashes while the keeper is dead"])
def test_a_server_that_fails_has_its_kernels_again(own_quick, real, how):
    before = own_quick.post(**real.options).json()
    kernel = start_session(before)
    run_cell(before, kernel, "x = 42")
    if "keeper" in how:
        own_quick.kill()
    os.kill(before["pid"], signal.SIGSTOP if how == "hangs" else signal.SIGKILL)
    if "keeper" in how:
        own_quick.start()

    def again():
        server = own_quick.get()
        return server["state"] == "running" and server["pid"] != before["pid"] and server

    after = until(again, what="it is launched again")
    assert after["restarts"] == 1
    assert sessions(after) == {("work.ipynb", kernel)}
    assert run_cell(after, kernel, "x") == "42"
    assert orphans(own_quick) == []
    assert disposed(own_quick.delete().json()["stop_report"]) == {kernel}
    until(lambda: not real.kernels(), what="it is ended")


def test_kernels_are_kept_for_a_server_whose_gateway_refuses_it_until_it_is_deleted(own_quick, own):
    server = own_quick.post(**own.options).json()
    kernel = start_kernel(server)
    run_cell(server, kernel, "x = 42")
    answer = own_quick.post("/default/restart", keep_kernels=True, gateway_auth_token="wrong")
    assert (answer.status_code, answer.json()["failure_class"]) == (502, "gateway-refused")
    failed = own_quick.get()
    assert (failed["state"], failed["kernels_kept"]) == ("failed", [kernel])
    right = own_quick.post("/default/restart", keep_kernels=True, gateway_auth_token=own.token)
    assert right.status_code == 201, right.text
    assert run_cell(right.json(), kernel, "x") == "42"

    own_quick.post("/default/restart", keep_kernels=True, gateway_auth_token="wrong")
    assert own_quick.get()["kernels_kept"] == [kernel]
    assert own.kernels() == {kernel}
    own_quick.delete()
    # With the token that was wrong nobody can end it; it is owed until somebody can.
    assert orphans(own_quick) == [kernel]


def test_kernels_cannot_be_kept_where_there_is_no_gateway_or_another(quick):
    local = quick.post(name="local").json()
    refused = quick.post("/local/restart", keep_kernels=True)
    assert (refused.status_code, "gateway" in refused.json()["detail"]) == (409, True)
    assert quick.get("local")["pid"] == local["pid"]
    with HostileGateway() as one, HostileGateway() as other:
        remote = quick.post(name="remote", **one.options).json()
        moved = quick.post("/remote/restart", keep_kernels=True, **other.options)
        assert (moved.status_code, "gateway" in moved.json()["detail"]) == (409, True)
        assert quick.get("remote")["pid"] == remote["pid"]


# What kernels get


@pytest.mark.parametrize("where", [*REAL, "beside the server"])
def test_kernel_env_reaches_the_kernels_and_no_more_than_that_is_promised(quick, tmp_path, where):
    with contextlib.ExitStack() as stack:
        options = {}
        if where in REAL:
            gateway = REAL[where](tmp_path / "gateway").start()
            stack.callback(gateway.stop)
            options = gateway.options
        server = quick.post(
            kernel_env={"KERNEL_USERNAME": "ada", "KERNEL_X": "1", "FOO": "2", "BAR": "3"},
            **options,
        ).json()
        kernel = start_kernel(server)
        code = "import os; print([os.environ.get(name) for name in ('KERNEL_USERNAME', 'KERNEL_X', 'FOO', 'BAR')])"
        # An Enterprise Gateway is told by the fixture to let FOO pass.
        foo = {KernelGateway: "None", EnterpriseGateway: "'2'"}.get(REAL.get(where), "'2'")
        bar = "None" if where in REAL else "'3'"
        assert run_cell(server, kernel, code).strip() == f"['ada', '1', {foo}, {bar}]"
        if where in REAL:
            health = server["gateway"]
            assert health["kernel_env_passed"] == ["KERNEL_USERNAME", "KERNEL_X"]
            assert health["kernel_env_if_allowed"] == ["BAR", "FOO"]
        # They are for kernels, not for the server.
        assert "KERNEL_X" not in Path(f"/proc/{server['pid']}/environ").read_text()
        quick.delete()


def test_the_secrets_of_a_gateway_are_in_no_answer_and_no_log(own_quick, real):
    headers = {"X-Secret": "swordfish-of-headers"}
    server = own_quick.post(
        **real.options,
        gateway_headers=headers,
        kernel_env={"KERNEL_SECRET": "swordfish-of-kernels"},
    ).json()
    start_kernel(server)
    with real.suspended():
        own_quick.delete()
        said = [
            own_quick.http.get(path).text
            for path in ("/api/servers", "/api/orphaned-kernels", "/healthz")
        ]
    until(lambda: not orphans(own_quick), what="the orphaned kernels are ended")
    said += [
        own_quick.log.read_text(),
        *(path.read_text() for path in (own_quick.state_dir / "logs").iterdir()),
    ]
    for secret in (real.token, *headers.values(), "swordfish-of-kernels"):
        assert not [text for text in said if secret in text]
