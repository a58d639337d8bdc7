"""Containers for tests, and a directory of notebooks to mount."""

from __future__ import annotations

import os

import pytest

from engine import Container


@pytest.fixture
def make_container():
    """Return a factory of containers that are removed after the test."""
    made = []

    def make(*options, **more):
        made.append(Container(*options, **more))
        return made[-1]

    yield make
    for container in made:
        container.close()


@pytest.fixture(scope="module")
def container():
    """A container that the tests of a module share, and must leave unchanged."""
    shared = Container().start()
    yield shared
    shared.close()


@pytest.fixture
def notebooks(tmp_path):
    """A directory that belongs to a user unknown to the image, if root runs the tests."""
    directory = tmp_path / "notebooks"
    directory.mkdir()
    if os.getuid() == 0:
        os.chown(directory, 4321, 4321)
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(0o755)
    return directory
