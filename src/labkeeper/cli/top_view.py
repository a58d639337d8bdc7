"""What `top` shows: the table of servers, and the frame around it. Late, since it needs rich."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from rich.cells import cell_len
from rich.console import Group
from rich.text import Text

from labkeeper.cli.measures import cpus, memory_of, mib
from labkeeper.cli.output import ago, ahead, style_of
from labkeeper.core.culling import CullState
from labkeeper.core.lifecycle import State
from labkeeper.terminal import printable_line

if TYPE_CHECKING:
    from labkeeper.client import Idle, Server

_URGENCY: Final = (
    State.FAILED,
    State.LOST,
    State.BACKOFF,
    State.KILLING,
    State.STOPPING,
    State.STARTING,
    State.QUEUED,
    State.RUNNING,
    State.STOPPED,
)
"""States in the order in which they ask for attention; unknown ones of a newer keeper follow."""
_KEYS: Final = {"c": "cpu", "m": "memory", "n": "name", "s": "state"}
"""The key that sorts by each."""
_AROUND: Final = 5
"""Lines that are not servers: counts, a problem, the head, how many more there are, and keys."""
_SPACE: Final = 2
_SHORT_NAME: Final = 20
"""Columns of names for which less important columns go."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The servers at one moment."""

    servers: Sequence[Server]
    """By name."""
    idle: Mapping[str, Idle]
    at: float = field(default_factory=time.monotonic)

    def rows(self, sort: str) -> list[Row]:
        """Return the servers, sorted by one of `SORTS`, and then by name."""
        rows = [Row(server, self.idle.get(server.name)) for server in self.servers]
        return sorted(rows, key=SORTS[sort])


@dataclass(frozen=True, slots=True)
class Row:
    """A server, and what is known of its culling."""

    server: Server
    idle: Idle | None

    @property
    def used(self) -> str:
        """When it was last used, if the keeper polls that."""
        if self.idle is None or self.idle.looked_at is None or self.idle.last_used_at is None:
            return "-"
        return ago(self.idle.last_used_at)

    @property
    def stops(self) -> str:
        """When it will be stopped, or why it will not."""
        if self.idle is None:
            return "-"
        if self.idle.stops_at is not None:
            return ahead(self.idle.stops_at)
        return _NO_STOP.get(self.idle.state, "-")


_NO_STOP: Final = {
    CullState.IN_USE: "in use",
    CullState.UNKNOWN: "unknown",
    CullState.SNOOZED: "snoozed",
}


def _busy(row: Row) -> float:
    usage = row.server.usage
    return -1.0 if usage is None or usage.cpus is None else usage.cpus


def _memory(row: Row) -> int:
    return -1 if row.server.usage is None else memory_of(row.server.usage)


def _urgency(state: State) -> int:
    return _URGENCY.index(state) if state in _URGENCY else len(_URGENCY)


SORTS: Final[Mapping[str, Callable[[Row], Any]]] = {
    "cpu": lambda row: -_busy(row),
    "memory": lambda row: -_memory(row),
    "name": lambda row: row.server.name,
    "state": lambda row: _urgency(row.server.state),
}
"""What rows can be sorted by."""


def _of_usage(text: Callable[[Any], object]) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        found = None if row.server.usage is None else text(row.server.usage)
        return "-" if found is None else str(found)

    return cell


@dataclass(frozen=True, slots=True)
class _Column:
    head: str
    text: Callable[[Row], str]
    is_number: bool = False
    sort: str | None = None
    """What sorts by it."""


