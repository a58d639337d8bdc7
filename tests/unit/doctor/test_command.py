"""The command `doctor`: output, streams, exit codes, and no secrets."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import termios

import pytest
import structlog
from click.testing import CliRunner

from fake_keeper import TOKEN, fake_keeper
from gateway_servers import HostileGateway
from harness import free_port
from labkeeper.api.app import create_app
from labkeeper.api.wsgi import WsgiServer
from labkeeper.cli import cli
from labkeeper.core.errors import BackendUnavailable
from labkeeper.doctor import examination
from labkeeper.doctor.examination import Check
from labkeeper.doctor.findings import Finding, Status, ok, problem, warning


@pytest.fixture(autouse=True)
def state_dir(tmp_path, monkeypatch):
    """A state directory of the test, and an environment without our variables."""
    for name in [name for name in os.environ if name.startswith("LABKEEPER_")] + ["NO_COLOR"]:
        monkeypatch.delenv(name, raising=False)
    directory = tmp_path / "state"
    directory.mkdir(mode=0o700)
    monkeypatch.setenv("LABKEEPER_STATE_DIR", str(directory))
    monkeypatch.setenv("LABKEEPER_NOTEBOOK_DIR", str(tmp_path))
    monkeypatch.setenv("LABKEEPER_EDGE", "off")
    monkeypatch.setenv("LABKEEPER_LAUNCH_BY", "exec")
    for name in ("PORT", "LAB_PORT"):
        monkeypatch.setenv(f"LABKEEPER_{name}", str(free_port()))
    return directory


@pytest.fixture
def checks(monkeypatch):
    """Have the command make other checks than its own."""

    def replace(*made):
        monkeypatch.setattr(examination, "CHECKS", made)

    return replace


def finding(*found):
    return Check("Group", "trying something", lambda _: iter(found), anywhere=True)


OK = ok("one", "all is well", ["a line"])
WARNING = warning("two", "not so well", "do this")
PROBLEM = problem("three", "bad", "do that")


def run(*arguments, code=0, **options):
    """Run the command, check its exit code, and return what it prints."""
    result = CliRunner().invoke(cli, ["doctor", *arguments], prog_name="labkeeper", **options)
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.output


def at_terminal(*arguments):
    """Run the command at a terminal, and return the terminal's content."""
    primary, secondary = os.openpty()
    termios.tcsetwinsize(secondary, (40, 100))
    with os.fdopen(secondary, "w") as terminal, contextlib.redirect_stdout(terminal):
        with pytest.raises(SystemExit):
            cli.main(["doctor", *arguments], prog_name="labkeeper")
        # Output arrives in pieces.
        mark = b"<the end>"
        terminal.write(mark.decode())
        terminal.flush()
        shown = b""
        while not shown.endswith(mark):
            shown += os.read(primary, 65536)
    os.close(primary)
    return shown.decode()


