"""Fixtures: a temporary user of the system, and a directory that all users can traverse."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

USER = f"labkeeper-{os.getpid()}"
"""The name of that user, another one on each worker."""


@pytest.fixture(scope="module")
def passable():
    """A directory that all users can traverse, unlike those of pytest."""
    directory = Path(tempfile.mkdtemp(prefix="labkeeper-test-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def user(passable):
    """A temporary user, who is in a further group; needs root."""
    home = passable / "home"
    subprocess.run(
        ["useradd", "--create-home", "--home-dir", home, "--user-group", "--groups", "users", USER],
        check=True,
    )
    yield pwd.getpwnam(USER)
    subprocess.run(["userdel", "--force", USER], check=True)
