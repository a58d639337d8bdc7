"""Shell completion: click's protocol for each shell, and a real bash."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import structlog

from fake_keeper import TOKEN, fake_keeper, listening, serving
from harness import until
from labkeeper.api.app import create_app
from labkeeper.api.wsgi import WsgiServer
from labkeeper.client import Client
from labkeeper.core.policy import Policy
from labkeeper.settings.location import certain_state_dir

SHELLS = ["bash", "zsh", "fish"]


@pytest.fixture
def served(tmp_path):
    """A keeper with two running servers and a stopped one, a token and no session."""
    with structlog.testing.capture_logs(), serving(tmp_path) as there:
        with Client(there.url, token=TOKEN) as client:
            for name in ("ada", "alf", "eve"):
                client.create(name=name)
            client.stop("eve")
            client.create_token("ci", "read")
        yield there


@pytest.fixture
def env(tmp_path):
    """An environment that names no keeper but a missing one of the test's state directory."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LABKEEPER_")}
    return clean | {"LABKEEPER_STATE_DIR": str(tmp_path / "state")}


@pytest.fixture
def of_served(env, served):
    return env | {"LABKEEPER_URL": served.url, "LABKEEPER_TOKEN": TOKEN}


def complete(line, env, shell="bash"):
    """Return the completions of the last word of a command line, as the shell's script asks."""
    words = line.split(" ")
    position = words[-1] if shell == "fish" else str(len(words) - 1)
    asked = {
        "COMP_WORDS": line,
        "COMP_CWORD": position,
        "_LABKEEPER_COMPLETE": f"{shell}_complete",
    }
    done = subprocess.run(
        [sys.executable, "-m", "labkeeper"],
        env=env | asked,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    if shell == "zsh":
        return [value for kind, value in zip(lines[::3], lines[1::3], strict=True) if kind]
    return [text.partition(",")[2].partition("\t")[0] for text in lines if text]


def completes(line, env, names, shell="bash"):
    """Check the completions; on a busy machine, the keeper may answer too late at first."""
    until(lambda: complete(line, env, shell) == names, what=f"{line!r} to complete {names}")


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_completes_commands_and_names(of_served, shell):
    assert complete("labkeeper comp", of_served, shell) == ["completion"]
    completes("labkeeper show a", of_served, ["ada", "alf"], shell)


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("labkeeper show ", ["ada", "alf", "eve"]),
        ("labkeeper logs -f ", ["ada", "alf", "eve"]),
        ("labkeeper events e", ["eve"]),
        ("labkeeper stop ", ["ada", "alf"]),
        ("labkeeper stop alf ", ["ada"]),
        ("labkeeper stop --delete ", ["ada", "alf", "eve"]),
        ("labkeeper start ", ["eve"]),
        ("labkeeper restart ", ["ada", "alf", "eve"]),
        ("labkeeper open ", ["ada", "alf"]),
        ("labkeeper link ", ["ada", "alf"]),
        ("labkeeper rotate-token ", ["ada", "alf"]),
        ("labkeeper snooze ", ["ada", "alf"]),
        ("labkeeper idle ", ["ada", "alf"]),
        ("labkeeper token revoke ", ["ci"]),
        ("labkeeper session revoke ", []),
        ("labkeeper ls --state f", ["failed"]),
        ("labkeeper top --sort m", ["memory"]),
        ("labkeeper completion ", SHELLS),
        ("labkeeper serve --lab-po", ["--lab-port"]),
    ],
)
def test_names_are_those_for_which_the_command_makes_sense(of_served, line, names):
    completes(line, of_served, names)


def test_the_url_may_be_on_the_command_line(env, served):
    line = f"labkeeper show --url {served.url} a"
    completes(line, env | {"LABKEEPER_TOKEN": TOKEN}, ["ada", "alf"])
    assert complete(line, env) == []


def test_the_unix_socket_of_the_state_directory_is_asked(tmp_path, env):
    """The token of the state directory is sent if the keeper asks for one; all pages are read."""
    state_dir = tmp_path / "state"
    state_dir.mkdir()
    path = os.path.relpath(state_dir / "keeper.sock")
    with (
        structlog.testing.capture_logs(),
        fake_keeper(tmp_path, policy=Policy(max_servers=300)) as made,
        socket.socket(socket.AF_UNIX) as door,
    ):
        door.bind(path)
        app = create_app(made.services)
        server = WsgiServer(app, [door], threads=4, max_body=2**20)
        server.start()
        names = [f"s{number:03}" for number in range(250)]
        with listening(app) as url, Client(url, token=TOKEN) as client:
            client.start_many(names[:200])
            client.start_many(names[200:])
        told = {"url": "http://127.0.0.1:1", "pid": os.getpid(), "socket": path}
        (state_dir / "keeper.json").write_text(json.dumps(told))
        before = complete("labkeeper show s00", env)
        (state_dir / "token").write_text(TOKEN + "\n")
        # The first page ends before these.
        completes("labkeeper show s24", env, names[240:])
        server.close()
    assert before == []
    assert complete("labkeeper show ", env) == []


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1", "https://127.0.0.1:1", "keeper:80", "http://127.0.0.1:x", "x"]
)
def test_without_a_keeper_there_are_no_names_and_no_errors(env, url):
    env |= {"LABKEEPER_TOKEN": TOKEN}
    assert complete("labkeeper show ", env) == []
    assert complete("labkeeper show ", env | {"LABKEEPER_PORT": "x"}) == []
    assert complete("labkeeper show ", env | {"LABKEEPER_URL": url}) == []