@contextlib.contextmanager
def served(directory, **services):
    """A keeper that commands find by its URL."""
    with (
        structlog.testing.capture_logs(),
        fake_keeper(directory, **services) as made,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        server = WsgiServer(create_app(made.services), [listener], threads=4, max_body=2**20)
        server.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.close()


@pytest.mark.parametrize(
    ("found", "code", "summary"),
    [
        ([OK], 0, "nothing is wrong"),
        ([OK, WARNING, WARNING], 0, "2 warnings"),
        ([OK, WARNING, PROBLEM], 1, "1 problem, 1 warning"),
        ([PROBLEM, PROBLEM], 1, "2 problems"),
    ],
)
def test_only_problems_fail(checks, found, code, summary):
    checks(finding(*found))
    assert run(code=code).rstrip().endswith(summary)


def test_in_a_pipe_words_say_it_without_marks_and_colours(checks):
    checks(finding(OK, WARNING), finding(), finding(PROBLEM))
    assert run(code=1).splitlines() == [
        "Group",
        "  ok       one: all is well",
        "    | a line",
        "  warning  two: not so well",
        "    mend: do this",
        "  problem  three: bad",
        "    mend: do that",
        "",
        "1 problem, 1 warning",
    ]


def test_at_a_terminal_marks_and_colours_are_added_to_the_words(checks, monkeypatch):
    checks(finding(OK, WARNING), finding(PROBLEM))
    shown = at_terminal()
    for mark, word in (("✓", "ok"), ("!", "warning"), ("✗", "problem")):
        assert re.search(rf"\x1b\[3\dm{mark} {word}", shown)
    monkeypatch.setenv("NO_COLOR", "1")
    shown = at_terminal()
    assert "✗ problem" in shown
    assert "\x1b" not in shown


def test_groups_are_apart(checks):
    checks(finding(OK), Check("Other", "", lambda _: iter([OK])))
    assert "\n\nOther\n  ok " in run()


@pytest.mark.parametrize(
    ("found", "status", "code"),
    [([OK], "ok", 0), ([OK, WARNING], "warning", 0), ([WARNING, PROBLEM], "problem", 1)],
)
def test_json_has_all_findings(checks, found, status, code):
    checks(finding(*found))
    printed = json.loads(run("--json", code=code))
    assert printed["status"] == status
    assert [Finding(**one | {"details": tuple(one["details"])}) for one in printed["findings"]] == (
        found
    )


def test_what_the_code_of_the_keeper_logs_does_not_mix_with_the_findings(checks):
    log = structlog.get_logger("labkeeper.tests")

    def look(_):
        log.warning("what the finding says")
        yield OK

    checks(Check("Group", "trying", look))
    assert json.loads(run("--json"))["status"] == "ok"
    with structlog.testing.capture_logs() as logged:
        log.warning("later")
    assert [entry["event"] for entry in logged] == ["later"]


def test_a_check_that_fails_is_a_finding(checks):
    def fail(_):
        raise BackendUnavailable("no thread")
        yield

    checks(Check("Group", "trying", fail))
    assert "a check cannot be made while trying: no thread" in run()


@pytest.mark.root
def test_every_warning_and_problem_has_what_mends_it(monkeypatch):
    monkeypatch.setenv("LABKEEPER_MISSPELLED", "1")
    monkeypatch.setenv("LABKEEPER_AUTH", "none")
    monkeypatch.setenv("LABKEEPER_NOTEBOOK_DIR", "/no/such/directory")
    found = json.loads(run("--json", code=1))["findings"]
    statuses = {one["status"] for one in found}
    assert statuses == set(Status)
    assert all(bool(one["mend"]) == (one["status"] in {"warning", "problem"}) for one in found)
    mends = [one["mend"] for one in found if one["subject"] == "settings"]
    assert mends[:2] == ["unset LABKEEPER_MISSPELLED", "export LABKEEPER_AUTH=token"]


def test_settings_that_contradict_each_other_are_a_problem(monkeypatch):
    monkeypatch.setenv("LABKEEPER_LAB_DOMAIN", "labs.example.org")
    found = json.loads(run("--json", code=1))["findings"]
    (settings,) = [
        one for one in found if (one["subject"], one["status"]) == ("settings", "problem")
    ]
    assert "LABKEEPER_LAB_DOMAIN needs the edge" in settings["message"]


def test_settings_that_are_invalid_are_wrong_usage(monkeypatch):
    monkeypatch.setenv("LABKEEPER_PORT", "many")
    assert "bad setting LABKEEPER_PORT" in run(code=2)


# The keeper


def test_without_a_keeper_what_one_needs_is_checked(state_dir):
    shown = run()
    assert f"skipped  keeper: none runs on {state_dir}" in shown
    assert "for the API" in shown


def test_a_keeper_is_asked_and_its_machine_examined(tmp_path, monkeypatch):
    monkeypatch.setenv("LABKEEPER_TOKEN", TOKEN)
    with served(tmp_path) as url:
        shown = run("--url", url)
    assert "version 1.2.3" in shown
    assert f"the API is at {url}" in shown


def test_of_a_keeper_elsewhere_only_its_answers_are_judged(tmp_path, monkeypatch):
    monkeypatch.setenv("LABKEEPER_TOKEN", TOKEN)
    monkeypatch.setattr("labkeeper.cli.connect._LOOPBACK", frozenset())
    with served(tmp_path) as url:
        shown = run("--url", url)
        monkeypatch.setenv("LABKEEPER_TOKEN", "a-wrong-token-of-the-tests")
        assert "problem  keeper: " in run("--url", url, code=1)
    assert "watchers: all of them work" in shown
    assert "state directory" not in shown


@pytest.mark.parametrize(
    ("is_here", "mend"), [(True, "labkeeper serve"), (False, "on its machine")]
)
def test_a_keeper_that_is_named_must_answer(monkeypatch, is_here, mend):
    if not is_here:
        monkeypatch.setattr("labkeeper.cli.connect._LOOPBACK", frozenset())
    url = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("LABKEEPER_URL", url)
    shown = run(code=1)
    assert f"problem  keeper: cannot reach a keeper at {url}" in shown
    assert mend in shown


def test_a_keeper_that_refuses_us_is_to_be_asked_by_its_user(tmp_path, state_dir, monkeypatch):
    with served(tmp_path) as url:
        shown = run("--url", url, code=1)
        assert f"mend: sudo -u {state_dir.owner()} labkeeper doctor" in shown
        monkeypatch.setenv("LABKEEPER_STATE_DIR", str(tmp_path / "none"))
        assert "mend: run this command as the keeper's user" in run("--url", url, code=1)


def test_a_url_that_is_none_is_wrong_usage():
    assert "as the URL of a keeper" in run("--url", "nonsense", code=2)


# Gateways and secrets


def test_a_gateway_is_checked_with_its_token_which_is_not_shown(tmp_path):
    secret = "the-secret-token-of-a-gateway"
    with HostileGateway() as gateway:
        shown = run("--gateway", gateway.url, "--gateway-token-file", "-", input=f"{secret}\n")
        assert gateway.asked[-1].headers["authorization"] == f"token {secret}"
    assert f"{gateway.url} answers, with 1 kernelspecs" in shown
    assert secret not in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gateway", "nonsense"], "--gateway"),
        (["--gateway", "http://x", "--gateway-token-file", "-"], "--gateway-token-file"),
        (["--gateway-token-file", "-"], "only together with --gateway"),
    ],
)
def test_options_of_gateways_are_checked_without_repeating_a_token(arguments, says):
    shown = run(*arguments, code=2, input="a-secret\nof two lines")
    assert says in shown
    assert "a-secret" not in shown


def test_secrets_of_the_settings_are_not_shown(checks, monkeypatch):
    secrets = {
        "TOKEN": "the-secret-of-the-owner",
        "WEBHOOK_URL": "https://hooks.example/s3cret-path",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(f"LABKEEPER_{name}", value)
    everything = " ".join(secrets.values())
    checks(finding(problem("one", everything, everything, [everything])))
    for arguments in ([], ["--json"]):
        shown = run(*arguments, code=1)
        assert "[secret]" in shown
        assert not [value for value in secrets.values() if value in shown]
