"""The command line against a running application: output, streams and exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import termios
import threading
import webbrowser
from pathlib import Path

import httpx
import pytest
import structlog
from click.testing import CliRunner

from fake_keeper import TOKEN, a_server, fake_keeper, serving
from harness import until
from labkeeper import serve
from labkeeper.api.app import create_app
from labkeeper.api.wsgi import WsgiServer
from labkeeper.cli import cli, output, servers, start
from labkeeper.client import Gateway, Server
from labkeeper.core.errors import BackendRefused, BackendUnavailable
from labkeeper.core.ports import Library
from labkeeper.core.server import Kernel, OwnKernel
from labkeeper.schema.requests.flat import flat_fields
from labkeeper.schema.requests.servers import ServerRequest
from labkeeper.settings.model import Settings

COMMANDS = sorted(cli.commands)
ASKING = ["start", "ls", "show", "stop", "restart", "logs", "open", "version"]
"""The commands that call a keeper."""
LINK = re.compile(r"http://[\w.]+:8888/lab\?token=token-of-\d+\s+")
"""The default server's link from the fake backend, with the end of its line."""


@pytest.fixture(autouse=True)
def state_dir(tmp_path, monkeypatch):
    """A state directory of the test, and an environment without our variables."""
    for name in [name for name in os.environ if name.startswith("LABKEEPER_")] + [
        "NO_COLOR",
        "FORCE_COLOR",
    ]:
        monkeypatch.delenv(name, raising=False)
    directory = tmp_path / "state"
    directory.mkdir()
    monkeypatch.setenv("LABKEEPER_STATE_DIR", str(directory))
    return directory


@pytest.fixture(autouse=True)
def _privileges_kept(monkeypatch):
    """Keep `serve` from dropping privileges for good, since it runs in the test's own process."""
    for name in ("hide", "gain_nothing"):
        monkeypatch.setattr(f"labkeeper.cli.keeper.{name}", lambda: None)


@pytest.fixture
def served(tmp_path, state_dir):
    """A keeper that commands find through the state directory, as `serve` leaves it."""
    # The keeper's own log would mix with the output under test.
    with structlog.testing.capture_logs(), serving(tmp_path) as there:
        (state_dir / "keeper.json").write_text(json.dumps({"url": there.url, "pid": os.getpid()}))
        (state_dir / "token").write_text(TOKEN + "\n")
        yield there


def run(*arguments, code=0, **options):
    """Run a command, check its exit code, and return the result."""
    result = CliRunner().invoke(cli, arguments, prog_name="labkeeper", **options)
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def at_terminal(*arguments, code=0):
    """Run a command at a terminal of 100 columns, and return the terminal's content."""
    primary, secondary = os.openpty()
    termios.tcsetwinsize(secondary, (40, 100))
    try:
        with (
            os.fdopen(secondary, "w") as terminal,
            contextlib.redirect_stdout(terminal),
            contextlib.redirect_stderr(terminal),
        ):
            with pytest.raises(SystemExit) as ended:
                cli.main(list(arguments), prog_name="labkeeper")
            # Output arrives in pieces, and is lost if the terminal is closed too early.
            mark = "<the end>"
            terminal.write(mark)
            terminal.flush()
            shown = ""
            while not shown.endswith(mark):
                shown += os.read(primary, 65536).decode()
    finally:
        os.close(primary)
    assert ended.value.code == code, shown
    return shown.removesuffix(mark)


def process(*arguments, **options):
    """Start the command line as a process."""
    command = [sys.executable, "-m", "labkeeper", *arguments]
    return subprocess.Popen(
        command, text=True, stderr=subprocess.PIPE, **({"stdout": subprocess.PIPE} | options)
    )


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command):
    """The short help fits into one line."""
    text = run(command, "--help").stdout
    assert text.startswith(f"Usage: labkeeper {command}")
    assert f"  labkeeper {command}" in text or f"$(labkeeper {command})" in text
    assert cli.commands[command].get_short_help_str(limit=64).endswith(".")
    assert "..." not in cli.commands[command].get_short_help_str(limit=64)


def test_without_a_command_all_commands_are_listed():
    """It is a usage error all the same."""
    text = run(code=2).stderr
    assert all(re.search(rf"^  {command}  ", text, re.MULTILINE) for command in COMMANDS)


def test_version_needs_no_keeper():
    assert re.fullmatch(r"labkeeper \d+\.\d+.*\n", run("--version").stdout)


# Serve


SECRETS = {"token", "webhook_url", "webhook_secret"}


def test_serve_has_a_flag_for_every_setting_that_is_not_secret():
    """Flags and their help come from the settings; secrets on a command line would be public."""
    text = " ".join(run("serve", "--help").stdout.split())
    for name, field in Settings.model_fields.items():
        flag = f" --{name.replace('_', '-')} "
        assert (flag in text) is (name not in SECRETS), name
        assert (f"LABKEEPER_{name.upper()};" in text or f"LABKEEPER_{name.upper()}]" in text) is (
            name not in SECRETS
        ), name
        assert name in SECRETS or field.description in text, name
        assert ("SecretStr" in str(field.annotation)) is (name in SECRETS), name


@pytest.fixture
def chosen(monkeypatch):
    """The arguments that `serve` was called with; nothing is served."""
    calls = []
    monkeypatch.setattr(
        serve, "run", lambda settings, **others: calls.append((settings, others)) or 0
    )
    return calls


