"""A pytest plugin by which other projects' test suites use a running server.

It replaces the fixtures that start a server in `pytest_jupyter` and in the suites' own
`conftest.py`, and selects the tests for which that is enough. Tests that configure or patch their
server, and tests that their authors marked as flaky, are deselected; a test that reaches into its
server's process is skipped when it does so. `SUITE_SERVER` is a JSON object with the server's URL,
token, root directory and data directory; these tests alone use that server.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlencode, urlsplit

import httpx
import pytest
from tornado.escape import url_escape
from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from tornado.websocket import websocket_connect

TIMEOUT = 60.0
"""Seconds for one response."""
GIVEN = SimpleNamespace(**json.loads(os.environ["SUITE_SERVER"]))
FROM_OUTSIDE = {"jp_fetch", "jp_ws_fetch", "jupyter_server"}
"""Fixtures by which tests talk to a server."""
FROM_INSIDE = {"jp_configurable_serverapp", "jp_server_config", "jp_argv", "monkeypatch"}
"""Fixtures of tests that configure or patch it."""


class Reachable:
    """Known attributes of an object in the server's process; any other one skips the test."""

    def __init__(self, **known):
        self.__dict__.update(known)

    def __getattr__(self, name):
        pytest.skip(f"reads .{name} in the server's process")

    def __setattr__(self, name, value):
        pytest.skip(f"sets .{name} in the server's process")


# Selection


def pytest_collection_modifyitems(items):
    items[:] = [
        item
        for item in items
        if _speaks_from_outside(item) and not item.get_closest_marker("flaky")
    ]
    for item in items:
        # Their own timeouts assume an otherwise idle machine.
        item.add_marker(pytest.mark.timeout(TIMEOUT), append=False)


def _speaks_from_outside(item):
    needed = set(item.fixturenames)
    offered = set(item._fixtureinfo.name2fixturedefs) | {"request"}
    return bool(needed & FROM_OUTSIDE) and not needed & FROM_INSIDE and needed <= offered


def pytest_configure(config):
    for marker in ("asyncio", "flaky"):
        config.addinivalue_line(
            "markers", f"{marker}: from a plugin that the suites use and we do not"
        )


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run tests that are coroutines."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    wanted = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    asyncio.run(pyfuncitem.obj(**wanted))
    return True


# jupyter_server's tests expect a server that has just been started


@pytest.fixture
def _fresh_server():
    # The rest of its data directory stays: the server has a database of signatures open there.
    shutil.rmtree(Path(GIVEN.data_dir) / "kernels", ignore_errors=True)
    for path in Path(GIVEN.root_dir).iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    yield
    with httpx.Client(headers=_known(), timeout=TIMEOUT, trust_env=False) as http:
        for kind, key in (("sessions", "id"), ("kernels", "id"), ("terminals", "name")):
            for each in http.get(f"{GIVEN.url}api/{kind}").raise_for_status().json():
                http.delete(f"{GIVEN.url}api/{kind}/{each[key]}")


def _known():
    return {"Authorization": f"token {GIVEN.token}"}


# The fixtures of pytest_jupyter and jupyter_server


@pytest.fixture
def jp_root_dir(_fresh_server):
    return Path(GIVEN.root_dir)


@pytest.fixture
def jp_data_dir(_fresh_server):
    return Path(GIVEN.data_dir)


@pytest.fixture
def jp_base_url():
    return urlsplit(GIVEN.url).path


@pytest.fixture
def jp_http_port():
    return urlsplit(GIVEN.url).port


@pytest.fixture
def jp_auth_header():
    return _known()


@pytest.fixture
def jp_serverapp(jp_base_url):
    kernels = Reachable(use_pending_kernels=False)
    return Reachable(root_dir=GIVEN.root_dir, base_url=jp_base_url, kernel_manager=kernels)


@pytest.fixture
def jp_fetch(_fresh_server):
    def fetch(*parts, headers=None, params=None, **options):
        options = {"request_timeout": TIMEOUT} | options
        return AsyncHTTPClient().fetch(
            _url(parts, params), headers=_known() | (headers or {}), **options
        )

    return fetch


@pytest.fixture
def jp_ws_fetch(_fresh_server):
    def fetch(*parts, headers=None, params=None, **options):
        url = _url(parts, params).replace("http", "ws", 1)
        allowed = inspect.signature(websocket_connect).parameters
        request = HTTPRequest(url, headers=_known() | (headers or {}), connect_timeout=TIMEOUT)
        return websocket_connect(
            request, **{name: value for name, value in options.items() if name in allowed}
        )

    return fetch


def _url(parts, params):
    path = url_escape("/".join(part.strip("/") for part in parts if part), plus=False)
    return f"{GIVEN.url}{path}?{urlencode(params or {})}"


@pytest.fixture
def jp_kernelspecs(jp_data_dir):
    for name, program in (("sample", "cat"), ("sample2", "cat"), ("bad", "non_existent_path")):
        place = jp_data_dir / "kernels" / name
        place.mkdir(parents=True)
        (place / "kernel.json").write_text(
            json.dumps({"argv": [program, "{connection_file}"], "display_name": "Test kernel"})
        )
        (place / "resource.txt").write_text("The very model of a modern major general")


@pytest.fixture
def contents_dir(jp_root_dir):
    return jp_root_dir


if Path("tests/conftest.py").exists():
    from tests.conftest import contents, folders  # noqa: F401 - fixtures of the suite


# The fixture of jupyter_kernel_client


@pytest.fixture
def jupyter_server():
    return str(urlsplit(GIVEN.url).port), GIVEN.token
