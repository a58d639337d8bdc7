from __future__ import annotations

import pytest

from fuzzing import Speaker


@pytest.fixture(scope="module")
def speaker():
    """Before the check for threads that are left, since it is of a whole module."""
    with Speaker() as speaker:
        yield speaker
