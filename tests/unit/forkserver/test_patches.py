"""Each patch of Jupyter is still needed: without it, the installed version has the problem.

If a test fails because plain Jupyter behaves correctly, remove the patch.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from tornado.httputil import HTTPServerRequest, RequestStartLine
from tornado.routing import PathMatches

from labkeeper.forkserver import patches

LOOK = """
import argparse, json, socket, sys
import jupyter_lsp
from jupyter_server import _sysinfo
from jupyter_client.connect import LocalPortCache
from jupyter_server.serverapp import ServerApp
from jupyterlab_server import LabServerApp
from labkeeper.forkserver import patches
from tornado.httpclient import AsyncHTTPClient
from traitlets.config import Config

TOKEN = "a-token-that-is-told-to-nobody"
config = Config({"IdentityProvider": {"token": TOKEN}})
config.ServerApp.update({"allow_root": True, "open_browser": False, "no_browser_open_file": True})
config.ServerApp.update({"ip": "127.0.0.1", "port": 0})
for patch in sys.argv[1:]:
    getattr(patches, patch)()

def counting(function):
    def counted(*given, **named):
        calls.append(function)
        return function(*given, **named)
    calls = []
    return counted, calls

_sysinfo.pkg_info, descriptions = counting(_sysinfo.pkg_info)
app = ServerApp.instance(config=config)
app.initialize(argv=[], find_extensions=False)
app.io_loop.run_in_executor, searches = counting(app.io_loop.run_in_executor)
argparse.ArgumentParser.parse_known_args, parsers = counting(
    argparse.ArgumentParser.parse_known_args)
LabServerApp()._link_jupyter_server_extension(app)
jupyter_lsp.load_jupyter_server_extension(app)
language_servers = app.language_server_manager

async def ask(path, **how):
    (listener,) = app.http_server._sockets.values()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/{path}"
    headers = {"Authorization": f"token {TOKEN}"}
    return await AsyncHTTPClient().fetch(url, headers=headers, raise_error=False, **how)

async def counts(path, **how):
    app.web_app.settings.pop("api_last_activity", None)
    answer = await ask(path, **how)
    assert answer.code < 400, (path, answer.code)
    return "api_last_activity" in app.web_app.settings

def is_free(port):
    with socket.socket() as other:
        try:
            other.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True

async def search_language_servers():
    # The loop has answered requests meanwhile, so a search of the start has begun before.
    at_start = len(searches)
    await language_servers.ready()
    await language_servers.ready()
    return at_start, len(searches)

async def look():
    page = await ask("nowhere")
    assert (page.code, "<html" in page.body.decode()) == (404, True), page.body
    port = LocalPortCache.instance().find_available_port("127.0.0.1")
    seen = {
        "reading counts": await counts("api/kernelspecs"),
        "changes count": await counts("api/contents", method="POST", body="{}"),
        "a page has the token": TOKEN in page.body.decode(),
        "a kernel's port is free": is_free(port),
        "descriptions of the system": len(descriptions),
        "a command line is parsed": bool(parsers),
        "searches for language servers": await search_language_servers(),
        "a second server searches": list(map(str, type(language_servers)().node_roots)),
    }
    print(json.dumps(seen), flush=True)
    app.stop()

