from __future__ import annotations

import pytest

from fuzzing import Speaker


@pytest.fixture(scope="module")
def speaker():
    """A server that sends scripted responses, for a whole module."""
    # Being module-scoped, it starts before the per-test check for leaked threads.
    with Speaker() as speaker:
        yield speaker
