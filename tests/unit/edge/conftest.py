from __future__ import annotations

import contextlib
import fcntl
import os

import pytest
import trustme

from edges import edge_in
from labkeeper.edge.tls import context_of
from labkeeper.lab_addresses import LabAddresses
from labkeeper.serve.edge.instances import Instances
from labkeeper.serve.edge.supervisor import Answering, running
from labkeeper.serve.listening import listen
from labkeeper.serve.process import LOCK
from labkeeper.threads import ThreadGroup

ANSWERING = Answering(
    LabAddresses("path"), ["ours.example"], [], access_log=True, longest_body=2**20
)


@pytest.fixture(scope="session")
def authority():
    return trustme.CA()


@pytest.fixture(scope="session")
def issue(authority):
    """Return a function that makes a context for host names."""

    def make(*names):
        leaf = authority.issue_cert(*names)
        chain = b"".join(pem.bytes() for pem in leaf.cert_chain_pems)
        return context_of(chain, leaf.private_key_pem.bytes())

    return make


@pytest.fixture
def context(request, issue):
    """What an edge speaks TLS with; None: plain HTTP. See `BOTH` in `edge_peers`."""
    return issue("x") if getattr(request, "param", "plain") == "TLS" else None


@pytest.fixture
def make_edge(tmp_path, context, authority):
    """Start an edge, without a keeper or Labs, with the given limits."""
    with contextlib.ExitStack() as stack:

        def make(**options):
            made = stack.enter_context(edge_in(tmp_path, **{"context": context} | options))
            made.authority = authority
            return made

        yield make


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


def ignore(_used, *, complete):
    """Observe no uses of sessions."""


@pytest.fixture
def state_dir(tmp_path):
    """The state directory of the keeper that `run` runs."""
    return tmp_path


@pytest.fixture
def run(state_dir):
    """Run an edge as a process, in a context; for it, this process is the keeper."""
    lock = os.open(state_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)

    @contextlib.contextmanager
    def run(answering=ANSWERING, *, ends=True, observe=ignore, **options):
        instances = Instances(state_dir, state_dir / "run", ("127.0.0.1", 0), **options)
        threads = ThreadGroup()
        with running(instances, answering, listen, ends=lambda: ends) as edge:
            edge.supervise(threads, observe)
            try:
                yield edge
            finally:
                threads.close()

    yield run
    os.close(lock)
