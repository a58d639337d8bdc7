from __future__ import annotations

import contextlib

import pytest

from edges import edge_in


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