def test_flags_win_over_the_environment(chosen, monkeypatch, tmp_path):
    """Other settings come from the environment, or from options before the command."""
    monkeypatch.setenv("LABKEEPER_PORT", "8001")
    monkeypatch.setenv("LABKEEPER_LAB_PORT", "8002")
    run(
        "--state-dir",
        str(tmp_path / "x"),
        "serve",
        "--port",
        "8003",
        "--debug",
        "--log-format",
        "json",
        "--stop-grace",
        "2.5",
        "--start",
    )
    settings, others = chosen[0]
    assert (settings.port, settings.lab_port, settings.debug, settings.log_format) == (
        8003,
        8002,
        True,
        "json",
    )
    assert (settings.stop_grace, settings.state_dir, others["first"]) == (2.5, tmp_path / "x", True)
    run("--state-dir", "/before", "serve", "--state-dir", "/after", "--no-debug")
    settings, others = chosen[1]
    assert (settings.state_dir, settings.debug, others["first"]) == (Path("/after"), False, False)


def test_serve_tells_the_keeper_whether_it_runs_at_a_terminal(chosen):
    """Other output may be stored, so it must not contain secrets."""
    run("serve", "--start")
    at_terminal("serve", "--start")
    assert [others["at_terminal"] for _, others in chosen] == [False, True]


def test_serve_exits_with_the_keepers_exit_code(monkeypatch):
    """It is not 0 if servers could not be stopped."""
    monkeypatch.setattr(serve, "run", lambda *_, **__: 1)
    run("serve", code=1)


def test_serve_runs_until_sigterm():
    """It prints its URL, other commands find it, and it exits with 0."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with process("serve", "--port", str(port)) as keeper:
        assert f"http://127.0.0.1:{port}" in keeper.stdout.readline()
        assert run("ls").stdout.split() == ["NAME", "STATE", "SINCE", "ADDRESS", "ROOT", "GATEWAY"]
        keeper.send_signal(signal.SIGTERM)
        keeper.communicate(timeout=30)
    assert keeper.returncode == 0


# Start


def test_start_prints_the_link_and_nothing_else(served):
    """Stdout is one line, the link with its token; the default name is `default`."""
    result = run("start")
    assert LINK.fullmatch(result.stdout)
    assert result.stderr == ""
    assert run("start", "default").stdout == result.stdout


def test_options_of_start_are_fields_of_the_request(served, tmp_path):
    """`~` and relative directories are resolved on the caller's side."""
    (tmp_path / "here").mkdir()
    options = [
        "--gateway-url",
        "http://gw:1",
        "--port",
        "9000",
        "--base-url",
        "/a",
        "--default-url",
        "/lab/tree/x",
    ]
    options += ["--description", "for the course", "--kernels-by", "exec", "--json"]
    options += [
        "--env",
        "A=1=2",
        "--label",
        "team=blue",
        "--label",
        "empty=",
        "-o",
        "ServerApp.quit_button=false",
    ]
    with contextlib.chdir(tmp_path):
        server = json.loads(run("start", "demo", "--root-dir", "here", *options).stdout)
    assert (server["name"], server["root_dir"]) == ("demo", str(tmp_path / "here"))
    assert (server["gateway"]["url"], server["port"], server["base_url"]) == (
        "http://gw:1",
        9000,
        "/a/",
    )
    assert (server["default_url"], server["labels"]) == (
        "/lab/tree/x",
        {"team": "blue", "empty": ""},
    )
    assert server["jupyter_options"] == {"ServerApp.quit_button": False}
    assert (server["description"], server["kernels_by"]) == ("for the course", "exec")
    assert re.search("description +for the course", run("show", "demo").stdout)
    assert "options ServerApp.quit_button=false" in re.sub(" +", " ", run("show", "demo").stdout)
    assert dict(served.world.processes[0].spec.env) == {"A": "1=2"}


def test_an_option_of_jupyter_must_be_json(served):
    result = run("start", "--option", "ServerApp.quit_button=no", code=2)
    assert "'no' is not JSON, such as true, 10 or 0.5" in result.stderr


def test_the_request_may_be_given_as_json(served, tmp_path):
    """From a file or stdin; options override its fields."""
    spec = tmp_path / "spec.json"
    spec.write_text(
        '{"name": "x", "gateway-url": "http://gw:1", "gateway_headers": {"X-Team": "blue"}}'
    )
    server = json.loads(
        run("start", "--json-spec", str(spec), "--gateway-url", "http://gw:2", "--json").stdout
    )
    assert (server["name"], server["gateway"]["url"]) == ("x", "http://gw:2")
    server = json.loads(
        run("start", "y", "--json-spec", "-", "--json", input='{"name": "z", "port": 9001}').stdout
    )
    assert (server["name"], server["port"]) == ("y", 9001)
    nested = (
        '{"name": "n", "gateway": {"url": "http://gw:1", "required": false},'
        ' "limits": {"memory": 1073741824}}'
    )
    options = ["--gateway-url", "http://gw:3", "--memory-limit", "512M", "--cpu-limit", "2"]
    server = json.loads(run("start", "--json-spec", "-", *options, "--json", input=nested).stdout)
    assert (server["gateway"]["url"], server["gateway"]["required"]) == ("http://gw:3", False)
    assert {name: limit["limit"] for name, limit in server["limits"].items()} == {
        "memory": 512 * 2**20,
        "cpus": 2.0,
    }
    twice = '{"gateway_url": "http://gw:1", "gateway": {"url": "http://gw:1"}}'
    assert (
        "gateway_url: is gateway.url by another name"
        in run("start", "--json-spec", "-", "--port", "1", input=twice, code=2).stderr
    )


