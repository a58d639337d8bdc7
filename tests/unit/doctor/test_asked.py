"""What the doctor says of a keeper's answers."""

from __future__ import annotations

import contextlib
import socket

import pytest
import structlog

from fake_keeper import TOKEN, a_server, fake_keeper
from labkeeper.api.app import create_app
from labkeeper.api.wsgi import WsgiServer
from labkeeper.client import Client, Kernel, Library
from labkeeper.core.errors import BackendUnavailable
from labkeeper.doctor import asked
from labkeeper.doctor.case import Answers, Case, Running
from labkeeper.settings.model import Settings


def a_case(**answers):
    given = {"servers": (), "running": (), "libraries": (), "failing": "", "version": "1"}
    return Case(Settings(), "1", keeper=Answers("http://there", **given | answers))


def a_kernel(by="fork", reason=None):
    return Kernel(
        id="k", name="python3", execution_state="idle", last_activity="",
        launched_by=by, exec_reason=reason,
    )  # fmt: skip


def only(found):
    (one,) = found
    return one


@contextlib.contextmanager
def a_client(directory, **services):
    with (
        structlog.testing.capture_logs(),
        fake_keeper(directory, **services) as made,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        server = WsgiServer(create_app(made.services), [listener], threads=4, max_body=2**20)
        server.start()
        with Client(f"http://127.0.0.1:{listener.getsockname()[1]}", token=TOKEN) as client:
            yield made, client
        server.close()


def test_a_keeper_is_asked_for_all_that_only_it_knows(tmp_path):
    with a_client(tmp_path) as (made, client):
        client.create(name="a")
        client.create(name="b")
        client.stop("b")
        made.probe.kernels_there = [a_kernel("exec", "it is no IPython kernel")]
        found = asked.ask(client)
    assert (found.version, found.failing) == ("1.2.3", "")
    assert [server.name for server in found.servers] == ["a", "b"]
    assert [one.server.name for one in found.running] == ["a"]
    assert found.running[0].kernels[0].exec_reason == "it is no IPython kernel"


def test_failures_of_watchers_and_servers_are_answers(tmp_path):
    with a_client(tmp_path, failing=lambda: {"culler": "it fell asleep"}) as (made, client):
        client.create(name="a")
        made.probe.error = BackendUnavailable("no answer")
        found = asked.ask(client)
    assert "culler: it fell asleep" in found.failing
    assert found.running[0].error == "no answer"


def test_without_a_keeper_nothing_is_said_of_its_answers():
    case = Case(Settings(), "1", why_none="none runs")
    found = only(asked.keeper(case))
    assert (found.status, found.message) == ("skipped", "none runs")
    functions = (asked.watchers, asked.servers, asked.launches, asked.kernels, asked.libraries)
    assert [list(look(case)) for look in (*functions, asked.gateways)] == [[]] * 6


def test_a_keeper_that_should_run_and_does_not_is_a_problem():
    case = Case(Settings(), "1", why_none="cannot reach it", mend_none="labkeeper serve")
    found = only(asked.keeper(case))
    assert (found.status, found.mend) == ("problem", "labkeeper serve")


@pytest.mark.parametrize(("version", "status"), [("1", "ok"), ("2", "warning")])
def test_the_keeper_should_have_our_version(version, status):
    found = only(asked.keeper(a_case(version=version)))
    assert (found.status, f"version {version}" in found.message) == (status, True)


def test_watchers_that_fail_are_a_problem():
    assert only(asked.watchers(a_case())).status == "ok"
    found = only(asked.watchers(a_case(failing="culler: it fell asleep")))
    assert (found.status, found.message) == ("problem", "culler: it fell asleep")


def test_failed_and_lost_servers_are_warnings():
    failure = {"failure_class": "killed", "message": "it was killed", "exit": None, "log_tail": []}
    servers = (
        a_server(name="a", state="failed", failure=failure),
        a_server(name="b", state="failed"),
        a_server(name="c", state="lost"),
        a_server(name="d"),
    )
    *warnings, summary = asked.servers(a_case(servers=servers))
    assert [found.mend for found in warnings] == [
        "labkeeper start a",
        "labkeeper start b",
        "labkeeper stop c --force",
    ]
    assert "it was killed" in warnings[0].message
    assert (summary.status, summary.message) == ("ok", "2 failed, 1 lost, 1 running")
    assert only(asked.servers(a_case())).message == "there are none"


def executed(name, reason):
    return a_server(name=name, launched_by="exec", exec_reason=reason)


def test_an_executed_server_is_a_warning_unless_that_was_chosen():
    off = "forking is turned off (LABKEEPER_LAUNCH_BY=exec)"
    servers = (
        executed("a", "the fork server has only begun to load"),
        executed("b", "the environment variable LANG takes effect only when a program starts"),
        executed("c", off),
        a_server(name="d", launched_by="fork"),
        a_server(name="e", state="stopped"),
    )
    late, variable, summary = asked.launches(a_case(servers=servers))
    assert (late.status, late.mend) == ("warning", "labkeeper restart a")
    assert variable.mend == "remove LANG from `env` of the request for 'b'"
    assert (summary.status, summary.details) == ("ok", (off,))
    assert summary.message == "1 of 4 running servers were forked"
    assert only(asked.launches(a_case())).status == "skipped"


def test_executed_kernels_are_listed_with_their_reasons():
    kernels = (a_kernel(), a_kernel("exec", "it is no IPython kernel"), a_kernel(None))
    running = (Running(a_server(name="a"), kernels), Running(a_server(name="b"), error="no answer"))
    silent, found = asked.kernels(a_case(running=running))
    assert (silent.message, silent.mend) == ("no answer", "labkeeper restart b")
    assert found.message == "1 executed, 1 forked, 1 on a gateway"
    assert found.details == ("a: python3 k was executed: it is no IPython kernel",)
    assert only(asked.kernels(a_case())).message == "there are none"


def test_libraries_that_are_left_out_are_warnings():
    def library(name, loaded):
        return Library(name=name, loaded=loaded, reason=None if loaded else "it starts threads")

    found = (library("numpy", True), library("torch", False), library("pandas", None))
    left_out, shared = asked.libraries(a_case(libraries=found))
    assert (left_out.mend, shared.status) == ("export LABKEEPER_PRELOAD=numpy", "ok")
    assert left_out.message == "torch is not preloaded: it starts threads"
    alone = only(asked.libraries(a_case(libraries=[library("torch", False)])))
    assert alone.mend == "remove torch from LABKEEPER_PRELOAD in the settings of the keeper"