app.io_loop.add_callback(app.io_loop.add_callback, look)
app.start()
"""


NPM_PREFIX = "/opt/of-npm"
NPM = f"""#!/bin/sh
echo asked >> "$HOME/npm.log"
echo {NPM_PREFIX}
"""


def install_npm(directory):
    directory.mkdir()
    for name, source in (("npm-cli.js", NPM), ("node", "#!/bin/sh\n")):
        (directory / name).write_text(source)
        (directory / name).chmod(0o755)
    (directory / "npm").symlink_to("npm-cli.js")


@pytest.fixture(scope="module")
def see(tmp_path_factory):
    """Run the installed Jupyter server with some patches, and return what was observed."""

    def see(*chosen):
        place = tmp_path_factory.mktemp("jupyter")
        install_npm(place / "bin")
        env = {
            name: value
            for name, value in os.environ.items()
            if not name.lower().startswith(("jupyter", "npm_config_"))
        }
        env |= {
            "PATH": f"{place / 'bin'}:{env['PATH']}",
            "HOME": str(place),
            "JUPYTER_CONFIG_DIR": str(place),
            "JUPYTER_RUNTIME_DIR": str(place),
        }
        command = [sys.executable, "-c", LOOK, *(patch.__name__ for patch in chosen)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=env, cwd=place
        )
        assert done.returncode == 0, done.stderr
        asked = (place / "npm.log").read_text().splitlines()
        return {**json.loads(done.stdout), "npm was asked": len(asked)}

    return see


@pytest.fixture(scope="module")
def plain(see):
    return see()


def test_without_its_patch_reading_counts_as_activity(see, plain):
    patched = see(patches.count_no_reading)
    assert (plain["reading counts"], patched["reading counts"]) == (True, False)
    assert (plain["changes count"], patched["changes count"]) == (True, True)


def test_without_its_patch_a_page_contains_the_token(see, plain):
    patched = see(patches.tell_no_page_the_token)
    assert (plain["a page has the token"], patched["a page has the token"]) == (True, False)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_without_its_patch_a_kernels_port_can_be_taken_by_another_program(see, plain):
    patched = see(patches.hold_ports)
    assert (plain["a kernel's port is free"], patched["a kernel's port is free"]) == (True, False)


def test_without_its_patch_each_start_describes_the_system(see, plain):
    what = "descriptions of the system"
    patched = see(patches.describe_the_system_once)
    # For the settings and for the page; with the patch, both before the start.
    assert (plain[what], patched[what]) == (2, 0)


def test_without_its_patch_each_extension_parses_a_command_line(see, plain):
    what = "a command line is parsed"
    patched = see(patches.parse_no_command_lines)
    assert (plain[what], patched[what]) == (True, False)


def test_without_its_patch_each_start_searches_for_language_servers(see, plain):
    what = "searches for language servers"
    patched = see(patches.search_language_servers_when_asked)
    assert (plain[what], patched[what]) == ([1, 1], [0, 1])


def test_without_its_patch_each_server_asks_npm(see, plain):
    patched = see(patches.ask_npm_once)
    assert (plain["npm was asked"], patched["npm was asked"]) == (2, 1)
    for seen in (plain, patched):
        assert NPM_PREFIX in seen["a second server searches"]


HIDDEN = """
import json, os, pathlib, sys
import colorsys  # stands for a preloaded library
from ipykernel.kernelapp import IPKernelApp
from labkeeper.forkserver import patches

app = IPKernelApp.instance()
app.initialize(["-f", sys.argv[1]])
hidden = app.kernel.debugger.kernel_modules
before = colorsys.__file__ in hidden
patches.debug_libraries(app.kernel, {colorsys.__file__})
told = json.dumps([before, colorsys.__file__ in hidden])
pathlib.Path(sys.argv[2]).write_text(told)
os._exit(0)
"""


def test_without_its_patch_the_debugger_hides_libraries_that_were_loaded_before_the_kernel(
    tmp_path,
):
    told = tmp_path / "told"
    subprocess.run(
        [sys.executable, "-c", HIDDEN, tmp_path / "kernel.json", told],
        env={**os.environ, "IPYTHONDIR": str(tmp_path)},
        capture_output=True,
        check=True,
    )
    assert json.loads(told.read_text()) == [True, False]


BASE = "/servers/lab/"
ROUTES = [
    BASE + "lab",
    BASE + r"api/contents(/.*|/?)",
    BASE + r"api/kernels/(?P<kernel_id>\w+-\w+)/channels$",
    BASE + "(a|b)/c?",
    # These are not below it, or not only.
    BASE + "x|/y",
    BASE + "(x)|/y",
    "/y|" + BASE + "x",
    "/servers/labour",
    ".*",
]
PATHS = [
    *(BASE + path for path in ("", "lab", "lab/", "x", "a/", "b/c", "a/cc", "y", "api/contents")),
    *(BASE + path for path in ("api/contents/x/y", "api/kernels/1-2/channels", "servers/lab/lab")),
    *("/", "/x", "/y", "/lab", "/servers/lab", "/servers/labour", "/servers/other/lab"),
]


def compiled(monkeypatch):
    """Return the routes, and the patterns that were compiled for them."""
    given, compile_ = [], re.compile
    with monkeypatch.context() as counting:
        counting.setattr(
            re, "compile", lambda *pattern: (given.append(pattern), compile_(*pattern))[1]
        )
        return [PathMatches(route) for route in ROUTES], [pattern for pattern, *_ in given]


def test_without_its_patch_each_route_below_a_base_url_is_compiled(monkeypatch):
    monkeypatch.setattr(PathMatches, "__init__", PathMatches.__init__)
    plain, patterns = compiled(monkeypatch)
    assert sum(pattern.startswith(BASE) for pattern in patterns) == 6
    patches.compile_routes_without(BASE)
    patched, patterns = compiled(monkeypatch)
    # Only those that cannot be without it.
    assert sum(pattern.startswith(BASE) for pattern in patterns) == 2
    requests = [
        HTTPServerRequest(start_line=RequestStartLine("GET", path, "HTTP/1.0")) for path in PATHS
    ]
    for before, after in zip(plain, patched, strict=True):
        found = [before.match(request) for request in requests]
        assert [after.match(request) for request in requests] == found != [None] * len(PATHS)
        assert (before._path, before._group_count) == (after._path, after._group_count)