def test_start_has_an_option_for_each_field_of_a_request_except_secrets():
    """Other users of the machine can read command lines."""
    flags = {
        flag
        for option in start._request_options()
        for flag in (*option.opts, *option.secondary_opts)
    }
    fields = {name for name, _ in flat_fields(ServerRequest)} - {
        "name",
        "labels",
        "jupyter_options",
    }
    secret = {"gateway_auth_token", "gateway_headers"}
    expected = {f"--{name.replace('_', '-')}" for name in fields - secret}
    assert flags == expected | {
        "--label",
        "--option",
        "-o",
        "--no-require-gateway",
        "--no-gateway-validate-cert",
    }


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--port", "0"),
        ("--cpu-limit", "0"),
        ("--process-limit", "1"),
        ("--gateway-connect-timeout", "0"),
        ("--kernels-by", "spawn"),
        ("--memory-limit", "x"),
    ],
)
def test_an_option_with_an_invalid_value_is_a_usage_error(option, value):
    assert option in run("start", option, value, code=2).stderr


def test_start_with_a_name_alone_starts_a_stopped_server_unchanged(served):
    """Its stored spec is used; other options are compared with it."""
    run("start", "demo", "--label", "team=blue")
    run("stop", "demo")
    assert json.loads(run("start", "demo", "--json").stdout)["labels"] == {"team": "blue"}
    assert "differs in labels" in run("start", "demo", "--label", "team=red", code=1).stderr


def test_start_does_not_wait_with_wait_zero(served):
    """A server that is not ready yet is not an error: stdout is empty, and stderr has its state."""
    served.world.temper("default").boots = False
    result = run("start", "--wait", "0")
    assert (result.stdout, "server 'default' is starting" in result.stderr) == ("", True)


def test_a_failed_start_shows_the_last_log_lines(served):
    """Cause and log are on stderr, and the exit code is 1."""
    served.world.temper("default").refusal = BackendRefused(
        "cannot start: boom", log_tail=["one", "two"]
    )
    result = run("start", code=1)
    assert result.stdout == ""
    assert result.stderr.splitlines() == ["labkeeper: cannot start: boom", "  | one", "  | two"]
    shown = run("show").stdout
    assert "cannot start: boom (other)" in shown


# Ls and show


def test_ls_prints_plain_aligned_columns_to_a_pipe(served, tmp_path):
    """Without colours and secrets."""
    run("start")
    run("start", "a-much-longer-name", "--gateway-url", "http://gw:1")
    run("stop", "a-much-longer-name")
    lines = run("ls").stdout.splitlines()
    assert {
        line.index(word) for line, word in zip(lines, ["STATE", "stopped", "running"], strict=True)
    } == {20}
    assert lines[1].split()[-3:] == ["-", str(tmp_path), "http://gw:1"]
    assert ":8888/lab " in lines[2]
    assert "token" not in "".join(lines)


def test_ls_filters_by_state_and_label(served):
    run("start", "a", "--label", "team=blue")
    run("start", "b")
    run("stop", "b")

    def names(*filters):
        return [
            server["name"] for server in json.loads(run("ls", "--json", *filters).stdout)["servers"]
        ]

    assert names() == ["a", "b"]
    assert names("--label", "team=blue") == names("--state", "running") == ["a"]
    assert names("--state", "running", "--state", "stopped") == ["a", "b"]
    assert names("--label", "team=red") == []


def test_ls_json_prints_the_response_of_the_api(served):
    """Including secrets."""
    run("start")
    api = served.app.test_client().get(
        "/api/servers", headers={"Authorization": f"Bearer {TOKEN}"}, base_url=served.url
    )
    assert json.loads(run("ls", "--json").stdout) == api.get_json()


