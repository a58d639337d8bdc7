"""Each patch of Jupyter is still needed: without it, the installed version has the problem.

If a test fails because plain Jupyter behaves correctly, remove the patch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from labkeeper.forkserver import patches

LOOK = """
import json, socket, sys
from jupyter_client.connect import LocalPortCache
from jupyter_server.serverapp import ServerApp
from labkeeper.forkserver import patches
from tornado.httpclient import AsyncHTTPClient
from traitlets.config import Config

TOKEN = "a-token-that-is-told-to-nobody"
config = Config({"IdentityProvider": {"token": TOKEN}})
config.ServerApp.update({"allow_root": True, "open_browser": False, "no_browser_open_file": True})
config.ServerApp.update({"ip": "127.0.0.1", "port": 0})
for patch in sys.argv[1:]:
    getattr(patches, patch)()
app = ServerApp.instance(config=config)
app.initialize(argv=[], find_extensions=False)

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

async def look():
    page = await ask("nowhere")
    assert (page.code, "<html" in page.body.decode()) == (404, True), page.body
    port = LocalPortCache.instance().find_available_port("127.0.0.1")
    seen = {
        "reading counts": await counts("api/kernelspecs"),
        "changes count": await counts("api/contents", method="POST", body="{}"),
        "a page has the token": TOKEN in page.body.decode(),
        "a kernel's port is free": is_free(port),
    }
    print(json.dumps(seen), flush=True)
    app.stop()

app.io_loop.add_callback(app.io_loop.add_callback, look)
app.start()
"""


@pytest.fixture(scope="module")
def see(tmp_path_factory):
    """Run the installed Jupyter server with some patches, and return what was observed."""

    def see(*chosen):
        place = tmp_path_factory.mktemp("jupyter")
        env = {name: value for name, value in os.environ.items() if not name.startswith("JUPYTER")}
        env |= {
            "HOME": str(place),
            "JUPYTER_CONFIG_DIR": str(place),
            "JUPYTER_RUNTIME_DIR": str(place),
        }
        command = [sys.executable, "-c", LOOK, *(patch.__name__ for patch in chosen)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=env, cwd=place
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

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
