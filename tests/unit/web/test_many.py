"""What the list costs the keeper with many servers, while many look."""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from dataclasses import replace

from harness import until
from labkeeper.core.lifecycle import State
from labkeeper.core.messages import Create
from labkeeper.core.server import Sample, Usage
from labkeeper.testing.fakes import a_spec
from web_pages import a_dashboard

MOST = 0.05
"""Seconds of the keeper's processor for one page."""


def test_a_page_of_two_thousand_servers_is_cheap_while_fifty_look(tmp_path, monkeypatch):
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
        for at in range(50):
            events = streams.enter_context(browser.follow(f"/dashboard/?q=lab-0{at % 10}&follow"))
            looking.append(events)
            next(events), next(events)

        def cost(query):
            began = time.thread_time()
            page = browser.get(f"/dashboard/?{query}")
            spent = time.thread_time() - began
            assert page.text.count("<tr id=") == 100
            return spent

        for query in ("q=lab&sort=memory", "q=lab-1&sort=used&order=descending", "page=20"):
            cost(query)
            assert statistics.median(cost(query) for _ in range(9)) <= MOST, query
        # Together: each notices it only when there is something to read.
        for events in looking:
            events.end()
