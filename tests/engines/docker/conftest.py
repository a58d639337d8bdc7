"""Containers for tests, and a directory of notebooks to mount."""

from __future__ import annotations

import os

import pytest

from engine import Container


@pytest.fixture
def make_container():
    """Make containers; whatever is left of them is removed."""
    made = []

    def make(*options, **more):
        made.append(Container(*options, **more))
        return made[-1]

    yield make
    for container in made:
        container.close()


@pytest.fixture(scope="module")
def container():
    """One container for all tests of a file that leave it as they found it."""
    shared = Container().start()
    yield shared
    shared.close()


@pytest.fixture
def notebooks(tmp_path):
    """A directory of somebody whom the image does not know; of ourselves where we cannot give it away."""
    directory = tmp_path / "notebooks"
    directory.mkdir()
    if os.getuid() == 0:
        os.chown(directory, 4321, 4321)
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(0o755)
    return directory
