"""The ports of the core, as protocols; their laws are in the docstrings.

`labkeeper.testing.contract` is the executable form of the laws of `Backend`; every implementation
passes it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from labkeeper.core.access import WHOLE, Caller, Session, SessionUse, Token, View
from labkeeper.core.culling import Explanation
from labkeeper.core.messages import (
    KEEPER,
    Change,
    Fact,
    HistoryEntry,
    HistoryKind,
    Origin,
    Report,
)
from labkeeper.core.server import (
    Activity,
    Endpoint,
    Kernel,
    Load,
    OrphanedKernel,
    OwnKernel,
    Snapshot,
    Usage,
    Visits,
)
from labkeeper.core.spec import LOCAL, Owner, QualifiedName, ServerSpec
from labkeeper.core.usage import Point


class Clock(Protocol):
    """The source of time."""

    def monotonic(self) -> float:
        """Return seconds that never go back; for timers."""

    def time(self) -> float:
        """Return seconds since the epoch; for people."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """Memory where servers run, in bytes."""

    total: int
    available: int
    """Available without reclaiming any in use: the lesser of the machine's and the keeper's
    container's."""


@dataclass(frozen=True, slots=True)
class Reserve:
    """The memory to keep free; the greater of the two applies."""

    amount: int = 0
    """Bytes."""
    share: float = 0.0
    """Fraction of the total; 0.05 is a twentieth."""

    def of(self, total: int) -> int:
        """Return the bytes to keep free of a total."""
        return max(self.amount, int(total * self.share))


@dataclass(frozen=True, slots=True)
class Library:
    """A library that the site wants loaded for kernels before they start."""

    name: str
    loaded: bool | None
    """None while that is not known yet."""
    reason: str | None = None
    """Why it is not loaded."""


class Backend(Protocol):
    """One way to run servers.

    Laws:

    * Each call takes the server's name and acts on whatever exists under it; calls for one name
      never overlap, except `usage`.
    * `launch` is idempotent: if this launch of the server already exists, it is adopted, not
      duplicated. Leftovers of an earlier launch are ended first.
    * `launch`, `terminate` and `kill` return without waiting for the outcome. `Ready` and `Ended`
      arrive through the `report` that the backend was built with, with the generation, from any
      thread.
    * `Progress` may be reported between a launch and its `Ready` or `Ended`.
    * Exactly one `Ended` follows every launch that did not raise, and only once nothing of it is
      left.
    * After `terminate` or `kill` an `Ended` follows even if nothing existed.
    * After `observe` has returned `Seen`, `Ready` (once the server answers) and `Ended` are
      reported as if it had been launched here, with the generation given to `observe`; `Ready` even
      if it was reported before. It may overtake the result.
    * `observe` returns `Ended` for the launch in question; if only the end of another is known,
      `Gone`.
    * `strays` returns the names of earlier keepers' leftovers except the known names, and changes
      nothing; it is called before the first launch. `sweep` ends and removes everything left under
      one name except its log, and reports nothing. It never touches anything that was not made by a
      keeper over the same place, such as a runtime directory.
    """

    def validate(self, spec: ServerSpec, caller: Caller) -> ServerSpec:
        """Return a spec as it can be launched: paths resolved, defaults filled in.

        May read a disk or ask an engine. Errors name nested fields in full: `gateway.ca_certs`.
        Raises InvalidSpec, and NotAllowed if only another caller may have such a server.
        """

    def launch(self, spec: ServerSpec, generation: int) -> None:
        """Start a server of a valid spec.

        Raises BackendRefused (nothing was started), BackendUnavailable or BackendTimeout (unknown).
        """

    def terminate(
        self, name: QualifiedName, generation: int, grace: float, *, keep_kernels: bool = False
    ) -> None:
        """Shut the server down in good order within `grace` seconds. Raises BackendUnavailable.

        With `keep_kernels`, its kernels on a gateway keep running; local ones end in any case.
        """

    def kill(self, name: QualifiedName, generation: int) -> None:
        """End the server and its descendants at once. Raises BackendUnavailable."""

    def observe(self, name: QualifiedName, generation: int) -> Fact:
        """Return `Seen`, `Ended` or `Gone`. Raises BackendUnavailable if that is unknown."""

    def forget(self, name: QualifiedName) -> None:
        """Remove the logs and directories of a server that has ended. Idempotent."""

    def usage(self, names: Collection[QualifiedName]) -> Mapping[QualifiedName, Usage]:
        """Return the usage of those servers that exist and can be measured.

        May run concurrently with other calls, but from one caller only.
        """

    def strays(self, known: Collection[QualifiedName]) -> Collection[QualifiedName]:
        """Return the servers of which earlier keepers left anything, except those in `known`."""

    def sweep(self, name: QualifiedName) -> None:
        """End and remove earlier keepers' leftovers of a name. What cannot be ended is logged."""

    def log(self, name: QualifiedName, tail: int | None) -> Sequence[str]:
        """Return the last `tail` log lines, or all; also after the end. Secrets are scrubbed."""

    def programs(self, name: QualifiedName) -> Sequence[str] | None:
        """Return each terminal's foreground program, oldest first; "" for a shell at its prompt.

        None if that is unknown. Does not raise.
        """

    def follow(
        self, name: QualifiedName, tail: int | None, live: Callable[[], bool]
    ) -> Iterator[str]:
        """Yield lines as they are written, each with its newline; "" means that none is new yet.

        Ends once `live` returns false or the log is removed.
        """

    def libraries(self) -> Sequence[Library]:
        """Return the libraries that kernels are to share, without blocking. Does not raise."""

    def capacity(self) -> Capacity | None:
        """Return the memory capacity without blocking; None if unknown. Does not raise."""

    def is_server(self, pid: int) -> bool:
        """Whether a local process is a server or may descend from one, running or ended."""

    def close(self) -> None:
        """End all threads. Servers keep running, for the next keeper to observe."""


