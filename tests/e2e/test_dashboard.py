"""The dashboard of a real keeper, while many look at it."""

from __future__ import annotations

import statistics
import sys
import threading
import time
from contextlib import ExitStack, closing

import httpx
import pytest

from harness import PATIENCE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the edge needs Linux")

TABS = 50


def sign_in(keeper):
    """Return a browser that has signed in by a link."""
    link = keeper.cli("dashboard", "--print").stdout.strip()
    home = link.partition("/open/")[0]
    browser = httpx.Client(base_url=home, timeout=PATIENCE, trust_env=False)
    assert browser.post(link, headers={"Origin": home}).status_code == 303
    return browser


class Tabs:
    """Pages that follow their changes, each read by a thread."""

    def __init__(self, browser):
        self._browser = browser
        self._threads = [threading.Thread(target=self._read) for _ in range(TABS)]
        self._begun = threading.Barrier(TABS + 1)
        self._ends = threading.Event()
        self.seen = []

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        self._begun.wait(PATIENCE)
        return self

    def __exit__(self, *_):
        self._ends.set()
        for thread in self._threads:
            thread.join()

    def _read(self):
        limits = httpx.Limits(max_connections=1)
        cookies = self._browser.cookies
        with (
            httpx.Client(cookies=cookies, timeout=PATIENCE, trust_env=False, limits=limits) as tab,
            tab.stream("GET", f"{self._browser.base_url}/dashboard/?follow") as answer,
        ):
            lines = answer.iter_lines()
            assert next(lines) == "event: version"
            self._begun.wait(PATIENCE)
            for line in lines:
                if "state running" in line:
                    self.seen.append(line)
                if self._ends.is_set():
                    return


def start_times(keeper, count):
    """Return how long starts took, one after another."""
    taken = []
    for at in range(count):
        began = time.monotonic()
        assert keeper.post(name=f"lab-{at}").status_code == 201
        taken.append(time.monotonic() - began)
        assert keeper.delete(f"lab-{at}").status_code == 200
    return taken


def test_fifty_tabs_do_not_slow_a_start_down(keeper):
    """A start is as fast as without, within what a loaded machine varies by."""
    with closing(sign_in(keeper)) as browser, ExitStack() as stack:
        start_times(keeper, 3)
        before = statistics.median(start_times(keeper, 15))
        tabs = stack.enter_context(Tabs(browser))
        during = statistics.median(start_times(keeper, 15))
        assert keeper.post(name="last").status_code == 201
        end = time.monotonic() + PATIENCE
        while len(tabs.seen) < TABS and time.monotonic() < end:
            time.sleep(0.05)
        assert len(tabs.seen) >= TABS
    assert during <= 2 * before + 0.05, f"{during:.3f} s with tabs, {before:.3f} s without"