def test_ls_at_a_terminal_is_coloured_and_fits_its_width(served, monkeypatch):
    """NO_COLOR disables colours."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("COLUMNS", raising=False)
    run("start", "demo", "--gateway-url", f"http://gw:1/{'x' * 200}")
    shown = at_terminal("ls")
    assert "\x1b[32mrunning" in shown
    assert max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in shown.splitlines()) <= 100
    assert "\x1b[32mrunning" in at_terminal("show", "demo")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[32m" not in at_terminal("ls")
    assert "\x1b" not in at_terminal("show", "demo")
    assert "\x1b" not in at_terminal("show", "nope", code=4)


def test_an_empty_list_suggests_the_next_step_at_a_terminal(served):
    """A pipe gets the header alone."""
    assert "`labkeeper start` starts one" in at_terminal("ls")
    assert "no servers fit" in at_terminal("ls", "--state", "failed")
    assert run("ls").stderr == ""


def test_show_prints_a_server_without_secrets(served):
    """Unset fields are left out; the token is in `--json` only."""
    run("start", "--label", "team=blue")
    text = run("show").stdout
    assert re.search(r"^state +running$", text, re.MULTILINE)
    assert re.search(r"^labels +team=blue$", text, re.MULTILINE)
    assert re.search(r"^kernels by +fork$", text, re.MULTILINE)
    assert "failure" not in text
    assert "token" not in text
    assert json.loads(run("show", "--json").stdout)["token"].startswith("token-of-")
    run("stop")
    assert re.search(r"^stopped +shut down in \d+\.\d s$", run("show").stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("2000-01-01T00:00:00.000Z", r"\d+ d ago"),
        ("2999-01-01T00:00:00Z", "0 s ago"),
        ("yesterday", "yesterday"),
        ("2000-01-01", "2000-01-01"),
    ],
)
def test_ages_have_a_single_unit(time, expected):
    """Clock differences give 0 seconds, and other text stays as it is."""
    assert re.fullmatch(expected, output.ago(time))


# Stop and restart


def test_stop_prints_how_each_server_ended(served):
    """One line on stdout for each; an error sets the exit code, and other servers still stop."""
    run("start", "a")
    run("start", "b")
    result = run("stop", "a", "nope", "b", code=4)
    assert re.fullmatch(r"a: shut down in \d\.\d s\nb: shut down in \d\.\d s\n", result.stdout)
    assert result.stderr.count("\n") == 1
    assert "'nope'" in result.stderr


@pytest.mark.parametrize("options", [[], ["--delete"]])
def test_stop_ends_servers_concurrently(served, options):
    """It sends all requests before it waits: here the first server ends after the last one."""
    for name in ("a", "b", "c"):
        run("start", name)
    served.world.temper("a").obeys = False
    stop_server = served.app.view_functions["stop_server"]

    def stop_then_end_the_first(**given):
        response = stop_server(**given)
        if given["name"] == "c":
            served.world.leave("a")
        return response

    served.app.view_functions["stop_server"] = stop_then_end_the_first
    printed = run("stop", "a", "b", "c", *options).stdout
    assert [line[:2] for line in printed.splitlines()] == ["a:", "b:", "c:"]
    assert "SIGKILL" not in printed


def test_stop_all_stops_every_server(served):
    """`--all` takes no names; without servers it prints nothing and succeeds."""
    assert run("stop", "--all").stdout == ""
    for name in ("a", "b"):
        run("start", name)
    assert [line[:2] for line in run("stop", "--all").stdout.splitlines()] == ["a:", "b:"]
    assert "takes no names" in run("stop", "--all", "a", code=2).stderr
    run("stop", "--all", "--delete")
    assert json.loads(run("ls", "--json").stdout)["servers"] == []


def test_stop_can_force_and_delete(served):
    """`--force` kills, `--delete` deletes, `--json` prints the response for each server."""
    run("start")
    assert json.loads(run("stop", "--force", "--json").stdout)["stop_report"]["method"] == "sigkill"
    assert re.fullmatch(r"default: ended by SIGKILL in \d\.\d s\n", run("stop").stdout)
    run("start")
    assert json.loads(run("stop", "--delete", "--json").stdout)["goal"] == "absent"
    run("show", code=4)


def test_stop_does_not_wait_with_wait_zero(served):
    """It prints the current state."""
    served.world.temper("default").obeys = False
    run("start")
    assert run("stop", "--wait", "0").stdout == "default: stopping\n"


def test_stop_reports_kernels_that_may_be_left_on_a_gateway(capsys):
    report = {
        "method": "shutdown",
        "seconds": 0.25,
        "kernels_stopped": ["k1", "k2"],
        "kernels_left": ["k3"],
    }
    servers._show_stopped(a_server(state="stopped", goal="down", stop_report=report), as_json=False)
    printed = capsys.readouterr()
    assert printed.out == "x: shut down in 0.2 s, with 2 kernels\n"
    assert (
        printed.err == "x: kernels may be left on its gateway, and are ended when it answers: k3\n"
    )


def test_stop_without_a_keeper_prints_a_single_error():
    assert run("stop", "a", "b", "--url", "http://127.0.0.1:1", code=3).stderr.count("\n") == 1


def test_restart_prints_the_new_link(served):
    """The restarted server has a new token."""
    before = run("start").stdout
    after = run("restart").stdout
    assert LINK.fullmatch(after)
    assert after != before
    run("restart", "nope", code=4)


def test_restart_that_cannot_keep_kernels_says_why(served):
    run("start")
    result = run("restart", "--keep-kernels", code=1)
    assert "not on a gateway" in result.stderr


def test_show_prints_the_gateway_and_kept_kernels(served):
    made = run(
        "start",
        "x",
        "--gateway-url",
        "http://g:1",
        "--kernel-env",
        "KERNEL_A=1",
        "--no-require-gateway",
        "--json",
    )
    gateway = json.loads(made.stdout)["gateway"]
    assert (gateway["required"], gateway["kernel_env_passed"]) == (False, ["KERNEL_A"])
    shown = run("show", "x").stdout
    assert re.search(r"^gateway +http://g:1$", shown, re.MULTILINE)
    assert "kernels by" not in shown
    served.world.living("x")[0].kernels = (OwnKernel("k1"),)
    served.world.temper("x").boots = False
    served.world.crash("x")
    until(lambda: re.search(r"^kernels kept +k1$", run("show", "x").stdout, re.MULTILINE))


def test_show_lists_the_kernels_of_a_running_server(served):
    """One line each; how a kernel on a gateway was launched is unknown."""
    run("start", "x")
    assert not re.search("^kernels  ", run("show", "x").stdout, re.MULTILINE)
    served.probe.kernels_there = [
        Kernel("k-1", "python3", "idle", launched_by="fork"),
        Kernel("k-2", "ir", "busy", launched_by="exec", exec_reason="it is no IPython kernel"),
        Kernel("k-3", "spark", "starting"),
    ]
    lines = run("show", "x").stdout.splitlines()
    first = next(at for at, line in enumerate(lines) if re.match("kernels  ", line))
    indent = lines[first].index("k-1")
    assert [(line[:indent].strip(), line[indent:]) for line in lines[first : first + 4]] == [
        ("kernels", "k-1: python3, idle, fork"),
        ("", "k-2: ir, busy, exec (it is no IPython kernel)"),
        ("", "k-3: spark, starting"),
        ("jupyter server", lines[first + 3][indent:]),
    ]
    assert "k-1" not in run("show", "x", "--json").stdout
    run("stop", "x")
    assert "k-1" not in run("show", "x").stdout


def test_show_names_the_libraries_that_forked_kernels_share(served):
    """One line each; a server whose kernels are executed or on a gateway has none."""
    run("start", "x")
    assert "preloaded" not in run("show", "x").stdout
    served.world.libraries = (
        Library("numpy", loaded=True),
        Library("polars", loaded=False, reason="importing it starts a thread"),
        Library("pandas", loaded=None, reason="it is being loaded"),
    )
    shown = run("show", "x").stdout
    assert re.search(
        r"^preloaded +numpy\n +polars: not loaded \(importing it starts a thread\)\n"
        r" +pandas: not loaded \(it is being loaded\)\n",
        shown,
        re.MULTILINE,
    )
    run("start", "y", "--kernels-by", "exec")
    assert "preloaded" not in run("show", "y").stdout
    run("start", "z", "--gateway-url", "http://g:1")
    assert "preloaded" not in run("show", "z").stdout
    run("stop", "x")
    assert "preloaded" not in run("show", "x").stdout


def test_show_prints_the_rest_if_the_kernels_cannot_be_listed(served):
    run("start", "x")
    served.probe.error = BackendUnavailable("cannot list the kernels: it answered 503")
    shown = run("show", "x").stdout
    because = r"cannot be listed: cannot list the kernels: it answered 503"
    assert re.search(rf"^kernels +{because}$", shown, re.MULTILINE)
    assert re.search(r"^state +running$", shown, re.MULTILINE)
    assert re.search(r"^created +\S+Z$", shown, re.MULTILINE)


def test_kernels_cannot_control_the_terminal_or_add_lines(served):
    """The server's user determines what it reports of them."""
    run("start", "x")
    served.probe.kernels_there = [Kernel("k", "python3", "idle\x1b[2J\nstate  failed")]
    shown = at_terminal("show", "x")
    assert "\x1b[2J" not in shown
    assert "k: python3, idle\\x1b[2J\\x0astate  failed" in shown