def test_a_certificate_authority_is_trusted_as_by_other_commands(env, tmp_path):
    """One that cannot be read is no error."""
    named = {"LABKEEPER_URL": "https://127.0.0.1:1", "LABKEEPER_CA_FILE": str(tmp_path / "none")}
    assert complete("labkeeper show ", env | named) == []


@pytest.fixture
def odd_keeper():
    """Serve answers that the test chooses, one to each connection."""
    answers = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    if answers:
                        connection.sendall(answers[0])
                    else:
                        connection.recv(65536)

        serving = threading.Thread(target=serve)
        serving.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", answers
        listener.shutdown(socket.SHUT_RDWR)
        serving.join()


def test_a_keeper_that_does_not_answer_is_not_waited_for(odd_keeper, env):
    url, _ = odd_keeper
    assert complete("labkeeper show ", env | {"LABKEEPER_URL": url}) == []


@pytest.mark.parametrize(
    "body",
    [
        b"not JSON",
        b"[]",
        b'{"servers": 1}',
        b'{"servers": ["a", 1, null, {}, {"name": 5}, {"name": "$(id)"}, {"name": "a\\n,b"}]}',
    ],
)
def test_odd_answers_complete_nothing(odd_keeper, env, body):
    """Shells would obey such names."""
    url, answers = odd_keeper
    answers.append(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    assert complete("labkeeper show ", env | {"LABKEEPER_URL": url}) == []


def test_settings_are_loaded_only_if_they_may_matter(monkeypatch, tmp_path):
    """Loading them takes longer than everything else."""
    for name in [name for name in os.environ if name.startswith("LABKEEPER_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert certain_state_dir(None) == tmp_path / "labkeeper"
    monkeypatch.setenv("LABKEEPER_STATE_DIR", "~/x")
    assert certain_state_dir(None) == Path.home() / "x"
    assert certain_state_dir("/named") == Path("/named")
    for name in ("URL", "CONFIG", "TOKEN", "TOKEN_FILE"):
        with monkeypatch.context() as changed:
            changed.setenv(f"LABKEEPER_{name}", "x")
            assert certain_state_dir("/named") is None


def test_completion_of_names_loads_neither_models_nor_httpx(env):
    code = (
        "import sys, contextlib\n"
        "from labkeeper.cli import main\n"
        "with contextlib.suppress(SystemExit): main()\n"
        "print(sorted({'pydantic', 'httpx', 'rich', 'psutil'} & set(sys.modules)))"
    )
    asked = {
        "COMP_WORDS": "labkeeper show ",
        "COMP_CWORD": "2",
        "_LABKEEPER_COMPLETE": "bash_complete",
    }
    state_dir = Path(env["LABKEEPER_STATE_DIR"])
    state_dir.mkdir()
    with socket.socket(socket.AF_UNIX) as door:
        path = os.path.relpath(state_dir / "keeper.sock")
        door.bind(path)
        (state_dir / "keeper.json").write_text(json.dumps({"url": "http://x", "socket": path}))
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=env | asked,
            capture_output=True,
            text=True,
            check=True,
        )
    assert done.stdout.splitlines()[-1] == "[]"


# Scripts


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_that_of_click(env, shell):
    done = subprocess.run(
        [sys.executable, "-m", "labkeeper", "completion", shell],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"_LABKEEPER_COMPLETE={shell}_complete" in done.stdout
    assert done.stderr == ""


def test_bash_completes_names(of_served, tmp_path):
    """As its user sees it: the script is read, and then a line completed."""
    bash = shutil.which("bash")
    (tmp_path / "labkeeper").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m labkeeper "$@"\n')
    (tmp_path / "labkeeper").chmod(0o755)
    script = (
        'eval "$(labkeeper completion bash)"\n'
        "COMP_WORDS=(labkeeper stop al) COMP_CWORD=2\n"
        "_labkeeper_completion labkeeper al stop\n"
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
        "complete -p labkeeper\n"
    )

    def printed():
        done = subprocess.run(
            [bash, "--norc", "-c", script],
            env=of_served | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        return done.stdout.splitlines()

    registered = "complete -o nosort -F _labkeeper_completion labkeeper"
    until(lambda: printed() == ["alf", registered], what="bash to complete the name")
