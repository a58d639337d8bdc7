"""What the core needs of the world, as protocols with their laws in words.

`labkeeper.testing.contract` is the executable form of the laws of `Backend`; every implementation passes it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from labkeeper.core.access import EVERYTHING, Token, TokenLimits
from labkeeper.core.culling import Explanation
from labkeeper.core.messages import KEEPER, Change, Fact, HistoryEntry, HistoryKind, Message, Origin, Reply, Report
from labkeeper.core.server import Activity, Endpoint, Kernel, Load, OrphanedKernel, OwnKernel, Snapshot, Usage
from labkeeper.core.spec import ServerName, ServerSpec


class Clock(Protocol):
    """Time, passed in."""

    def monotonic(self) -> float:
        """Seconds that never go back; for timers."""

    def time(self) -> float:
        """Seconds since the epoch; for people."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """Memory where servers run, in bytes."""

    total: int
    available: int
    """Without taking it from others: the lesser of what the machine has, and what the keeper's container may have."""


@dataclass(frozen=True, slots=True)
class Reserve:
    """What is to stay free where the keeper runs; whichever is more."""

    amount: int = 0
    """Bytes."""
    share: float = 0.0
    """Of the total; 0.05 is a twentieth."""

    def of(self, total: int) -> int:
        """Return the bytes that are to stay free of a total."""
        return max(self.amount, int(total * self.share))


class Backend(Protocol):
    """One way to run servers.

    Laws:

    * Each call takes the server's name and works on whatever exists under it; the calls for one name never overlap, but
      with `usage`.
    * `launch` is idempotent: when this launch of the server exists already, it is taken over, not doubled. When an earlier
      launch left anything, that is ended first.
    * `launch`, `terminate` and `kill` return without waiting for the outcome. `Ready` and `Ended` arrive through the
      `report` that the backend was built with, carrying the launch number, from any thread.
    * Exactly one `Ended` follows every launch that did not raise, and only when nothing of it is left.
    * After `terminate` or `kill` an `Ended` follows even when nothing existed.
    * After `observe` has answered `Seen`, `Ready` (once it answers) and `Ended` are reported as if launched here, with the
      number given to `observe`; `Ready` also when it was reported before. It may overtake the answer.
    * `observe` answers `Ended` of the launch that it was asked about; where only the end of another is known, `Gone`.
    * `strays` names what earlier keepers left under other names than those known, and changes nothing; it is asked before the
      first launch. `sweep` ends and removes what is left under one name, but its log, and reports nothing. It never touches
      what was not made by a keeper over the same place.
    """

    def launch(self, spec: ServerSpec, generation: int) -> None:
        """Start a server. Raises BackendRefused (nothing was started), BackendUnavailable or BackendTimeout (unknown)."""

    def terminate(self, name: ServerName, generation: int, grace: float, *, keep_kernels: bool = False) -> None:
        """Ask the server to end in good order, within `grace` seconds. Raises BackendUnavailable.

        With `keep_kernels` its kernels on a gateway live on; those beside it end in any case.
        """

    def kill(self, name: ServerName, generation: int) -> None:
        """End the server and all that it started, at once. Raises BackendUnavailable."""

    def observe(self, name: ServerName, generation: int) -> Fact:
        """Return what there is: `Seen`, `Ended` or `Gone`. Raises BackendUnavailable when that cannot be known."""

    def forget(self, name: ServerName) -> None:
        """Remove what is kept of a server that has ended: logs, directories. Idempotent."""

    def usage(self, names: Collection[ServerName]) -> Mapping[ServerName, Usage]:
        """Measure those of these servers that exist and can be measured; beside the calls for them, and by one caller."""

    def strays(self, known: Collection[ServerName]) -> Collection[ServerName]:
        """Name the servers of which earlier keepers left anything, but those that are `known`."""

    def sweep(self, name: ServerName) -> None:
        """End and remove what earlier keepers left under a name. What cannot be ended is left, and said in the log."""

    def log(self, name: ServerName, tail: int | None) -> Sequence[str]:
        """Return the last `tail` lines of the server's log, or all; also after it ended. Secrets are scrubbed."""

    def programs(self, name: ServerName) -> Sequence[str] | None:
        """Name what runs in the foreground of each terminal of a server, the oldest first; "" where its shell waits for input.

        None where that cannot be known. Does not raise.
        """

    def follow(self, name: ServerName, tail: int | None, live: Callable[[], bool]) -> Iterator[str]:
        """Return lines as they are written, each with its newline; an empty text means "nothing new yet".

        Ends when `live` says no, or the log is forgotten.
        """

    def capacity(self) -> Capacity | None:
        """Return how much memory there is, without blocking; None if that is unknown. Does not raise."""

    def is_server(self, pid: int) -> bool:
        """Whether a process of the keeper's machine is a server, or may descend from one, running or ended."""

    def close(self) -> None:
        """End all threads. Servers live on, for the next keeper to observe."""


