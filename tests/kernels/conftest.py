"""One forking keeper, and on it servers whose kernels are forked or executed."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import tempfile
import uuid
from pathlib import Path

import httpx
import pytest
from ipykernel.kernelspec import get_kernel_dict

from harness import KeeperProcess, forked
from kernel import call_server, start_kernel_by
from odd_libraries import PRELOADED, write_odd_libraries


class KernelServers:
    """Servers of one keeper, each started when a test first needs it."""

    def __init__(self, keeper):
        self.keeper = keeper
        self.kernels = {}
        """Ids of kernels that tests share, by the way in which they were started."""
        self._lasting = {}
        self._numbers = itertools.count()

    def lasting(self, kernels_by):
        """Return the server that all tests of one kind share."""
        if kernels_by not in self._lasting:
            self._lasting[kernels_by] = self.start(kernels_by)
            # From here on its zygote is there.
            end(start_kernel_by(self._lasting[kernels_by], kernels_by))
        return self._lasting[kernels_by]

    def start(self, kernels_by, **body):
        """Start another server with further fields."""
        name = f"{kernels_by}-{next(self._numbers)}"
        return forked(self.keeper, name, kernels_by=kernels_by, **body)

    def delete(self, server):
        assert self.keeper.delete(server["name"], force="true").status_code in {200, 404}


@contextlib.contextmanager
def serving(base, **variables):
    """Start a keeper with these variables, which its servers inherit."""
    # Paths of the sockets of ipc kernels would be too long below pytest's directories.
    runtime_dir = Path(tempfile.mkdtemp(prefix="kernels-"))
    keeper = KeeperProcess(base, launch_by="fork", runtime_dir=runtime_dir)
    keeper.variables |= {"JUPYTER_DATA_DIR": base / "data"} | variables
    try:
        keeper.start_to_fork()
        yield KernelServers(keeper)
    finally:
        for server in keeper.http.get("/api/servers").json()["servers"]:
            keeper.delete(server["name"], force="true")
        keeper.close()
        shutil.rmtree(runtime_dir)


@pytest.fixture(scope="session")
def kernel_servers(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("kernels") / "keeper") as servers:
        yield servers


@pytest.fixture(scope="session")
def library_servers(tmp_path_factory):
    """Servers whose kernels are forked with libraries; a module can have them as its own."""
    place = tmp_path_factory.mktemp("libraries")
    write_odd_libraries(place)
    path = os.pathsep.join([str(place), *filter(None, [os.environ.get("PYTHONPATH")])])
    with serving(
        tmp_path_factory.mktemp("preloading") / "keeper",
        LABKEEPER_PRELOAD=",".join(PRELOADED),
        PYTHONPATH=path,
    ) as servers:
        yield servers


@pytest.fixture(params=["fork", "exec"])
def kernels_by(request):
    """Whether the kernels of a test are forked or executed."""
    return request.param


@pytest.fixture
def server(kernel_servers, kernels_by):
    """A running server whose kernels start in one of the two ways; none may harm it."""
    return kernel_servers.lasting(kernels_by)


@pytest.fixture
def start_server(kernel_servers, kernels_by):
    """Start servers of a test's own, with other fields."""
    started = []

    def start(**body):
        started.append(kernel_servers.start(kernels_by, **body))
        return started[-1]

    yield start
    for server in started:
        kernel_servers.delete(server)


@pytest.fixture
def start(kernels_by):
    """Start kernels, which must really start in the way that the test is about."""
    with contextlib.ExitStack() as started:

        def start(server, *, launched_by=kernels_by, reason=None, **options):
            kernel = start_kernel_by(server, launched_by, reason, **options)
            started.callback(end, kernel)
            return kernel

        yield start


def end(kernel):
    """End a kernel that a test may have ended, with its server or without."""
    kernel.close()
    with contextlib.suppress(httpx.HTTPError, AssertionError):
        call_server(kernel.server, "DELETE", f"kernels/{kernel.id}")


@pytest.fixture
def kernel(server, start):
    return start(server)


@pytest.fixture
def executed(kernel_servers, kernels_by, start):
    """An executed kernel to compare with, of another server if the tested one is forked."""
    return start(kernel_servers.lasting("exec"), launched_by="exec")


@pytest.fixture
def shared_kernel(kernel_servers, server, kernels_by, request):
    """A kernel for tests that leave it as it was, but for names; a new one after a failed test."""
    ids = kernel_servers.kernels
    # A websocket per test: the server closes one whose client is silent for a minute.
    kernel = start_kernel_by(server, kernels_by, kernel_id=ids.get(kernels_by))
    ids[kernels_by] = kernel.id
    failed_before = request.session.testsfailed
    yield kernel
    kernel.close()
    if request.session.testsfailed != failed_before:
        end(kernel)
        del ids[kernels_by]


@pytest.fixture
def directory(kernel_servers):
    """A directory for a notebook; `path=directory.name` starts a kernel in it."""
    made = kernel_servers.keeper.notebook_dir / uuid.uuid4().hex
    made.mkdir()
    yield made
    shutil.rmtree(made)


@pytest.fixture
def profile(kernel_servers):
    """The directory of IPython's default profile, which kernels read when they start."""
    made = kernel_servers.keeper.base / ".ipython" / "profile_default"
    (made / "startup").mkdir(parents=True, exist_ok=True)
    yield made
    for path in (*made.glob("*.py"), *(made / "startup").glob("*.py")):
        path.unlink()


@pytest.fixture
def add_kernelspec(kernel_servers):
    """Install kernelspecs that differ from the default one, and return their names."""
    place = kernel_servers.keeper.base / "data" / "kernels"
    made = []

    def add(**fields):
        made.append(place / f"own-{uuid.uuid4().hex}")
        made[-1].mkdir(parents=True)
        (made[-1] / "kernel.json").write_text(json.dumps(get_kernel_dict() | fields))
        return made[-1].name

    yield add
    for spec in made:
        shutil.rmtree(spec)


@pytest.fixture
def connection_file(kernel_servers):
    """Return where the connection file of a kernel is, whether the kernel lives or not."""

    def connection_file(kernel):
        server_dir = kernel_servers.keeper.server_dirs / kernel.server["name"]
        return server_dir / "jupyter" / f"kernel-{kernel.id}.json"

    return connection_file
