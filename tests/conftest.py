"""No test leaves anything behind, and in CI none is skipped for a reason that is not expected there."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

import psutil
import pytest

collect_ignore = [] if os.environ.get("TEST_DOCKER") else ["deploy", "docker"]
"""Tests that need an engine and images: `make test-docker` says that there are."""

EXPECTED_SKIPS = ("needs control groups",)
"""Reasons that lie in the kernel of the machine, which no test and no CI script can change."""


def expected(reason):
    return any(text in str(reason) for text in EXPECTED_SKIPS)


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    threads_before = set(threading.enumerate())
    children_before = _children()
    yield
    end = time.monotonic() + 5
    while True:
        threads = [thread for thread in threading.enumerate() if thread not in threads_before]
        children = _children() - children_before
        if not threads and not children:
            return
        if time.monotonic() > end:
            pytest.fail(f"left behind: threads {threads}, processes {children}")
        time.sleep(0.02)


def _children():
    """The processes that this one started, as the kernel lists them (psutil would look at every process of the machine)."""
    lists = list(Path("/proc/self/task").glob("*/children"))
    if not lists:
        return {child.pid for child in psutil.Process().children()}
    children = set()
    for path in lists:
        with contextlib.suppress(OSError):  # A thread that has ended meanwhile has no list.
            children.update(int(pid) for pid in path.read_text().split())
    return children


def pytest_sessionfinish(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = [report for report in (reporter.stats.get("skipped", []) if reporter else []) if not expected(report.longrepr)]
    if skipped and os.environ.get("CI"):
        reporter.write_line(f"{len(skipped)} tests were skipped that CI does not expect to be", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