_COLUMNS: Final = (
    _Column("NAME", lambda row: row.server.name, sort="name"),
    _Column("STATE", lambda row: str(row.server.state), sort="state"),
    _Column("SINCE", lambda row: ago(row.server.since)),
    _Column("CPUS", _of_usage(cpus), is_number=True, sort="cpu"),
    _Column(
        "MEMORY", _of_usage(lambda usage: mib(memory_of(usage))), is_number=True, sort="memory"
    ),
    _Column("KERNELS", _of_usage(lambda usage: usage.kernels), is_number=True),
    _Column("CONNECTIONS", _of_usage(lambda usage: usage.connections), is_number=True),
    _Column("LAST USED", lambda row: row.used),
    _Column("STOPS", lambda row: row.stops),
)
_FIRST_TO_GO: Final = ("CONNECTIONS", "KERNELS", "LAST USED", "SINCE", "STOPS", "MEMORY", "CPUS")
"""What a narrow terminal does not show."""


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the cells of all columns, safe to print."""
    return (
        [column.head for column in _COLUMNS],
        [[printable_line(column.text(row)) for column in _COLUMNS] for row in rows],
    )


class Display:
    """The live display: how it is sorted, and from which row on."""

    def __init__(self, sort: str, *, has_keys: bool) -> None:
        self._sort = sort
        self._has_keys = has_keys
        self._first = 0
        self._page = 1
        """Rows that fit."""
        self._last = 0
        """The first row when the last one is shown."""

    def press(self, key: str) -> None:
        """Obey a key; ignore others."""
        steps = {"up": -1, "down": 1, "page up": -self._page, "page down": self._page}
        if key in _KEYS:
            self._sort, self._first = _KEYS[key], 0
        elif key in {"home", "end"}:
            self._first = self._last if key == "end" else 0
        else:
            self._first = max(0, min(self._first + steps.get(key, 0), self._last))

    def frame(self, sample: Sample, problem: str, size: tuple[int, int]) -> Group:
        """Return the whole screen; with a problem, the values are shown as old."""
        width, height = size
        rows = sample.rows(self._sort)
        self._page = max(1, height - _AROUND)
        self._last = max(0, len(rows) - self._page)
        self._first = min(self._first, self._last)
        shown = rows[self._first : self._first + self._page]
        lines = [
            _counts(sample),
            Text(printable_line(problem), style="bold red"),
            *self._table(shown, width, is_old=bool(problem)),
            Text(self._rest(len(rows)), style="dim"),
        ]
        lines += [Text()] * (height - len(lines) - 1)
        lines = [*lines[: max(0, height - 1)], self._footer()]
        for line in lines:
            line.truncate(width, overflow="ellipsis")
        return Group(*lines)

    def _table(self, rows: Sequence[Row], width: int, *, is_old: bool) -> list[Text]:
        cells = table(rows)
        columns = list(zip(_COLUMNS, zip(cells[0], *cells[1], strict=True), strict=True))
        widths = {column.head: max(map(cell_len, texts)) for column, texts in columns}
        for head in _FIRST_TO_GO:
            named = min(widths["NAME"], _SHORT_NAME) - widths["NAME"]
            if sum(widths.values()) + named + _SPACE * (len(widths) - 1) <= width:
                break
            del widths[head]
        others = sum(widths.values()) - widths["NAME"] + _SPACE * (len(widths) - 1)
        widths["NAME"] = max(1, min(widths["NAME"], width - others))
        lines = [Text(no_wrap=True, style="dim" if is_old else "") for _ in (*rows, None)]
        for column, texts in columns:
            if column.head not in widths:
                continue
            for number, (line, text) in enumerate(zip(lines, texts, strict=True)):
                cell = Text(text, style=self._style(column, text, is_head=not number))
                cell.truncate(widths[column.head], overflow="ellipsis")
                cell.align("right" if column.is_number else "left", widths[column.head])
                line.append(" " * _SPACE if line else "").append_text(cell)
        return lines

    def _style(self, column: _Column, text: str, *, is_head: bool) -> str:
        if is_head:
            return "bold reverse" if column.sort == self._sort else "bold"
        return style_of(text) if column.head == "STATE" else ""

    def _rest(self, count: int) -> str:
        """Say which servers do not fit."""
        below = count - self._first - self._page
        above = f"… {self._first} above" if self._first else ""
        more = f"… and {below} more" if below > 0 else ""
        if not count:
            return "no servers; `labkeeper start` starts one"
        return "  ".join(filter(None, (above, more)))

    def _footer(self) -> Text:
        if not self._has_keys:
            return Text("Ctrl-C quits", style="dim")
        footer = Text().append("q", style="bold").append(" quit   sort by  ")
        for key, name in _KEYS.items():
            footer.append(key, style="bold").append(" ")
            footer.append(name, style="reverse" if name == self._sort else "").append("  ")
        footer.rstrip()
        return footer


def _counts(sample: Sample) -> Text:
    """Return how many servers there are in each state, and what they use together."""
    states = Counter(server.state for server in sample.servers)
    usages = [server.usage for server in sample.servers if server.usage is not None]
    count = len(sample.servers)
    line = Text().append(f"{count} server{'' if count == 1 else 's'}", style="bold")
    for number, state in enumerate(sorted(states, key=_urgency)):
        line.append(", " if number else ": ")
        line.append(f"{states[state]} {printable_line(state)}", style=style_of(state))
    if usages:
        busy = sum(usage.cpus or 0.0 for usage in usages)
        line.append(f"    {busy:.2f} CPUs, {mib(sum(map(memory_of, usages)))}")
    return line
