"""The README's tour runs as printed on a real keeper; other examples are checked statically."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

from harness import PATIENCE, KeeperProcess, alive
from labkeeper.cli import cli
from labkeeper.client import Client
from labkeeper.settings.model import Settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in page.parts),
]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def examples(kind):
    """Return the fenced blocks of a language, by page and number."""
    found = {}
    for page in PAGES:
        blocks = [text for language, text in FENCE.findall(page.read_text()) if language == kind]
        found |= {
            f"{page.relative_to(ROOT)} {kind} {number}": text
            for number, text in enumerate(blocks, 1)
        }
    return found


def tour(name):
    """Return the lines of one tour in README.md."""
    _, _, rest = (ROOT / "README.md").read_text().partition(f"<!-- tour: {name} -->\n")
    return [line for line in FENCE.search(rest)[2].splitlines() if line]


@pytest.fixture
def keeper(tmp_path):
    keeper = KeeperProcess(tmp_path).start_to_fork()
    yield keeper
    keeper.close()


@pytest.fixture
def run(keeper):
    """Run lines in one shell on the keeper's machine, and return what each of them printed."""
    bin_dir = Path(sys.executable).parent
    env = keeper.environment | {
        "LABKEEPER_URL": keeper.url,
        "NO_PROXY": "*",
        "PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}",
    }

    def run(lines):
        script = "".join(f"{line}\nprintf '\\0'\n" for line in lines)
        done = subprocess.run(
            ["sh", "-eu"],
            input=script,
            env=env,
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE,
            check=False,
        )
        assert done.returncode == 0, (done.stdout, done.stderr)
        return done.stdout.split("\0")[:-1]

    return run


def has_curl():
    """Return whether curl supports `--json` (7.82 and later)."""
    if shutil.which("curl") is None:
        return False
    version = subprocess.run(
        ["curl", "--version"], capture_output=True, text=True, check=True
    ).stdout
    return tuple(map(int, version.split()[1].split(".")[:2])) >= (7, 82)


@pytest.mark.timeout(300)
@pytest.mark.skipif(not has_curl(), reason="the tour needs curl 7.82 or later")
def test_the_readme_tour_works_as_printed(keeper, run):
    nothing, default, demo, shown, log, deleted = run(tour("curl"))
    default, demo, shown, deleted = map(json.loads, (default, demo, shown, deleted))
    assert nothing == ""
    assert (default["name"], default["state"], default["gateway"]) == ("default", "running", None)
    assert default["port"] == keeper.lab_port
    assert default["lab_url"] == f"{keeper.url}/servers/default/lab"
    assert (demo["name"], demo["state"]) == ("demo", "running")
    # Its usage may have been measured in between.
    assert shown | {"usage": None} == demo | {"usage": None}
    assert len(log.splitlines()) == 5
    assert demo["token"] not in log
    assert (deleted["name"], deleted["state"], deleted["goal"]) == ("demo", "stopped", "absent")
    assert deleted["stop_report"]["seconds"] > 0
    assert not alive(demo["pid"])

    link, listed, log, ended = run(tour("cli"))
    assert link.startswith(f"{keeper.url}/open/")
    assert [line.split()[:2] for line in listed.splitlines()] == [
        ["NAME", "STATE"],
        ["default", "running"],
    ]
    assert len(log.splitlines()) == 5
    assert re.fullmatch(r"default: (shut down|ended by SIG\w+) in [\d.]+ s\n", ended)
    assert not alive(default["pid"])
    assert keeper.http.get("/api/servers").json()["servers"] == []


def test_shell_examples_parse():
    for where, text in examples("sh").items():
        checked = subprocess.run(
            ["sh", "-n"], input=text, capture_output=True, text=True, check=False
        )
        assert checked.returncode == 0, (where, checked.stderr)


def test_commands_in_shell_examples_parse(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spark.json").write_text("{}")
    understood = []
    for text in examples("sh").values():
        for line in re.findall(r"(?<![\w./-])labkeeper ([a-z][^|)#\n]*)", text):
            name, *arguments = shlex.split(line)
            understood.append(name)
            command = cli.commands[name]
            if isinstance(command, click.Group) and arguments:
                command = command.commands[arguments.pop(0)]
            with command.make_context(name, arguments):
                pass
    assert set(understood) == set(cli.commands)


def test_json_examples_parse():
    for text in examples("json").values():
        json.loads(text)


def test_settings_examples_have_only_known_settings():
    for where, text in examples("toml").items():
        assert tomllib.loads(text).keys() <= Settings.model_fields.keys(), where


def test_python_examples_import_and_call_existing_names():
    for where, text in examples("python").items():
        compile(text, where, "exec")
        exec("\n".join(re.findall(r"^from labkeeper.*|^import .*", text, re.MULTILINE)), {})
        assert all(hasattr(Client, name) for name in re.findall(r"\bkeeper\.(\w+)", text)), where