HEALTH = {
    "url": "http://g:1",
    "required": True,
    "since": "2026-01-01T00:00:00Z",
    "kernel_env_passed": [],
    "kernel_env_if_allowed": [],
}
REFUSED = {
    "failure_class": "gateway-refused",
    "message": "the gateway http://g:1 refuses",
    "exit": None,
    "log_tail": [],
}


@pytest.mark.parametrize(
    ("health", "description"),
    [
        (
            {"reachable": True, "error": None, "kernelspecs": 1},
            "http://g:1 (answers, 1 kernelspec)",
        ),
        (
            {"reachable": True, "error": None, "kernelspecs": 2},
            "http://g:1 (answers, 2 kernelspecs)",
        ),
        (
            {"reachable": False, "error": REFUSED, "kernelspecs": None},
            "http://g:1 (not usable since 2026-01-01T00:00:00Z: the gateway http://g:1 refuses)",
        ),
    ],
)
def test_a_gateways_health_is_described(health, description):
    assert servers._gateway(Gateway(**HEALTH, **health)) == description


# Logs, open, token, version


def test_logs_are_printed_unchanged_to_a_pipe(served):
    """Escape sequences included."""
    run("start")
    served.world.write("default", "\x1b[31mred\x1b[0m\x1b[2J")
    assert run("logs", "-n", "1").stdout == "\x1b[31mred\x1b[0m\x1b[2J\n"
    assert len(run("logs").stdout.splitlines()) == 2
    run("logs", "nope", code=4)


EVIL = "\x1b]52;c;eA==\x07\x9b2J"
"""Sets the clipboard, and clears the screen."""


def test_escape_sequences_of_others_are_escaped_at_a_terminal(served, monkeypatch):
    """In logs, details, lists, events and errors."""
    # A keeper may have stored such text before it was refused.
    monkeypatch.setattr(Server, "root_dir", property(lambda _: f"/x{EVIL}\nforged"), raising=False)
    served.world.temper("default").refusal = BackendRefused(
        f"cannot start: {EVIL}", log_tail=[EVIL]
    )
    served.world.write("default", f"\x1b[31mred\x1b[0m {EVIL}")
    shown = [
        at_terminal("start", code=1),
        *(at_terminal(command) for command in ("logs", "show", "ls", "events")),
    ]
    for text in shown:
        assert r"\x1b]52;c;eA==\x07\x9b2J" in text.replace("\r\n", "")
        assert not {"\x07", "\x9b"} & set(text)
        assert "\x1b]" not in text
    assert "\x1b[31mred\x1b[0m" in shown[1]
    assert r"\x9b2J\x0aforged" in shown[2]


def test_logs_follow_prints_until_the_server_ends(served):
    """`-f` then exits with 0."""
    run("start")
    with process("logs", "-f", "-n", "1") as following:
        assert following.stdout.readline() == "launch 1 of server 'default', pid 1000\n"
        run("stop")
        out, err = following.communicate(timeout=30)
    assert (out, err, following.returncode) == ("pid 1000 ended: exit code 0\n", "", 0)


