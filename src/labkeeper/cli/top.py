"""The command `top`: the servers, live in a terminal."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

import click

from labkeeper.cli.connect import connected
from labkeeper.cli.measures import MEASURED_WITHIN, measured
from labkeeper.cli.options import Where, examples, where_options
from labkeeper.cli.output import hint, is_terminal, print_table, waiting
from labkeeper.core.errors import LabkeeperError

if TYPE_CHECKING:
    from labkeeper.cli.top_view import Sample
    from labkeeper.client import Client, Server

_PAGE: Final = 1000
"""Servers in one answer: the most that the API allows."""
_SHARE: Final = 20
"""A keeper that needs long for its answers is asked less often: for a twentieth of its time."""
_REDRAW: Final = 1.0
"""Seconds until ages are shown anew."""
_LATE: Final = 5.0
"""Seconds after the interval at which a missing answer is reported."""


@click.command(
    epilog=examples(
        "labkeeper top", "labkeeper top --sort memory --interval 5", "labkeeper top | grep running"
    )
)
@click.option(
    "--sort",
    type=click.Choice(["cpu", "memory", "name", "state"]),
    default="cpu",
    show_default=True,
    help="What to sort by; the keys c, m, n and s change it.",
)
@click.option(
    "--interval",
    type=click.FloatRange(0.5, 3600),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between two requests; more if the answers take long.",
)
@where_options
@click.pass_obj
def top(where: Where, /, sort: str, interval: float) -> None:
    """Show servers live, with what they use and when they stop.

    The servers that use the most processor time come first, or those with the most memory, by
    name, or those whose state asks for attention. q or Ctrl-C quits; the arrow keys scroll.

    Into a pipe, or at a terminal that cannot move its cursor (TERM=dumb), it prints the table once.
    """
    with connected(where) as (client, _), waiting("asking"):
        first = _sample(lambda: measured(lambda: _servers(client)), client)
    if is_terminal(sys.stdout) and os.environ.get("TERM", "dumb") not in {"dumb", "unknown"}:
        _watch(where, first, sort, interval)
        return
    from labkeeper.cli.top_view import table  # noqa: PLC0415 - late

    print_table(*table(first.rows(sort)))
    if not first.servers:
        hint("no servers; `labkeeper start` starts one")


def _servers(client: Client) -> list[Server]:
    return list(client.list(page_size=_PAGE))


def _sample(servers: Callable[[], Sequence[Server]], client: Client) -> Sample:
    """Request everything that is shown: the same few requests for any number of servers."""
    from labkeeper.cli.top_view import Sample  # noqa: PLC0415 - late

    return Sample(servers(), {idle.name: idle for idle in client.idle_all()})


def _watch(where: Where, first: Sample, sort: str, interval: float) -> None:
    from labkeeper.cli.screen import Screen  # noqa: PLC0415 - late
    from labkeeper.cli.top_view import Display  # noqa: PLC0415 - late

    with Screen() as screen, _Poller(where, first, interval, screen.wake) as poller:
        display = Display(sort, has_keys=screen.has_keys)
        while True:
            screen.draw(display.frame(poller.sample, poller.problem(), screen.size))
            for key in screen.wait(_REDRAW):
                if key == "q":
                    return
                display.press(key)


class _Poller:
    """Requests samples in a thread, so that keys are obeyed while the keeper does not answer."""

    def __init__(
        self, where: Where, first: Sample, interval: float, wake: Callable[[], None]
    ) -> None:
        self.sample = first
        self._where, self._interval, self._wake = where, interval, wake
        self._error = ""
        self._took = 0.0
        """Seconds for the last answers."""
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        # Nothing waits for its end, which a request may delay.
        threading.Thread(target=self._run, name="poller", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()

    def problem(self) -> str:
        """Return why the sample is old; empty if it is not."""
        age = time.monotonic() - self.sample.at
        if not self._error and age < max(self._interval, _SHARE * self._took) + _LATE:
            return ""
        return f"values of {age:.0f} s ago: {self._error or 'the keeper does not answer'}"

    def _run(self) -> None:
        # The first sample has made the keeper measure.
        pause = min(MEASURED_WITHIN, self._interval)
        while not self._ended.wait(pause):
            pause = self._interval
            try:
                # The keeper is looked for again: another one may have another address.
                with connected(self._where) as (client, _):
                    self._follow(client)
            except LabkeeperError as error:
                self._error = error.message
                self._wake()

    def _follow(self, client: Client) -> None:
        while True:
            begun = time.monotonic()
            self.sample, self._error = _sample(lambda: _servers(client), client), ""
            self._wake()
            self._took = self.sample.at - begun
            if self._ended.wait(max(self._interval, _SHARE * self._took)):
                return
