from __future__ import annotations

import contextlib
import fcntl
import os

import pytest

from edges import edge_in
from labkeeper.lab_addresses import LabAddresses
from labkeeper.serve.edge.instances import Instances
from labkeeper.serve.edge.supervisor import Answering, running
from labkeeper.serve.listening import listen
from labkeeper.serve.process import LOCK
from labkeeper.threads import ThreadGroup

ANSWERING = Answering(LabAddresses("path"), ["ours.example"], access_log=True)


@pytest.fixture
def make_edge(tmp_path):
    """Start an edge, without a keeper or Labs, with the given limits."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(edge_in(tmp_path, **options))


@pytest.fixture
def edge(make_edge):
    """An edge before a keeper."""
    made = make_edge()
    made.start_keeper()
    return made


@pytest.fixture
def lab(edge):
    """A Lab behind the edge, below /servers/lab/."""
    return edge.add_lab()


@pytest.fixture
def run(tmp_path):
    """Run an edge as a process, in a context; for it, this process is the keeper."""
    lock = os.open(tmp_path / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)

    @contextlib.contextmanager
    def run(answering=ANSWERING, *, ends=True, **options):
        instances = Instances(tmp_path, tmp_path / "run", ("127.0.0.1", 0), **options)
        threads = ThreadGroup()
        with running(instances, answering, listen, ends=lambda: ends) as edge:
            edge.supervise(threads)
            yield edge
            threads.close()

    yield run
    os.close(lock)