def test_over_the_unix_socket_the_generated_token_is_sent_if_the_keeper_demands_one(
    tmp_path, state_dir
):
    """A keeper that cannot tell its own user from a server's processes asks for a token."""
    path = os.path.relpath(state_dir / "keeper.sock")
    with (
        structlog.testing.capture_logs(),
        fake_keeper(tmp_path, is_server=lambda _pid: True) as made,
        socket.socket(socket.AF_UNIX) as door,
    ):
        door.bind(path)
        server = WsgiServer(create_app(made.services), [door], threads=4, max_body=2**20)
        server.start()
        (state_dir / "keeper.json").write_text(
            json.dumps({"url": "http://127.0.0.1:1", "pid": os.getpid(), "socket": path})
        )
        assert "without a token" in run("whoami", code=1).stderr
        (state_dir / "token").write_text(TOKEN + "\n")
        assert run("whoami").stdout.startswith("token:owner")
        server.close()


@pytest.fixture
def _sigint_handled():
    """Handle SIGINT, which background jobs of a shell ignore, as do their children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_sigint_handled")
def test_ctrl_c_exits_with_130_without_a_traceback(served):
    run("start")
    with process("logs", "-f") as following:
        following.stdout.readline()
        following.send_signal(signal.SIGINT)
        _, err = following.communicate(timeout=30)
    assert (err.strip(), following.returncode) == ("", 130)
    run("stop")


def test_a_closed_pipe_is_not_an_error(served):
    """As in `labkeeper ls | head -0`."""
    reading, writing = os.pipe()
    os.close(reading)
    with process("ls", stdout=writing) as listing:
        os.close(writing)
        _, err = listing.communicate(timeout=30)
    assert err == ""


def test_open_opens_a_one_time_link(served, monkeypatch):
    """`--print`, or a missing browser, prints the lasting link with the token instead."""
    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda link: opened.append(link) or True)
    link = run("start").stdout
    assert run("open").stdout == ""
    (once,) = opened
    assert re.fullmatch(rf"{served.url}/open/[\w-]{{43}}", once)
    assert (
        httpx.get(once)
        .headers["Location"]
        .startswith("http://127.0.0.1:8888/login?token=token-of-")
    )
    assert httpx.get(once).status_code == 410
    assert run("open", "--print").stdout == link
    monkeypatch.setattr(webbrowser, "open", lambda _link: False)
    result = run("open")
    assert (result.stdout, "cannot find a browser" in result.stderr) == (link, True)


def test_open_waits_for_a_server_that_is_starting(served):
    served.world.temper("default").boots = False
    run("start", "--wait", "0")
    until(lambda: served.world.living("default"), what="the server's process to be launched")
    get_server = served.app.view_functions["get_server"]

    def get_then_answer(**given):
        response = get_server(**given)
        served.world.answer("default")
        return response

    served.app.view_functions["get_server"] = get_then_answer
    assert LINK.fullmatch(run("open", "--print").stdout)


def test_open_refuses_a_stopped_server(served):
    """The message says how to start it."""
    run("start")
    run("stop")
    assert "it is stopped; `labkeeper start default` starts it" in run("open", code=1).stderr


def test_token_prints_the_token_alone(served, monkeypatch):
    """The generated one is read without a keeper; the environment overrides it."""
    assert run("token").stdout == f"{TOKEN}\n"
    monkeypatch.setenv("LABKEEPER_TOKEN", "another-token-of-the-tests")
    assert run("token").stdout == "another-token-of-the-tests\n"
    monkeypatch.delenv("LABKEEPER_TOKEN")
    assert (
        "cannot find a token in /nowhere" in run("token", "--state-dir", "/nowhere", code=2).stderr
    )


def test_tokens_are_created_listed_and_revoked(served):
    """A new token is the only line on stdout, and is not shown again."""
    empty = run("token", "ls").stdout
    assert empty.split() == ["NAME", "SCOPE", "FOR", "EXPIRES", "LAST", "USED"]
    options = [
        "--scope",
        "manage",
        "--server",
        "ci-*",
        "--label",
        "team=blue",
        "--user",
        "ada",
        "--expires",
        "30d",
    ]
    (text,) = run("token", "create", "ci", *options).stdout.splitlines()
    assert text.startswith("lk_")
    me = run("whoami", env={"LABKEEPER_TOKEN": text}).stdout
    assert me == "token:ci: manage, ci-*, team=blue, as ada\n"
    assert json.loads(run("whoami", "--json").stdout)["actor"] == "token:owner"
    made = json.loads(run("token", "create", "all", "--scope", "read", "--json").stdout)
    assert (made["scope"], made["token"][:3]) == ("read", "lk_")
    rows = run("token", "ls").stdout.splitlines()
    assert re.fullmatch(r"all +read +all servers +never +never", rows[1])
    assert re.fullmatch(r"ci +manage +ci-\*, team=blue, as ada +20\S+Z +0 s ago|ci .* ago", rows[2])
    assert [one["name"] for one in json.loads(run("token", "ls", "--json").stdout)["tokens"]] == [
        "all",
        "ci",
    ]
    assert run("token", "revoke", "ci").stdout == ""
    assert "cannot find token 'ci'" in run("token", "revoke", "ci", code=1).stderr
    assert "cannot find token 'No Name'" in run("token", "revoke", "No Name", code=1).stderr
    assert (
        "is not KEY=VALUE"
        in run("token", "create", "x", "--scope", "read", "--label", "team", code=2).stderr
    )


def test_token_commands_confirm_at_a_terminal(served):
    assert "no tokens but the owner's" in at_terminal("token", "ls")
    assert "not shown again" in at_terminal("token", "create", "ci", "--scope", "read")
    assert "token 'ci' is revoked" in at_terminal("token", "revoke", "ci")


def test_a_read_only_token_cannot_open_a_lab(served):
    run("start")
    text = run("token", "create", "eye", "--scope", "read").stdout.strip()
    env = {"LABKEEPER_TOKEN": text}
    assert "your token is for reading" in run("open", env=env, code=1).stderr
    assert "needs the scope 'manage'" in run("link", env=env, code=1).stderr
    assert "running" in run("ls", env=env).stdout


def test_rotating_a_token_invalidates_one_time_links(served):
    first = run("start").stdout
    (link,) = run("link", "--expires", "10m", "--page", "/lab/tree/a.ipynb").stdout.splitlines()
    assert link.startswith(f"{served.url}/open/")
    assert json.loads(run("link", "--json").stdout)["expires_at"].endswith("Z")
    rotated = run("rotate-token").stdout
    assert rotated != first
    assert LINK.fullmatch(rotated)
    assert httpx.get(link).status_code == 410


def test_version_prints_the_versions_of_command_and_keeper(served):
    """Without a keeper the first is still printed."""
    ours, theirs = run("version").stdout.splitlines()
    assert (ours, theirs) == (run("--version").stdout.strip(), f"keeper at {served.url}: 1.2.3")
    data = json.loads(run("version", "--json").stdout)
    assert (data["version"], data["url"]) == ("1.2.3", served.url)
    assert run("version", "--url", "http://127.0.0.1:1", code=3).stdout.strip() == ours


# Finding the keeper


def test_the_url_overrides_the_state_directory(served, state_dir, monkeypatch):
    """The order is `--url`, LABKEEPER_URL, the state directory."""
    assert served.url in run("version").stdout
    monkeypatch.setenv("LABKEEPER_URL", "http://127.0.0.1:1")
    run("version", code=3)
    assert served.url in run("version", "--url", served.url).stdout
    assert served.url in run("--url", served.url, "version").stdout


@pytest.fixture
def squatter(monkeypatch):
    """Another program on the port of the settings: its URL, and what it has received."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sent = []
        monkeypatch.setenv("LABKEEPER_PORT", str(listener.getsockname()[1]))
        taking = threading.Thread(target=record, args=(listener, sent))
        taking.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", sent
        listener.shutdown(socket.SHUT_RDWR)
        taking.join()


