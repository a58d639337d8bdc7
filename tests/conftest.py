"""Rules for every test: kinds, seeds, no leaks, and the skips that CI accepts."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from harness import PATIENCE, children

pytest_plugins = ["keepers", "pages", "users"]

ROOT = Path(__file__).resolve().parents[1]
collect_ignore = [] if os.environ.get("TEST_DOCKER") else ["engines"]
"""Tests that need a Docker Engine and images; `make test-docker` sets the variable."""

KINDS = {"browser": "e2e", "chaos": "e2e", "e2e": "e2e", "fuzz": "fuzz", "kernels": "e2e"}
"""The kind of every test below a directory."""
SETUP_TIMEOUT = 900
"""Seconds for a test that may have to set up the Enterprise Gateway's environment, or waits while
another worker does: without `scripts/test`, the first one that needs it downloads its packages."""
EXPECTED_SKIPS = ("needs control groups", "needs ports that take a right")
"""Skips that depend on the machine's kernel, which no test and no CI script can change."""


# Seeds


def _seed_of_commit():
    """Return a seed that changes with every commit, so that each one tries other input."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return int(head.stdout[:7], 16)
    return 0


SEED = int(os.environ.setdefault("SEED", str(_seed_of_commit())))
"""Seeds the order of tests, hypothesis, schemathesis and the chaos tests; workers inherit it."""


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if getattr(config.option, "randomly_seed", None) == "default":
        config.option.randomly_seed = SEED
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(SEED)


def pytest_report_header():
    return f"seed: {SEED} (SEED={SEED} repeats this run)"


# Kinds


def pytest_collection_modifyitems(items):
    for item in items:
        kind = KINDS.get(item.path.relative_to(Path(__file__).parent).parts[0])
        if kind is not None:
            item.add_marker(kind)
        if hasattr(item, "callspec") and "enterprise-gateway" in item.callspec.params.values():
            item.add_marker(pytest.mark.timeout(SETUP_TIMEOUT))


def pytest_runtest_setup(item):
    if item.get_closest_marker("root") and (sys.platform != "linux" or os.geteuid() != 0):
        pytest.skip("needs Linux and root")
    needed = [name for marker in item.iter_markers("programs") for name in marker.args]
    if item.get_closest_marker("browser"):
        needed.append("chromium")
    missing = [name for name in needed if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


def expected(reason):
    return any(text in str(reason) for text in EXPECTED_SKIPS)


def pytest_sessionfinish(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = [
        report
        for report in (reporter.stats.get("skipped", []) if reporter else [])
        if not expected(report.longrepr)
    ]
    if skipped and os.environ.get("CI"):
        reporter.write_line(f"{len(skipped)} tests were skipped unexpectedly", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


# Faults in this process


@pytest.fixture
def no_threads(monkeypatch):
    """A context in which Python cannot start threads, as at the process limit."""

    def cannot(_thread):
        raise RuntimeError("can't start new thread")

    @contextlib.contextmanager
    def lacking():
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", cannot)
            yield

    return lacking


# Leaks


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    threads_before = set(threading.enumerate())
    children_before = children()
    yield
    end = time.monotonic() + PATIENCE
    while True:
        threads = [thread for thread in threading.enumerate() if thread not in threads_before]
        processes = children() - children_before
        if not threads and not processes:
            return
        if time.monotonic() > end:
            pytest.fail(f"the test left behind threads {threads} and processes {processes}")
        time.sleep(0.02)