class Probe(Protocol):
    """What is asked of a running server. Questions change nothing, and do not count as activity."""

    def kernels(self, endpoint: Endpoint) -> list[Kernel]:
        """List its kernels. Raises BackendUnavailable, BackendTimeout."""

    def load(self, endpoint: Endpoint) -> Load:
        """Return how many kernels and connections it has. Raises BackendUnavailable, BackendTimeout."""

    def activity(self, endpoint: Endpoint) -> Activity:
        """Ask how it is used; of its terminals it does not know what runs there. Raises BackendUnavailable, BackendTimeout."""

    def end_kernel(self, endpoint: Endpoint, kernel_id: str) -> None:
        """End one of its kernels, if there is one of this id. Raises BackendUnavailable, BackendTimeout."""

    def take_over(self, endpoint: Endpoint, kernel: OwnKernel) -> None:
        """Hand over a kernel that already runs on its gateway, with its sessions. Raises BackendUnavailable, BackendTimeout."""


class GatewayPreflight(Protocol):
    """Looks at the gateway of a server while that starts, and lets its `Ready` through only when both are fit."""

    def begin(self, spec: ServerSpec, generation: int, kernels: Sequence[OwnKernel]) -> None:
        """Begin to look, beside a launch that is about to be made; `kernels` are those that it is to take over.

        Where the gateway is required and cannot be used, `Vetoed` is reported instead of `Ready`.
        """


class OrphanedKernels(Protocol):
    """Kernels of ours on gateways that are still to be ended, kept until they are."""

    def add(self, orphans: Sequence[OrphanedKernel]) -> None:
        """Take in more; kept over the keeper's end as soon as there is room on the disk. Does not raise."""


class Store(Protocol):
    """Where snapshots outlive the keeper."""

    def load(self) -> list[Snapshot]:
        """Return all servers. Raises StoreError."""

    def save(self, snapshot: Snapshot) -> None:
        """Keep one server, durably before returning. Raises StoreError."""

    def forget(self, name: ServerName) -> None:
        """Drop one server. Raises StoreError."""

    def orphans(self) -> list[OrphanedKernel]:
        """Return all kernels that are still to be ended. Raises StoreError."""

    def add_orphans(self, orphans: Sequence[OrphanedKernel]) -> None:
        """Keep some more, durably before returning. Raises StoreError."""

    def discard_orphans(self, kernel_ids: Sequence[str]) -> None:
        """Drop some. Raises StoreError."""

    def wipe(self) -> None:
        """Leave nothing on the disk of what was dropped; it may be slow. Does not raise."""


class TokenStore(Protocol):
    """Where tokens of the API outlive the keeper."""

    def tokens(self) -> list[Token]:
        """Return all. Raises StoreError."""

    def save_token(self, token: Token) -> None:
        """Keep one, durably before returning. Raises StoreError."""

    def forget_token(self, id: str) -> None:  # noqa: A002 - as the field is called
        """Drop one. Raises StoreError."""


