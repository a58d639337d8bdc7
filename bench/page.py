#!/usr/bin/env python3
"""Compare how long JupyterLab's page takes to load: directly, through the edge, and on JupyterHub.

    .venv/bin/python bench/page.py [--rounds 7] [--only jupyter_lab,labkeeper] [--requests]

A real browser that is signed in already opens the page, in turns, once with an empty cache and once
again; first over the loopback interface as it is, then as over a line of 20 Mbit/s with 40 ms from
the request to the answer, which Chromium imitates. Time is from the navigation to the first card of
the launcher; bytes are those that Chromium received, with heads. Medians of the rounds are printed,
with the ratio to the direct way. `--requests` lists what one page requests instead. Needs Chromium,
and what `make bench` needs. Nothing is written.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from playwright import sync_api

import environments
from contenders import Server
from environments import Environments
from figures import median
from guard import guarded
from keepers import LabkeeperFork
from peers import JupyterHub, JupyterLab
from progress import BenchError, say
from web import request_json

_NAME: Final = "page"
_TIMEOUT: Final = 120_000
"""Milliseconds for a page to load."""
_FLAGS: Final = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_LINES: Final[Mapping[str, Mapping[str, float] | None]] = {
    "loopback": None,
    "20 Mbit/s, 40 ms": {"latency": 40, "downloadThroughput": 2.5e6, "uploadThroughput": 2.5e6},
}
"""What Chromium imitates: milliseconds, and bytes a second."""
_SHOWN: Final = """
new MutationObserver((_, observer) => {
    if (document.querySelector('.jp-LauncherCard') === null) return;
    observer.disconnect();
    window.launcherShown = performance.now();
}).observe(document, {childList: true, subtree: true});
"""
"""Notes when the launcher is there, in milliseconds since the navigation."""


@dataclass(frozen=True, slots=True)
class Way:
    """A way to a running Lab."""

    label: str
    url: str
    """Of the Lab, with a slash at its end."""
    sign_in: Callable[[sync_api.Page], object]


@dataclass(frozen=True, slots=True)
class Load:
    """One load of the page."""

    seconds: float
    received: float
    """In MB."""
    requests: int


# Ways to a Lab


@contextmanager
def _direct(found: Environments, place: Path) -> Iterator[Way]:
    contender = JupyterLab(found, place)
    with _running(contender) as server:
        token = server.authorization.removeprefix("token ")
        yield Way(
            "direct", server.url, lambda page: page.goto(f"{server.url}api/status?token={token}")
        )


@contextmanager
def _edge(found: Environments, place: Path) -> Iterator[Way]:
    keeper = LabkeeperFork(found, place)
    with _running(keeper):

        def sign_in(page: sync_api.Page) -> None:
            url = f"{keeper.url}/api/servers/{_NAME}/link"
            link = request_json("POST", url, keeper.authorization, {"page": "/api/status"})["url"]
            page.goto(link)

        yield Way("edge", f"{keeper.url}/servers/{_NAME}/", sign_in)


@contextmanager
def _hub(found: Environments, place: Path) -> Iterator[Way]:
    hub = JupyterHub(found, place)
    with _running(hub) as server:

        def sign_in(page: sync_api.Page) -> None:
            page.goto(f"{hub.url}/hub/login")
            page.fill("[name=username]", _NAME)
            page.fill("[name=password]", "any")
            page.click("[type=submit]")
            page.wait_for_url(f"**/user/{_NAME}/**")
            page.goto(f"{server.url}api/status")

        yield Way("JupyterHub", server.url, sign_in)


WAYS: Final = {"jupyter_lab": _direct, "labkeeper": _edge, "jupyterhub": _hub}


@contextmanager
def _running(contender: JupyterLab | LabkeeperFork | JupyterHub) -> Iterator[Server]:
    contender.open()
    try:
        contender.prepare([_NAME])
        server = contender.launch(_NAME)
        try:
            yield server
        finally:
            contender.stop(server)
    finally:
        contender.close()


# Measurements


class Visit:
    """One browser profile, which is signed in, and has an empty cache."""

    def __init__(
        self, browser: sync_api.Browser, way: Way, line: Mapping[str, float] | None
    ) -> None:
        self._way, self._line = way, line
        self._context = browser.new_context()
        self._context.set_default_timeout(_TIMEOUT)
        self._context.add_init_script(_SHOWN)
        page = self._context.new_page()
        page.route("**/*", _pass_documents)
        way.sign_in(page)
        page.close()

    def load(self, note: Callable[[str, Mapping[str, Any]], None] | None = None) -> Load:
        """Load the page in a new tab, until nothing more is requested; close the tab."""
        page = self._context.new_page()
        received: list[float] = []
        cdp = self._context.new_cdp_session(page)
        cdp.send("Network.enable")
        cdp.on("Network.loadingFinished", lambda event: received.append(event["encodedDataLength"]))
        if note is not None:
            for name in ("requestWillBeSent", "responseReceived", "loadingFinished"):
                cdp.on(f"Network.{name}", lambda event, name=name: note(name, event))
        if self._line is not None:
            cdp.send("Network.emulateNetworkConditions", {"offline": False, **self._line})
        page.goto(f"{self._way.url}lab", wait_until="commit")
        page.wait_for_function("() => window.launcherShown")
        shown = page.evaluate("window.launcherShown")
        page.wait_for_load_state("networkidle")
        page.close()
        return Load(shown / 1e3, sum(received) / 1e6, len(received))

    def close(self) -> None:
        """End."""
        self._context.close()


def _pass_documents(route: sync_api.Route) -> None:
    """Load pages alone, without what would fill the cache."""
    if route.request.resource_type == "document":
        route.continue_()
    else:
        route.abort()


def _measure(browser: sync_api.Browser, ways: list[Way], rounds: int) -> None:
    for title, line in _LINES.items():
        found: dict[tuple[str, str], list[Load]] = {}
        for number in range(rounds):
            first = number % len(ways)
            for way in ways[first:] + ways[:first]:
                visit = Visit(browser, way, line)
                for which in ("first load", "repeat load"):
                    found.setdefault((which, way.label), []).append(visit.load())
                visit.close()
            say(f"{title}: {number + 1} of {rounds}")
        _show(title, found)


def _show(title: str, found: Mapping[tuple[str, str], list[Load]]) -> None:
    print(f"\n{title:30}{'s':>10}{'ratio':>8}{'MB':>10}{'requests':>10}")
    base: dict[str, float] = {}
    for (which, label), loads in found.items():
        seconds = median([load.seconds for load in loads])
        base.setdefault(which, seconds)
        received = median([load.received for load in loads])
        requests = median([load.requests for load in loads])
        print(
            f"  {which + ', ' + label:28}{seconds:>10.2f}{seconds / base[which]:>8.2f}"
            f"{received:>10.2f}{requests:>10.0f}"
        )


def _list(browser: sync_api.Browser, way: Way, line: Mapping[str, float] | None) -> None:
    """Print what a first load requests: when, for how long, how many bytes."""
    known: dict[str, dict[str, Any]] = {}

    def note(name: str, event: Mapping[str, Any]) -> None:
        one = known.setdefault(event["requestId"], {})
        one[name] = event["timestamp"]
        if name == "requestWillBeSent":
            one["path"] = urlsplit(event["request"]["url"])[2][:90]
        elif name == "responseReceived":
            headers = event["response"]["headers"].items()
            one["coding"] = {name.lower(): value for name, value in headers}.get("content-encoding")
        else:
            one["bytes"] = event["encodedDataLength"]

    visit = Visit(browser, way, line)
    load = visit.load(note)
    visit.close()
    sent = [one["requestWillBeSent"] for one in known.values() if "requestWillBeSent" in one]
    print(f"\n{way.label}: the launcher after {load.seconds:.2f} s")
    print(f"{'at ms':>8}{'head ms':>8}{'end ms':>8}{'KB':>9}  coding  path")
    for one in sorted(known.values(), key=lambda one: one.get("requestWillBeSent", 0.0)):
        if "loadingFinished" not in one or "path" not in one:
            continue
        begun = one["requestWillBeSent"]
        print(
            f"{(begun - min(sent)) * 1e3:8.0f}"
            f"{(one.get('responseReceived', begun) - begun) * 1e3:8.0f}"
            f"{(one['loadingFinished'] - begun) * 1e3:8.0f}{one['bytes'] / 1e3:9.1f}"
            f"  {one.get('coding') or '':6}  {one['path']}"
        )


def main(place: Path) -> int:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default=",".join(WAYS))
    parser.add_argument("--requests", action="store_true")
    chosen = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        raise BenchError("cannot find chromium; `apt-get install chromium` installs it")
    keys = chosen.only.split(",")
    source = Path(__file__).resolve().parent.parent
    found = environments.prepare(source, place, with_hub="jupyterhub" in keys)
    with sync_api.sync_playwright() as playwright, ExitStack() as stack:
        ways = [stack.enter_context(WAYS[key](found, place)) for key in keys]
        browser = playwright.chromium.launch(executable_path=chromium, args=list(_FLAGS))
        stack.callback(browser.close)
        if chosen.requests:
            for way in ways:
                Visit(browser, way, None).load()
                for line in _LINES.values():
                    _list(browser, way, line)
        else:
            _measure(browser, ways, chosen.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
