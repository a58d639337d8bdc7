"""The numbers that apply to every server: times, restarts, maxima."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from labkeeper.core.lifecycle import State
from labkeeper.core.ports import Reserve


@dataclass(frozen=True, slots=True)
class Policy:
    """The numbers that apply to every server. Times in seconds."""

    start_timeout: float = 60.0
    stop_grace: float = 8.0
    kill_wait: float = 2.0
    look_again: float = 2.0
    """Interval between observations of a lost server."""
    probe_period: float = 15.0
    """Interval between probes of a running server."""
    hung_after: float = 120.0
    """A running server that has not answered for this long is ended and relaunched; 0: never."""
    restart_delays: tuple[float, ...] = (0.5, 2.0, 8.0)
    """The delay before each relaunch after a crash; their number is the number of attempts."""
    restart_window: float = 600.0
    """Older crashes no longer count."""
    max_servers: int = 200
    """Maximum number of servers that are neither stopped nor failed."""
    max_starts: int = 200
    """Maximum number of concurrent starts; further ones queue."""
    min_free: Reserve = Reserve()  # noqa: RUF009 - frozen
    """Memory to keep free; with less, no server is started."""


TIMERS: Final = {
    State.STARTING: "start_timeout",
    State.RUNNING: "probe_period",
    State.STOPPING: "stop_grace",
    State.KILLING: "kill_wait",
    State.LOST: "look_again",
}
"""The timer of each state, as a field of `Policy`; that of BACKOFF comes from the budget."""
