"""What the doctor says of ports, the edge and gateways."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import trustme

from fake_keeper import a_server
from gateway_servers import HostileGateway, server_context
from harness import free_port, low_ports_take_a_right, until
from labkeeper import discovery
from labkeeper.doctor import network
from labkeeper.doctor.case import Answers, Case
from labkeeper.forkserver.marks import MARK
from labkeeper.schema.requests.gateway import GatewayFields
from labkeeper.serve.edge import instances
from labkeeper.settings.model import Settings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the checks are those of Linux")

PROGRAM = "import socket, sys, time; s = socket.create_server(('127.0.0.1', {})); time.sleep(1000)"


def a_case(directory, *, keeper=None, gateway=None, **chosen):
    ports = {"port": free_port(), "lab_port": free_port(), "notebook_dir": directory}
    settings = Settings(**{"state_dir": directory / "state"} | ports | chosen)
    return Case(settings, "1", keeper=keeper, gateway=gateway)


def answers(*servers, url="http://127.0.0.1:1"):
    return Answers(url, "1", servers, (), (), "")


@pytest.fixture
def listening():
    """Start processes that listen on a port."""
    children = []

    def start(port, *arguments, **options):
        command = [sys.executable, "-c", PROGRAM.format(port), *arguments]
        children.append(subprocess.Popen(command, **options))
        until(lambda: network._holder(port), what="the process to listen")
        return children[-1].pid

    yield start
    for child in children:
        child.kill()
        child.wait()


# Ports


def test_free_ports_are_found_and_stay_free(tmp_path):
    case = a_case(tmp_path)
    for _ in range(2):
        assert [found.status for found in network.ports(case)] == ["ok", "ok"]


def test_ports_of_another_process_are_a_problem_that_the_command_mends(tmp_path, listening):
    case = a_case(tmp_path)
    pids = [listening(case.settings.port), listening(case.settings.lab_port)]
    api, lab = network.ports(case)
    assert (api.status, lab.status) == ("problem", "problem")
    assert f"(process {pids[0]}, " in api.message
    assert f"(process {pids[1]}, " in lab.message
    chosen = {
        found.mend.partition("=")[0].removeprefix("export LABKEEPER_").lower(): int(
            found.mend.partition("=")[2]
        )
        for found in (api, lab)
    }
    assert chosen.keys() == {"port", "lab_port"}
    assert [found.status for found in network.ports(a_case(tmp_path, **chosen))] == ["ok", "ok"]


def test_a_port_whose_holder_is_hidden_is_a_problem_all_the_same(tmp_path, monkeypatch):
    def hidden(**_):
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil, "net_connections", hidden)
    with socket.create_server(("127.0.0.1", 0)) as held:
        api, _ = network.ports(a_case(tmp_path, port=held.getsockname()[1]))
    assert (api.status, "process" in api.message) == ("problem", False)


def test_what_an_earlier_keeper_left_is_taken_over(tmp_path, listening):
    case = a_case(tmp_path)
    edge_dir, server_dir = tmp_path / "state" / "edge" / "1", tmp_path / "state" / "run" / "default"
    edge_dir.mkdir(parents=True)
    server_dir.mkdir(parents=True)
    listening(case.settings.port, "labkeeper.edge", cwd=edge_dir)
    listening(case.settings.lab_port, env=os.environ | {MARK: str(server_dir)})
    api, lab = network.ports(case)
    assert (api.status, lab.status) == ("ok", "ok")
    assert "our edge" in api.message
    assert "held by a server" in lab.message


def test_a_process_that_has_ended_holds_nothing(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    ended = psutil.Process(child.pid)
    child.wait()
    assert not network._is_edge(ended, tmp_path)
    assert not network._is_server(ended, tmp_path)
    assert network._by(ended) == ""


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "no.such.host.invalid"])
def test_an_address_that_this_machine_does_not_have_is_a_problem(tmp_path, host):
    api, lab = network.ports(a_case(tmp_path, host=host, lab_ip=host))
    assert (api.status, api.mend) == ("problem", "export LABKEEPER_HOST=127.0.0.1")
    assert (lab.status, lab.mend) == ("problem", "export LABKEEPER_LAB_IP=127.0.0.1")


@pytest.mark.root
@pytest.mark.skipif(not low_ports_take_a_right(), reason="needs ports that take a right")
def test_a_port_that_takes_a_right_is_a_problem(passable, user):
    case = a_case(passable, port=81, lab_port=82)
    os.setresuid(user.pw_uid, user.pw_uid, 0)
    try:
        api, lab = network.ports(case)
    finally:
        os.setresuid(0, 0, 0)
    assert api.mend.startswith("export LABKEEPER_PORT=")
    assert lab.mend.startswith("export LABKEEPER_LAB_PORT=")
    assert "Permission denied" in api.message
    assert "has no right to listen" in lab.message


def test_the_port_of_labs_is_not_tried_without_a_notebook_directory(tmp_path):
    _, lab = network.ports(a_case(tmp_path, notebook_dir=tmp_path / "none"))
    assert lab.status == "skipped"


def test_a_running_keeper_and_its_server_hold_their_ports(tmp_path):
    port = free_port()
    case = a_case(tmp_path, keeper=answers(a_server(port=port)), lab_port=port)
    with socket.create_server(("127.0.0.1", port)):
        (found,) = network.ports(case)
    assert (found.status, "http://127.0.0.1:1" in found.message) == ("ok", True)


# Edge


def test_an_edge_is_started_on_trial_and_leaves_nothing(tmp_path):
    (found,) = network.edge(a_case(tmp_path))
    assert (found.status, found.message) == ("ok", "it can be started")
    assert not (tmp_path / "state").exists()


def test_an_edge_that_does_not_start_is_a_problem_with_its_last_words(tmp_path, monkeypatch):
    monkeypatch.setattr(instances, "_MODULE", "labkeeper.no_such_module")
    (found,) = network.edge(a_case(tmp_path))
    assert found.status == "problem"
    assert "cannot start an edge" in found.message
    assert "no_such_module" in found.details[-1]
    package = found.mend.removeprefix("chmod -R a+rX ")
    assert Path(package, "edge").is_dir()


def test_an_edge_may_be_off(tmp_path):
    (found,) = network.edge(a_case(tmp_path, edge="off"))
    assert (found.status, "is off" in found.message) == ("ok", True)


@pytest.mark.parametrize(("mode", "status"), [("other json", "ok"), ("503", "problem")])
@pytest.mark.parametrize("secure", [True, False])
def test_the_edge_of_a_running_keeper_is_asked(tmp_path, mode, status, secure):
    context = server_context(trustme.CA()) if secure else None
    with HostileGateway(mode, context=context) as there:
        (found,) = network.edge(a_case(tmp_path, keeper=answers(url=there.url)))
    assert (found.status, there.url in found.message) == (status, True)


def test_the_edge_is_asked_at_its_address_and_not_at_the_socket_of_the_keeper(tmp_path):
    state_dir = tmp_path / "state"
    state_dir.mkdir()
    discovery.write_address(state_dir, f"http://127.0.0.1:{free_port()}", None)
    (found,) = network.edge(a_case(tmp_path, keeper=answers(url="http://127.0.0.1:2")))
    assert (found.status, found.mend) == ("problem", f"tail {state_dir}/logs/_edge.log")


# Gateways


def gateway_at(url, **options):
    return GatewayFields.model_validate({"url": url, **options}).at(url)


def test_a_gateway_that_works_is_found_usable(tmp_path):
    with HostileGateway() as there:
        (found,) = network.gateway(a_case(tmp_path, gateway=gateway_at(there.url)))
    assert (found.status, "1 kernelspecs" in found.message) == ("ok", True)


@pytest.mark.parametrize(
    ("mode", "says"), [("html", "not as a Jupyter kernel gateway"), ("503", "answers 503")]
)
def test_a_gateway_that_answers_something_else_is_a_problem(tmp_path, mode, says):
    with HostileGateway(mode) as there:
        (found,) = network.gateway(a_case(tmp_path, gateway=gateway_at(there.url)))
    assert (found.status, says in found.message) == ("problem", True)
    assert found.mend.startswith("check ")


def test_a_gateway_that_cannot_be_reached_is_a_problem(tmp_path):
    where = f"http://127.0.0.1:{free_port()}"
    (found,) = network.gateway(a_case(tmp_path, gateway=gateway_at(where)))
    assert (found.status, found.mend) == ("problem", "start it, or check the port of gateway_url")
    assert where in found.message


def test_a_gateway_that_asks_for_a_token_is_shown_one_by_the_command(tmp_path):
    with HostileGateway("401") as there:
        (without,) = network.gateway(a_case(tmp_path, gateway=gateway_at(there.url)))
        gateway = gateway_at(there.url, auth_token="a-token")
        (wrong,) = network.gateway(a_case(tmp_path, gateway=gateway))
    assert without.mend == f"labkeeper doctor --gateway {there.url} --gateway-token-file -"
    assert wrong.mend.startswith("check gateway_auth_token")


def test_gateways_of_servers_are_judged_by_the_keeper(tmp_path):
    about = {"required": True, "since": None, "kernelspecs": 1}
    about |= {"kernel_env_passed": [], "kernel_env_if_allowed": []}
    failure = {"failure_class": "gateway-timeout", "exit": None, "log_tail": []}
    failure |= {"message": "the gateway http://b did not answer within 5 s; look at it"}
    fine = a_server(gateway=about | {"url": "http://a", "reachable": True, "error": None})
    bad = a_server(gateway=about | {"url": "http://b", "reachable": False, "error": failure})
    new = a_server(gateway=about | {"url": "http://c", "reachable": None, "error": None})
    problem, ok = network.gateway(a_case(tmp_path, keeper=answers(fine, bad, new, a_server())))
    assert (problem.status, problem.mend) == ("problem", "look at it")
    assert problem.message == "the gateway http://b did not answer within 5 s"
    assert ok.message == "http://a can be used"