def record(listener, sent):
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listener.accept()
            with connection:
                sent.append(connection.recv(65536).decode())


def ended_pid():
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return process.pid


ANOTHER = "another-token-of-the-tests"


@pytest.mark.parametrize(
    "record",
    [None, {}, {"pid": "one"}, {"pid": 2**80}, {"pid": -5}, {"pid": True}, {"pid": "ended"}],
)
def test_without_a_running_keeper_nothing_is_sent(squatter, state_dir, monkeypatch, record):
    """Neither to the default port nor to a killed keeper's address, even with a token given."""
    url, sent = squatter
    (state_dir / "token").write_text(TOKEN + "\n")
    if record is not None:
        pid = {"pid": ended_pid()} if record == {"pid": "ended"} else record
        (state_dir / "keeper.json").write_text(json.dumps({"url": url} | pid))
    for _ in range(2):
        printed = run("ls", code=3).stderr
        assert (
            f"cannot find a keeper: none runs on the state directory {state_dir};"
            " `labkeeper serve` starts one" in printed
        )
        monkeypatch.setenv("LABKEEPER_TOKEN", ANOTHER)
    assert sent == []


@pytest.mark.root
def test_a_process_of_an_unrelated_user_is_not_a_keeper(squatter, state_dir):
    """Root and the owner of the address file are trusted, whoever calls."""
    url, sent = squatter
    (state_dir / "token").write_text(TOKEN + "\n")
    with subprocess.Popen(["sleep", "60"], user=65534) as other:
        (state_dir / "keeper.json").write_text(json.dumps({"url": url, "pid": other.pid}))
        run("ls", code=3)
        assert sent == []
        os.chown(state_dir / "keeper.json", 65534, 65534)
        run("ls", code=3)
        other.kill()
    assert TOKEN in sent[0]


def test_the_generated_token_is_sent_only_to_the_keeper_that_created_it(served, squatter):
    """Another URL gets none, even on this machine; a token from the environment is always sent."""
    url, sent = squatter
    for name in (url, url.replace("127.0.0.1", "localhost")):
        run("ls", "--url", name, code=3)
    assert [bool(text) for text in sent] == [True, True]
    assert "authorization" not in "".join(sent).lower()
    run("ls", "--url", url, code=3, env={"LABKEEPER_TOKEN": ANOTHER})
    assert f"Bearer {ANOTHER}" in sent[-1]
    assert "STATE" in run("ls", "--url", served.url + "/").stdout


# Errors


@pytest.mark.parametrize("command", ASKING)
def test_without_a_keeper_every_command_exits_with_3(command):
    """The message has the URL and says how to start a keeper."""
    result = run(command, "--url", "http://127.0.0.1:1", code=3)
    assert re.fullmatch(
        r"labkeeper: cannot reach a keeper at http://127\.0\.0\.1:1: .*`labkeeper serve`\n",
        result.stderr,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'; see labkeeper --help"),
        (["ls", "--colour"], "No such option"),
        (["start", "--port", "0"], "'--port'"),
        (["start", "--env", "A"], "'A' is not KEY=VALUE"),
        (["start", "--json-spec", "-"], "not JSON"),
        (["start", "--json-spec", "/nowhere/spec"], "'/nowhere/spec'"),
        (["ls", "--state", "asleep"], "'asleep' is not one of"),
        (["ls", "--url", "keeper:80"], "cannot use 'keeper:80' as the URL"),
        (["serve", "--log-level", "loud"], "'loud' is not one of"),
        (["serve", "--max-servers", "0"], "bad setting LABKEEPER_MAX_SERVERS"),
    ],
)
def test_wrong_usage_is_one_line_and_exits_with_2(arguments, message):
    result = run(*arguments, code=2)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_a_json_spec_must_be_an_object():
    assert "not a JSON object" in run("start", "--json-spec", "-", input="[]", code=2).stderr


