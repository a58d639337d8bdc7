"""Test suites of other projects: their sources, and the outcomes of their tests."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from harness import PATIENCE

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "labkeeper" / "suites"
NAMED_FILES = ("-o", "junit_family=xunit1")
"""Options of pytest by which its report has what `outcomes` needs."""
KINDS = ("failure", "error", "skipped")


# Sources, downloaded once and pinned by the lock files


def unpack(name, lock, directory, members=()):
    """Unpack a source distribution, or these parts of it; return its directory."""
    archive = source_archive(name, lock)
    top = archive.name.removesuffix(".tar.gz")
    with tarfile.open(archive) as packed:
        wanted = tuple(f"{top}/{member}" for member in members or ("",))
        packed.extractall(
            directory,
            [member for member in packed.getmembers() if member.name.startswith(wanted)],
            filter="data",
        )
    return directory / top


def source_archive(name, lock):
    """Return a source distribution, or skip the test if it cannot be downloaded."""
    requirement = pinned(name, lock)
    hashes = set(re.findall(r"sha256:([0-9a-f]{64})", requirement))
    CACHE.mkdir(parents=True, exist_ok=True)
    for path in CACHE.glob("*.tar.gz"):
        if hashlib.sha256(path.read_bytes()).hexdigest() in hashes:
            return path
    with tempfile.TemporaryDirectory(dir=CACHE) as place:
        wanted = Path(place) / "requirements.txt"
        wanted.write_text(requirement)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        # Without isolation, pip reads the metadata with the installed build backend.
        which = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--require-hashes"]
        done = subprocess.run(
            [*pip, "--retries", "1", *which, "-r", wanted, "-d", place],
            capture_output=True,
            text=True,
            timeout=4 * PATIENCE,
            check=False,
        )
        assert "DO NOT MATCH" not in done.stderr, done.stderr
        if done.returncode:
            pytest.skip(f"needs {name} from PyPI: {done.stderr.strip()[-300:]}")
        (path,) = Path(place).glob("*.tar.gz")
        return path.rename(CACHE / path.name)


def pinned(name, lock):
    """Return a requirement with its hashes, as in a lock file."""
    return re.search(rf"^{name}==(?:[^\n]*\\\n)+[^\n]*", lock.read_text(), re.MULTILINE)[0]


# Outcomes


def outcomes(report):
    """Return the outcome of each test by its id: passed, failure, error or skipped."""
    return {
        _test_id(case): next((kind for kind in KINDS if case.find(kind) is not None), "passed")
        for case in ET.parse(report).iter("testcase")
    }


def _test_id(case):
    file = case.get("file")
    of_class = case.get("classname")[len(file.removesuffix(".py")) :].replace(".", "::")
    return f"{file}{of_class}::{case.get('name')}"
