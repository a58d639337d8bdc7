"""The keeper's own log: its formats and levels, the entry for each change, and scrubbing."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import structlog

from labkeeper import logs, scrub
from labkeeper.core.lifecycle import Event, Goal, State
from labkeeper.core.messages import Change, Origin
from labkeeper.core.server import (
    Failure,
    FailureClass,
    GatewayHealth,
    Progress,
    Snapshot,
    Stage,
    StopMethod,
    StopReport,
)
from labkeeper.testing.fakes import a_spec


@pytest.fixture(autouse=True)
def _restored():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()


def snapshot(state, **more):
    return Snapshot(a_spec("lab"), state, Goal.UP, since=0.0, created_at=0.0, generation=3, **more)


def test_json_is_one_object_per_line_also_from_libraries(capsys):
    logs.configure(level="info", form="auto", debug=False)
    structlog.get_logger("labkeeper.x").info("said", port=1)
    logging.getLogger("somebody").warning("else %s", "said")
    structlog.get_logger("labkeeper.x").debug("not said")
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (first["event"], first["port"], first["level"], first["logger"]) == (
        "said",
        1,
        "info",
        "labkeeper.x",
    )
    assert second["event"] == "else said"


def test_debug_adds_line_numbers(capsys):
    logs.configure(level="error", form="json", debug=True)
    structlog.get_logger("labkeeper.x").debug("said")
    assert json.loads(capsys.readouterr().err)["lineno"] > 0


@pytest.mark.parametrize("form", ["console", "json"])
def test_a_traceback_shows_no_values(capsys, form):
    logs.configure(level="info", form=form, debug=False)
    held = "hun" + "ter2"

    def fail(what):
        raise RuntimeError("why")

    try:
        fail(held)
    except RuntimeError:
        structlog.get_logger("labkeeper.x").exception("failed")
    written = capsys.readouterr().err
    assert "RuntimeError: why" in written
    assert "hunter2" not in written


@pytest.mark.parametrize(
    ("before", "after", "event", "level"),
    [
        (State.STARTING, snapshot(State.RUNNING), Event.READY, "info"),
        (
            State.STARTING,
            snapshot(State.FAILED, failure=Failure(FailureClass.OTHER, "why")),
            Event.CRASHED,
            "warning",
        ),
        (
            State.STOPPING,
            snapshot(State.STOPPED, stop_report=StopReport(StopMethod.SIGTERM, 1.5)),
            Event.EXITED,
            "info",
        ),
        (State.KILLING, snapshot(State.LOST), Event.DEADLINE, "error"),
        (None, snapshot(State.LOST), Event.UNREACHABLE, "info"),
    ],
)
def test_each_change_of_state_is_one_entry(before, after, event, level):
    with structlog.testing.capture_logs() as log:
        logs.log_change(Change(event, before and snapshot(before), after, 0.0))
    (entry,) = log
    assert (entry["log_level"], entry["server"], entry["generation"]) == (level, "lab", 3)
    assert entry["event"] == f"{before or 'recovered'} -> {after.state}"
    assert entry.get("cause") == (after.failure.message if after.failure else None)
    assert entry.get("method") == (after.stop_report.method if after.stop_report else None)


def test_a_change_that_keeps_the_state_is_not_logged():
    with structlog.testing.capture_logs() as log:
        logs.log_change(Change(Event.STOP, snapshot(State.STOPPING), snapshot(State.STOPPING), 0.0))
    assert log == []


def test_the_progress_of_a_start_is_logged():
    before = snapshot(State.STARTING)
    after = replace(before, progress=Progress(Stage.PULLING, "pulling the image"))
    with structlog.testing.capture_logs() as log:
        logs.log_change(Change(Event.PROGRESS, before, after, 0.0))
    (entry,) = log
    assert (entry["log_level"], entry["server"], entry["stage"], entry["message"]) == (
        "info",
        "lab",
        "pulling",
        "pulling the image",
    )


@pytest.mark.parametrize(
    ("error", "level", "cause"),
    [
        (None, "info", None),
        (Failure(FailureClass.GATEWAY_REFUSED, "it refuses"), "warning", "it refuses"),
    ],
)
def test_changes_of_a_gateways_health_are_logged(error, level, cause):
    running = snapshot(State.RUNNING)
    seen = replace(running, gateway=GatewayHealth(1.0, error))
    with structlog.testing.capture_logs() as log:
        logs.log_change(Change(Event.GATEWAY, running, seen, 0.0))
    (entry,) = log
    assert (entry["log_level"], entry["server"], entry.get("cause")) == (level, "lab", cause)


def test_an_entry_names_the_actor_request_and_reason(capsys):
    logs.configure(level="info", form="json", debug=False)
    before, after = snapshot(State.RUNNING), snapshot(State.STOPPING)
    logs.log_change(Change(Event.STOP, before, after, 0.0, Origin("culler", "r-1", "idle for 1 h")))
    logs.log_change(Change(Event.CRASHED, after, snapshot(State.STOPPED), 0.0))
    ordered, followed = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (ordered["actor"], ordered["request_id"], ordered["reason"]) == (
        "culler",
        "r-1",
        "idle for 1 h",
    )
    assert (followed["actor"], followed["generation"]) == ("keeper", 3)
    assert {"request_id", "reason"}.isdisjoint(followed)


@pytest.mark.parametrize("form", ["console", "json"])
def test_escape_sequences_that_servers_log_are_escaped(capsys, form):
    logs.configure(level="info", form=form, debug=False)
    structlog.get_logger("jupyter").info(
        "\x1b]52;c;eA==\x07 said", server="\x9b2J", exception="\x1b[2J"
    )
    written = capsys.readouterr().err
    assert written.isascii()
    assert not set(written) & {"\x1b", "\x07"}
    assert "52;c;eA==" in written


@pytest.mark.parametrize("form", ["console", "json"])
def test_secrets_are_scrubbed_from_every_entry(capsys, form):
    logs.configure(level="info", form=form, debug=True)
    log = structlog.get_logger("labkeeper.x")
    log.info("asked http://h/?token=hunter2", count=1, none=None, place=Path("/p/token=hunter2"))
    log.info(
        "nested",
        sent={"password": "hunter2", "inner": ["Authorization: Bearer hunter2hunter2", 7]},
        token="hunter2",
    )
    logging.getLogger("somebody").warning("else %s", "token=hunter2")
    for fail in (log.exception, logging.getLogger("somebody").exception):
        try:
            raise RuntimeError("token=hunter2")
        except RuntimeError:
            fail("failed")
    written = capsys.readouterr().err
    assert written.count("[secret]") == 10
    assert written.count("Traceback") == 2
    assert "hunter2" not in written
    assert len(written.splitlines()) >= 5


@pytest.fixture
def known():
    """Let a server be known that has some variables; forget it with the test."""
    listener = scrub.SecretsOfServers()

    def know(**env):
        spec = replace(a_spec("lab-1"), env=env)
        after = replace(snapshot(State.STARTING), spec=spec)
        listener.changed(Change(Event.ADMITTED, None, after, 0.0))
        return after

    yield know
    gone = replace(snapshot(State.STOPPED), spec=a_spec("lab-1"), goal=Goal.ABSENT)
    listener.changed(Change(Event.EXITED, None, gone, 0.0))
    scrub.KEEPER.learn(tuple)


def test_a_servers_secrets_are_hidden_in_entries_about_it_and_nowhere_else(capsys, known):
    own = (
        "token:ada",
        "a-request",
        "labkeeper.servers",
        "starting -> failed",
        "import-error",
        "lab-1234",
    )
    before = known(A="its-own-secret", **{f"V{number}": value for number, value in enumerate(own)})
    logs.configure(level="info", form="json", debug=True)
    failed = replace(
        before,
        state=State.FAILED,
        failure=Failure(FailureClass.IMPORT_ERROR, "no its-own-secret for token:ada"),
    )
    logs.log_change(Change(Event.CRASHED, before, failed, 0.0, Origin("token:ada", "a-request")))
    with structlog.contextvars.bound_contextvars(server="lab-1"):
        logging.getLogger("somebody").warning("its-own-secret")
    for about in ({"server": "lab-2"}, {}):
        structlog.get_logger("labkeeper.x").info("said", text="its-own-secret", **about)
    changed, entry, *others = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    facts = {
        "actor": "token:ada",
        "request_id": "a-request",
        "logger": "labkeeper.servers",
        "failure_class": "import-error",
    }
    assert changed.items() >= (facts | {"event": "starting -> failed", "server": "lab-1"}).items()
    assert changed["cause"] == "no [secret] for [secret]"
    assert entry["event"] == "[secret]"
    assert [entry["text"] for entry in others] == ["its-own-secret"] * 2


def test_the_keepers_secrets_are_hidden_anywhere_and_a_token_like_server_name_is_not(capsys, known):
    logs.configure(level="info", form="json", debug=False)
    scrub.KEEPER.learn(lambda: ["owners-token"])
    structlog.get_logger("labkeeper.x").info("said", server="0a" * scrub.TOKEN_BYTES)
    structlog.get_logger("labkeeper.x").info(
        "owners-token", server="owners-token", text="owners-token"
    )
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert first["server"] == "0a" * scrub.TOKEN_BYTES
    assert {second[key] for key in ("event", "server", "text")} == {"[secret]"}


def test_values_that_are_not_secret_are_unchanged(capsys):
    logs.configure(level="info", form="json", debug=False)
    structlog.get_logger("labkeeper.x").info(
        "said", servers=["a"], seconds=0.1, found=True, none=None, at=Path("/x")
    )
    entry = json.loads(capsys.readouterr().err)
    assert (entry["servers"], entry["seconds"], entry["found"], entry["none"]) == (
        ["a"],
        0.1,
        True,
        None,
    )
    assert "/x" in entry["at"]