def test_a_wrong_setting_exits_with_2(monkeypatch):
    """For every command, with a one-line message."""
    monkeypatch.setenv("LABKEEPER_PORT", "x")
    assert "LABKEEPER_PORT" in run("ls", code=2).stderr


def test_a_refusal_of_the_keeper_exits_with_1(served, monkeypatch):
    """The message is the keeper's own."""
    assert "base_url" in run("start", "--base-url", "nope", code=1).stderr
    monkeypatch.setenv("LABKEEPER_TOKEN", "another-token-of-the-tests")
    assert "the token is unknown" in run("ls", code=1).stderr


def test_a_bug_in_the_keeper_is_reported_with_its_request_id(served):
    """The keeper's log has the traceback under this id."""
    served.app.view_functions["version"] = lambda **_: 1 / 0
    assert re.search(r"^  request id: [0-9a-f]{32}$", run("version", code=1).stderr, re.MULTILINE)


def test_an_invalid_name_is_not_found():
    """No request is sent."""
    assert "must be 1 to 63" in run("show", "../x", "--url", "http://127.0.0.1:1", code=4).stderr


def test_errors_at_a_terminal_are_coloured():
    assert at_terminal("--url", "ftp://x", "ls", code=2).startswith(
        "\x1b[31m\x1b[1mlabkeeper:\x1b[0m cannot use"
    )


def test_a_full_disk_is_a_one_line_error():
    with Path("/dev/full").open("w") as full, process("--version", stdout=full) as asking:
        _, err = asking.communicate(timeout=30)
    assert (asking.returncode, err.count("\n")) == (1, 1)
    assert "No space left" in err


# Waiting


def test_a_spinner_is_shown_while_waiting_at_a_terminal(monkeypatch):
    """It counts seconds, and erases itself."""
    monkeypatch.setenv("TERM", "xterm-256color")
    primary, secondary = os.openpty()
    shown = ""
    try:
        with os.fdopen(secondary, "w") as terminal, contextlib.redirect_stderr(terminal):
            with output.waiting("starting 'x'", after=0.0):
                while "starting 'x' 1 s" not in shown:
                    shown += os.read(primary, 4096).decode()
            while not shown.endswith("\x1b[2K"):
                shown += os.read(primary, 4096).decode()
    finally:
        os.close(primary)
    assert "starting 'x' 0 s" in shown


def test_a_quick_command_shows_no_spinner(served):
    run("start")
    assert LINK.fullmatch(at_terminal("open", "--print"))


def test_an_unavailable_backend_is_reported_in_the_keepers_words(served):
    """A 503 is an error of the keeper, not a missing keeper."""
    served.app.view_functions["list_servers"] = lambda **_: (_ for _ in ()).throw(
        BackendUnavailable("cannot list: later")
    )
    assert run("ls", code=1).stderr == "labkeeper: cannot list: later\n"


# Startup


def test_importing_the_command_line_loads_no_heavy_modules():
    code = (
        "import sys, labkeeper.cli; print(sorted("
        "{'rich', 'httpx', 'flask', 'pydantic', 'labkeeper.serve'} & set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


def test_characters_outside_the_terminals_encoding_are_escaped(served):
    run("start")
    served.world.write("default", "ż")
    with process(
        "logs", "-n", "1", env={**os.environ, "PYTHONIOENCODING": "iso-8859-1"}
    ) as reading:
        out, _ = reading.communicate(timeout=30)
    assert (out, reading.returncode) == ("\\u017c\n", 0)


# Culling


def test_idle_explains_all_servers_or_one(served):
    run("start", "a", "--idle-timeout", "2h", "--max-age", "12h")
    run("start", "b")
    printed = run("idle").stdout.splitlines()
    assert printed[0].split() == ["NAME", "STATE", "STOPS", "AT", "RULE", "WHY"]
    assert [line.split()[0] for line in printed[1:]] == ["a", "b"]
    assert re.search(r"^stops at +\S+Z \(max_age\)$", run("idle", "a").stdout, re.MULTILINE)
    assert json.loads(run("idle", "b", "--json").stdout)["state"] == "off"
    assert [one["name"] for one in json.loads(run("idle", "--json").stdout)["servers"]] == [
        "a",
        "b",
    ]
    assert re.search(r"^idle timeout +2 h$", run("show", "a").stdout, re.MULTILINE)


def test_snooze_prints_the_time_until_which_it_applies(served):
    run("start", "a")
    assert re.fullmatch(r"a: snoozed until \S+Z\n", run("snooze", "a", "--for", "2h").stdout)
    assert "snoozed_until" in run("snooze", "a", "--for", "1h", "--json").stdout
    assert run("snooze", "a", "--for", "0").stdout == "a: not snoozed\n"


def test_idle_without_servers_suggests_the_next_step_at_a_terminal(served):
    assert "no servers; `labkeeper start` starts one" in at_terminal("idle")
