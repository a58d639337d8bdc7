"""The dashboard of a real keeper, while many look at it."""

from __future__ import annotations

import statistics
import sys
import threading
import time
from contextlib import ExitStack, closing
from dataclasses import replace

import httpx
import pytest

from harness import PATIENCE, until
from labkeeper.core.lifecycle import State
from labkeeper.core.messages import Create
from labkeeper.core.server import Sample, Usage
from labkeeper.testing.fakes import a_spec
from web_pages import a_dashboard

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


MOST = 0.05
"""Seconds of the keeper's processor for one page."""


def test_a_page_of_two_thousand_servers_is_cheap_while_fifty_look(tmp_path, monkeypatch):
    """Over the fake backend: so many real ones would need more memory than there is."""
    with a_dashboard(tmp_path) as site, ExitStack() as streams:
        keeper = site.running.keeper
        keeper.ask(Create(a_spec("lab")))
        until(lambda: keeper.get("lab").state is State.RUNNING)
        one = keeper.get("lab")
        many = [replace(one, spec=replace(one.spec, name=f"lab-{at:04}")) for at in range(2000)]
        samples = {
            snapshot.name: Sample(1, 0.0, Usage(hash(snapshot.name) % 2**30, 1.0, 2, 5), 0.1)
            for snapshot in many
        }
        monkeypatch.setattr(keeper, "all", lambda: sorted(many, key=lambda s: s.name))
        usage = lambda snapshot: samples.get(snapshot.name)  # noqa: E731 - as a service is
        site.running.services = replace(site.running.services, usage=usage)
        site.__post_init__()
        browser, looking = site.browser(), []
        for at in range(TABS):
            events = streams.enter_context(browser.follow(f"/dashboard/?q=lab-0{at % 10}&follow"))
            looking.append(events)
            next(events), next(events)
        # All together, or each would be waited for on its own.
        streams.callback(lambda: [events.end() for events in looking])

        def cost(query):
            began = time.thread_time()
            page = browser.get(f"/dashboard/?{query}")
            spent = time.thread_time() - began
            assert page.text.count("<tr id=") == 100
            return spent

        for query in ("q=lab&sort=memory", "q=lab-1&sort=used&order=descending", "page=20"):
            cost(query)
            assert statistics.median(cost(query) for _ in range(9)) <= MOST, query
