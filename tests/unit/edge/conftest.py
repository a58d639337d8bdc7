from __future__ import annotations

import contextlib

import pytest
import trustme

from edges import edge_in
from labkeeper.edge.tls import context_of


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