class HistoryStore(Protocol):
    """Where the history outlives the keeper."""

    def forgotten(self, after: int) -> int:
        """Count the entries newer than an id that were kept once, and are no more. Raises StoreError."""

    def last_id(self) -> int:
        """Return the id of the newest entry; 0 where there is none. Raises StoreError."""

    def remember(self, entries: Sequence[HistoryEntry], *, keep: int) -> None:
        """Keep some more, durably before returning, and about as many as `keep` in all. Raises StoreError.

        What goes is the oldest of the actor who has most, but never the newest entry.
        """

    def remembered(
        self, *, after: int, server: ServerName | None, limit: int, within: TokenLimits = EVERYTHING
    ) -> list[HistoryEntry]:
        """Return the oldest that are newer than an id, of one server or of all, within a within. Raises StoreError."""

    def latest(self, *, server: ServerName | None, limit: int, within: TokenLimits = EVERYTHING) -> list[HistoryEntry]:
        """Return the newest ones, the oldest of them first. Raises StoreError."""


class Executor(Protocol):
    """Runs jobs: those of one server in order, those of different servers beside each other."""

    def submit(self, name: ServerName, job: Callable[[], Report | None], failed: Report | None = None) -> None:
        """Queue a job. The report that it returns goes to the fleet's mailbox, or `failed` if it raises."""


class Subscriber(Protocol):
    """Is told of every change after it was stored. Must be quick and must not raise."""

    def changed(self, change: Change) -> None:
        """Hear of one change."""


class EventLog(Protocol):
    """Where what happens is remembered beside the changes of servers, which it hears as a listener."""

    def record(
        self,
        kind: HistoryKind,
        server: ServerName | None,
        message: str,
        *,
        origin: Origin = KEEPER,
        generation: int | None = None,
        details: Mapping[str, object] | None = None,
    ) -> None:
        """Remember one more thing. Quick, from any thread; does not raise."""


class History(Protocol):
    """What has happened, for readers; a reach leaves out what is none of theirs."""

    @property
    def last_id(self) -> int:
        """The id of the newest entry; 0 where there is none."""

    def forgotten(self, after: int) -> int:
        """Count the entries newer than an id that are known no more. Raises StoreError."""

    def latest(self, *, server: ServerName | None, limit: int, within: TokenLimits = EVERYTHING) -> list[HistoryEntry]:
        """Return the newest entries of one server or of all, the oldest of them first. Raises StoreError."""

    def after(self, after: int, *, server: ServerName | None, limit: int, within: TokenLimits = EVERYTHING) -> list[HistoryEntry]:
        """Return the oldest entries that are newer than an id. Raises StoreError."""

    def follow(
        self, after: int, *, server: ServerName | None, look: float, within: TokenLimits = EVERYTHING
    ) -> Iterator[HistoryEntry | None]:
        """Return entries newer than an id as they come; None each `look` seconds in which none does. Raises StoreError."""


class Meter(Protocol):
    """Counts what happens, for whoever watches over many keepers. Any thread may call it."""

    def answered(self, route: str | None, method: str, status: int, seconds: float) -> None:
        """Take in an answered request; `route` is the pattern of its path, None where it fits none."""

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Write everything in the form that fits an `Accept` header best; return its media type, too."""


class CullStatus(Protocol):
    """Says whether servers would be culled, why, and when. Changes nothing."""

    def refresh(self, snapshot: Snapshot) -> Explanation:
        """Return how one server stands, after a look at it."""

    def cached(self, snapshot: Snapshot) -> Explanation:
        """Return how one server stands, by the last look at it."""


class Watch(Protocol):
    """The snapshots of one server since the watch began."""

    def until(self, holds: Callable[[Snapshot], bool], *, first: Snapshot, timeout: float) -> tuple[Snapshot, bool]:
        """Wait up to `timeout` seconds for a snapshot, `first` or later, of which `holds` is true; return whether one came."""


class Keeper(Protocol):
    """What whoever speaks to callers needs: commands go in, snapshots come out. Any thread may call it."""

    @property
    def alive(self) -> bool:
        """Whether commands are taken."""

    def ask(self, message: Message) -> Reply | None:
        """Send a command, and wait for the fleet's answer (not for its outcome). Raises LabkeeperError."""

    def all(self) -> list[Snapshot]:
        """Return all servers, by name."""

    def get(self, name: ServerName) -> Snapshot | None:
        """Return one server."""

    def watch(self, name: ServerName) -> AbstractContextManager[Watch]:
        """Watch one server; begin before the command whose outcome is awaited, and nothing is missed."""
