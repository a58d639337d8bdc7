"""The docs are complete: all public names are documented, all links resolve, the pages build."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click

from labkeeper.api import problems, routes
from labkeeper.cli import cli
from labkeeper.client import Client
from labkeeper.core import errors
from labkeeper.core.lifecycle import Event, Goal, State
from labkeeper.core.server import FailureClass
from labkeeper.schema import queries
from labkeeper.schema.answers.servers import Failure, Server, StopReport
from labkeeper.schema.requests.servers import ServerRequest
from labkeeper.settings.model import Settings

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *(page for page in sorted(DOCS.rglob("*.md")) if "_build" not in page.parts),
]


CODE = ROOT / "src" / "labkeeper"
EXPLAINED_BY_THEIR_PACKAGE = {str(path.relative_to(CODE)) for path in CODE.rglob("__init__.py")}


def page(name):
    return (ROOT / name).read_text()


def missing(names, text):
    """Return the names that the text does not contain as code."""
    return [name for name in names if f"`{name}`" not in text]


def test_every_setting_is_documented():
    assert not missing(
        [f"LABKEEPER_{name.upper()}" for name in Settings.model_fields],
        page("docs/reference/settings.md"),
    )


def test_every_variable_in_the_pages_exists():
    known = {f"LABKEEPER_{name.upper()}" for name in Settings.model_fields} | {
        "LABKEEPER_CONFIG",
        "LABKEEPER_URL",
        "LABKEEPER_CA_FILE",
        "LABKEEPER_SERVER",
    }
    found = {
        name
        for text in map(Path.read_text, PAGES)
        for name in re.findall(r"\bLABKEEPER_[A-Z_]*[A-Z]\b", text)
    }
    assert found <= known


def test_every_route_with_its_parameters_is_documented():
    text = page("docs/reference/api.md")
    paths = [
        (route.method, route.path.replace("<", "{").replace(">", "}")) for route in routes.ROUTES
    ]
    assert [pair for pair in paths if f"| `{pair[0]}` | `{pair[1]}` |" not in text] == []
    of_queries = (
        queries.StartQuery,
        queries.StopQuery,
        queries.GetQuery,
        queries.ListQuery,
        queries.LogQuery,
    )
    models = (
        ServerRequest,
        Server,
        Failure,
        StopReport,
        *of_queries,
    )
    assert not missing([name for model in models for name in model.model_fields], text)
    assert not missing(["/api/openapi.json", "/api/docs"], text)


def test_every_error_code_is_documented_with_its_status():
    text = page("docs/reference/errors.md")
    assert not missing(errors.tree(), text)
    assert [
        cls for cls, status in problems.STATUS.items() if f"| `{cls.code}` | {status} |" not in text
    ] == []


def test_every_failure_class_has_its_advice():
    headings = re.findall(r"^## (.+)$", page("docs/how-to/troubleshoot.md"), re.MULTILINE)
    assert set(FailureClass) <= set(headings)


def test_every_state_goal_and_event_is_documented():
    assert not missing([*State, *Goal, *Event], page("docs/reference/lifecycle.md"))


def options_of(command):
    """Return a command's options, which `start` creates on use; settings document `serve`'s."""
    made = command.get_params(click.Context(command)) if command.name == "start" else command.params
    return [option for option in made if "--help" not in option.opts]


def test_every_command_and_option_is_documented():
    text = page("docs/reference/cli.md")
    assert not missing([f"labkeeper {name}" for name in cli.commands], text)
    options = {
        flag
        for command in cli.commands.values()
        for option in options_of(command)
        for flag in option.opts
        if flag.startswith("-")
    }
    assert not missing(options, text)


def test_every_method_of_the_client_is_documented():
    text = page("docs/reference/client.md")
    assert [
        name
        for name in vars(Client)
        if not name.startswith("_") and name != "close" and f"`{name}(" not in text
    ] == []


def test_the_layout_in_contributing_lists_exactly_the_source_files():
    layout = (
        page("CONTRIBUTING.md").partition("```text\nsrc/labkeeper/\n")[2].partition("\ntests/\n")[0]
    )
    listed, above = set(), []
    for line in layout.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        above[depth - 1 :] = [name]
        if name.endswith(".py"):
            listed.add("".join(above))
    assert (
        listed
        == {str(path.relative_to(CODE)) for path in CODE.rglob("*.py")} - EXPLAINED_BY_THEIR_PACKAGE
    )


def test_source_files_named_in_explanations_exist():
    named = {
        name
        for explanation in (ROOT / "docs/explanation").glob("*.md")
        for name in re.findall(r"`([a-z_]+(?:/[a-z_]+)*\.py)`", explanation.read_text())
    }
    assert "core/fleet.py" in named
    assert [name for name in sorted(named) if not (CODE / name).is_file()] == []


def test_every_relative_link_resolves():
    broken = []
    for path in PAGES:
        text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
        links = [
            link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", link)
        ]
        broken += [(path.name, link) for link in links if not link_resolves(path, link)]
    assert broken == []


def link_resolves(page, link):
    target, _, anchor = link.partition("#")
    there = (page.parent / target).resolve() if target else page
    if not anchor:
        return there.exists()
    headings = re.findall(r"^#+ (.+)$", there.read_text(), re.MULTILINE)
    return anchor in {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings
    }


def test_every_page_is_in_a_table_of_contents():
    listed = set()
    for index in DOCS.rglob("index.md"):
        for tree in re.findall(
            r"^```\{toctree\}\n(.*?)^```", index.read_text(), re.DOTALL | re.MULTILINE
        ):
            listed |= {
                (index.parent / f"{entry}.md").resolve()
                for entry in tree.split("\n")
                if entry and not entry.startswith(":")
            }
    assert {page for page in PAGES if DOCS in page.parents} - {DOCS / "index.md"} == listed


def test_the_pages_build_without_warnings(tmp_path):
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "--fail-on-warning",
        "--quiet",
        "--doctree-dir",
        tmp_path / "trees",
        DOCS,
        tmp_path / "html",
    ]
    built = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "html" / "index.html").exists()
