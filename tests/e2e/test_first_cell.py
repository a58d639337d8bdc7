"""Between a request and its first result nothing waits, and nothing is executed twice."""

from __future__ import annotations

import sys

import httpx
import pytest

from harness import (
    PATIENCE,
    KeeperProcess,
    execute,
    forked,
    give_hands,
    kernel_websocket,
    run_in_server,
    start_kernel,
)

NPM_PREFIX = "/opt/of-npm"
PROGRAM = f"""#!/bin/sh
echo "$(basename "$0") $PPID" >> @log@
echo {NPM_PREFIX}
"""
SEARCHED_FOR = ["Rscript", "julia"]
"""Programs that jupyter_lsp executes to find language servers of their languages."""


class Programs:
    """Programs that JupyterLab may execute; each records who does."""

    def __init__(self, directory):
        self.directory = directory
        self._log = directory / "log"
        directory.mkdir()
        for name in ("git", "node", "npm-cli.js", "uname", *SEARCHED_FOR):
            program = directory / name
            program.write_text(PROGRAM.replace("@log@", str(self._log)))
            program.chmod(0o755)
        (directory / "npm").symlink_to("npm-cli.js")

    def executed_by(self, server):
        calls = [line.split() for line in self._log.read_text().splitlines()]
        return sorted(name for name, parent in calls if int(parent) == server["pid"])


def start_with_programs(keeper):
    """Start a keeper whose servers find programs that record their calls; return both."""
    programs = Programs(keeper.base / "programs")
    give_hands(keeper)
    path = keeper.environment["PATH"]
    keeper.variables["PATH"] = f"{programs.directory}:{path}"
    return keeper.start(), programs


@pytest.fixture(scope="module")
def _started(tmp_path_factory):
    keeper = KeeperProcess(tmp_path_factory.mktemp("first-cell") / "keeper", launch_by="fork")
    try:
        yield start_with_programs(keeper)
    finally:
        keeper.close()


@pytest.fixture
def keeper(_started):
    keeper, _ = _started
    yield keeper
    delete_servers(keeper)


@pytest.fixture
def programs(_started):
    return _started[1]


def delete_servers(keeper):
    for server in keeper.http.get("/api/servers").json()["servers"]:
        assert keeper.delete(server["name"], force="true").status_code == 200


def start(keeper, launched_by):
    if launched_by == "fork":
        return forked(keeper)
    server = keeper.post(env={"LC_LABKEEPER": "1"}).json()
    assert server["launched_by"] == "exec"
    return server


def language_servers(server):
    headers = {"Authorization": f"token {server['token']}"}
    answer = httpx.get(
        f"{server['url']}lsp/status", headers=headers, timeout=PATIENCE, trust_env=False
    )
    answer.raise_for_status()
    return answer.json()


LAUNCHES = [
    pytest.param(
        "fork", marks=pytest.mark.skipif(sys.platform != "linux", reason="forking needs Linux")
    ),
    "exec",
]


@pytest.mark.parametrize("launched_by", LAUNCHES)
def test_language_servers_are_searched_for_when_a_browser_asks(keeper, programs, launched_by):
    server = start(keeper, launched_by)
    with kernel_websocket(server, start_kernel(server)) as socket_:
        assert execute(socket_, "6 * 7") == "42"
    at_start = programs.executed_by(server)
    assert not {"npm", *SEARCHED_FOR} & set(at_start)
    found = language_servers(server)
    assert "r-languageserver" in found["sessions"]
    asked_now = sorted([*at_start, *SEARCHED_FOR, *(["npm"] if launched_by == "exec" else [])])
    assert programs.executed_by(server) == asked_now
    assert language_servers(server) == found
    assert programs.executed_by(server) == asked_now


@pytest.mark.skipif(sys.platform != "linux", reason="forking needs Linux")
def test_start_by_fork_executes_no_program(keeper, programs):
    server = forked(keeper)
    with kernel_websocket(server, start_kernel(server)) as socket_:
        assert execute(socket_, "6 * 7") == "42"
    assert programs.executed_by(server) == []


@pytest.mark.skipif(sys.platform != "linux", reason="forking needs Linux")
def test_forked_and_executed_servers_find_the_same_language_servers(keeper):
    found = []
    for launched_by in ("fork", "exec"):
        found.append(language_servers(start(keeper, launched_by)))
        delete_servers(keeper)
    assert found[0] == found[1]


@pytest.mark.skipif(sys.platform != "linux", reason="forking needs Linux")
def test_search_for_language_servers_that_hangs_does_not_hold_up_the_fork_server(make_keeper):
    keeper = make_keeper(launch_by="fork")
    julia = keeper.base / "bin" / "julia"
    julia.parent.mkdir()
    julia.write_text("#!/bin/sh\nexec sleep 1000\n")
    julia.chmod(0o755)
    keeper.variables["PATH"] = f"{julia.parent}:{keeper.environment['PATH']}"
    assert forked(keeper.start())["state"] == "running"


OPEN_WEBSOCKETS_HAVE_NO_DELAY = """
import gc, socket
from jupyter_server.services.kernels.websocket import KernelWebsocketHandler

streams = [found.ws_connection.stream for found in gc.get_objects()
           if isinstance(found, KernelWebsocketHandler) and found.ws_connection]
options = [stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for stream in streams]
assert len(options) == 1 and all(options), options
"""


@pytest.mark.parametrize("launched_by", LAUNCHES)
def test_kernel_websockets_send_without_delay(keeper, launched_by):
    server = start(keeper, launched_by)
    with kernel_websocket(server, start_kernel(server)) as socket_:
        assert execute(socket_, "6 * 7") == "42"
        run_in_server(server, OPEN_WEBSOCKETS_HAVE_NO_DELAY)


@pytest.mark.gateways
def test_websockets_of_kernels_on_a_gateway_send_without_delay(keeper, gateway):
    server = keeper.post(**gateway.options).json()
    with kernel_websocket(server, start_kernel(server)) as socket_:
        assert execute(socket_, "6 * 7") == "42"
        run_in_server(server, OPEN_WEBSOCKETS_HAVE_NO_DELAY)


RECORD_SLEEP = """
import asyncio

def sleep(seconds, *given, sleep=asyncio.sleep, **named):
    asyncio.slept.append(seconds)
    return sleep(seconds, *given, **named)

asyncio.slept, asyncio.sleep = [], sleep
"""


def test_first_websocket_of_a_kernel_does_not_poll_for_its_state(keeper):
    server = start(keeper, "exec")
    run_in_server(server, RECORD_SLEEP)
    # Jupyter alone polls for the state of about every second kernel.
    for _ in range(4):
        with kernel_websocket(server, start_kernel(server)) as socket_:
            assert execute(socket_, "6 * 7") == "42"
    run_in_server(server, "import asyncio; assert 0.05 not in asyncio.slept, asyncio.slept")