class Probe(Protocol):
    """Queries to a running server. They change nothing and do not count as activity."""

    def kernels(self, endpoint: Endpoint) -> list[Kernel]:
        """Return its kernels. Raises BackendUnavailable, BackendTimeout."""

    def load(self, endpoint: Endpoint) -> Load:
        """Return its kernel and connection counts. Raises BackendUnavailable, BackendTimeout."""

    def activity(self, endpoint: Endpoint) -> Activity:
        """Return its activity, without the programs in its terminals.

        Raises BackendUnavailable, BackendTimeout.
        """

    def end_kernel(self, endpoint: Endpoint, kernel_id: str) -> None:
        """End a kernel if it exists. Raises BackendUnavailable, BackendTimeout."""

    def interrupt_kernel(self, endpoint: Endpoint, kernel_id: str) -> None:
        """Interrupt a kernel if it exists. Raises BackendUnavailable, BackendTimeout."""

    def restart_kernel(self, endpoint: Endpoint, kernel_id: str) -> None:
        """Restart a kernel if it exists. Raises BackendUnavailable, BackendTimeout."""

    def take_over(self, endpoint: Endpoint, kernel: OwnKernel) -> None:
        """Hand over a kernel that already runs on its gateway, with its sessions.

        Raises BackendUnavailable, BackendTimeout.
        """


class Visitors(Protocol):
    """Who has Labs open in browsers."""

    def visits(self, snapshot: Snapshot) -> Visits:
        """Return the visits to a running server's Lab. Raises BackendUnavailable if unknown."""


class GatewayPreflight(Protocol):
    """Checks a server's gateway during its start; passes `Ready` on only if both are fit."""

    def begin(self, spec: ServerSpec, generation: int, kernels: Sequence[OwnKernel]) -> None:
        """Start the check, parallel to a launch; `kernels` are those that the launch takes over.

        If the gateway is required and unusable, `Vetoed` is reported instead of `Ready`.
        """


class OrphanedKernels(Protocol):
    """Our kernels on gateways that are still to be ended, kept until they are."""

    def add(self, orphans: Sequence[OrphanedKernel]) -> None:
        """Add some; they survive the keeper once the disk has room. Does not raise."""


class Store(Protocol):
    """Storage for snapshots that outlives the keeper."""

    def load(self) -> list[Snapshot]:
        """Return all servers. Raises StoreError."""

    def save(self, snapshot: Snapshot) -> None:
        """Save one server, durably before returning. Raises StoreError."""

    def forget(self, name: QualifiedName) -> None:
        """Remove one server. Raises StoreError."""

    def orphans(self) -> list[OrphanedKernel]:
        """Return all kernels that are still to be ended. Raises StoreError."""

    def add_orphans(self, orphans: Sequence[OrphanedKernel]) -> None:
        """Add kernels, durably before returning. Raises StoreError."""

    def discard_orphans(self, kernel_ids: Sequence[str]) -> None:
        """Remove kernels. Raises StoreError."""

    def wipe(self) -> None:
        """Erase removed data from the disk; may be slow. Does not raise."""


class TokenStore(Protocol):
    """Storage for API tokens that outlives the keeper."""

    def tokens(self) -> list[Token]:
        """Return all tokens. Raises StoreError."""

    def save_token(self, token: Token) -> None:
        """Save a token, durably before returning. Raises StoreError."""

    def forget_token(self, id: str) -> None:  # noqa: A002 - as the field is called
        """Remove a token. Raises StoreError."""


class SessionStore(Protocol):
    """Storage for browser sessions that outlives the keeper."""

    def sessions(self) -> list[Session]:
        """Return all sessions, the oldest first. Raises StoreError."""

    def save_session(self, session: Session) -> None:
        """Save a session, durably before returning. Raises StoreError."""

    def forget_sessions(self, ids: Collection[str]) -> None:
        """Remove sessions. Raises StoreError."""

    def session_use(self) -> SessionUse | None:
        """Return when sessions were last used; None if never saved. Raises StoreError."""

    def save_session_use(self, use: SessionUse) -> None:
        """Save when sessions were last used, durably before returning. Raises StoreError."""


class HistoryStore(Protocol):
    """Storage for the history that outlives the keeper."""

    def forgotten(self, after: int) -> int:
        """Return the number of dropped entries newer than an id. Raises StoreError."""

    def last_id(self) -> int:
        """Return the id of the newest entry; 0 if there is none. Raises StoreError."""

    def remember(self, entries: Sequence[HistoryEntry], *, keep: int) -> None:
        """Add entries, durably before returning; keep about `keep` in all. Raises StoreError.

        The oldest entries of the actor with the most are dropped first, but never the newest entry.
        """

    def remembered(self, view: View = WHOLE, *, after: int, limit: int) -> list[HistoryEntry]:
        """Return the oldest entries newer than an id. Raises StoreError."""

    def latest(self, view: View = WHOLE, *, limit: int) -> list[HistoryEntry]:
        """Return the newest entries, oldest first. Raises StoreError."""


UsagePoints = Mapping[tuple[QualifiedName, int], Collection[Point]]
"""Points by server and by name of their level."""


class UsageStore(Protocol):
    """Storage for the usage of servers over time; `Store.forget` removes that of the server."""

    def add_usage(self, points: UsagePoints) -> None:
        """Add points in one transaction, merged with those of the same intervals.

        Those of servers that are not stored are dropped. Raises StoreError.
        """

    def trim_usage(self, sizes: Mapping[int, int]) -> None:
        """Keep the newest points of each server, as many as each level allows. Raises StoreError.

        By number and not by age, since the clock may be wrong.
        """

    def usage(self, server: QualifiedName, level: int, *, since: int) -> list[Point]:
        """Return the points of a level that start at `since` or later, oldest first.

        Raises StoreError.
        """


class Executor(Protocol):
    """Runs jobs: those of one server in order, those of different servers concurrently."""

    def submit(
        self, name: QualifiedName, job: Callable[[], Report | None], failed: Report | None = None
    ) -> None:
        """Queue a job. Its report goes to the fleet's mailbox, or `failed` if it raises."""


Subscriber = Callable[[Change], None]
"""Receives every change after it was stored. Must be quick and must not raise."""


class EventLog(Protocol):
    """Records events other than server changes, which it receives as a subscriber."""

    def record(
        self,
        kind: HistoryKind,
        server: QualifiedName | None,
        message: str,
        *,
        origin: Origin = KEEPER,
        generation: int | None = None,
        details: Mapping[str, object] | None = None,
        owner: Owner = LOCAL,
    ) -> None:
        """Record one event. Quick, from any thread; does not raise.

        `owner` is that of an event without a server.
        """


class CullStatus(Protocol):
    """Reports whether servers would be culled, why, and when. Changes nothing."""

    def refresh(self, snapshot: Snapshot) -> Explanation:
        """Poll a server and return its explanation."""

    def cached(self, snapshot: Snapshot) -> Explanation:
        """Return the explanation from the last poll."""
