"""Output for people and pipes: JSON, tables, ages, colours, and a spinner for slow operations.

Data goes to stdout, messages go to stderr. Slow imports are made where they are used.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import IO, Any, Final

import click

from labkeeper.core.lifecycle import State
from labkeeper.terminal import visible, visible_line

_COLOURS: Final = {
    State.RUNNING: "green",
    State.FAILED: "red",
    State.LOST: "red",
    State.STOPPED: "bright_black",
}
"""The colour of each state; the others are transitional, and yellow."""


def say(text: str) -> None:
    """Print a message for the user."""
    click.echo(_shown(text, sys.stderr), err=True, color=True)


def hint(text: str) -> None:
    """Print a message for the user if stderr is a terminal."""
    if is_terminal(sys.stderr):
        say(text)


def put(text: str, *, nl: bool = True) -> None:
    """Print data: unchanged unless to a terminal, which would obey control codes of servers."""
    # Our colours are already conditional: click must not strip anything.
    click.echo(_shown(text, sys.stdout), nl=nl, color=True)


def _shown(text: str, stream: IO[str] | None) -> str:
    return visible(text) if is_terminal(stream) else text


def styled(text: str, stream: IO[str] | None, **style: Any) -> str:
    """Return the text, coloured for a terminal unless NO_COLOR (no-color.org) is set."""
    if not is_terminal(stream) or os.environ.get("NO_COLOR"):
        return text
    return click.style(text, **style)


def is_terminal(stream: IO[str] | None) -> bool:
    """Whether the stream is a terminal."""
    return stream is not None and stream.isatty()


def show_log_tail(lines: Sequence[str]) -> None:
    """Print the last log lines of a server, as a quotation."""
    for line in lines:
        say(f"  {styled('|', sys.stderr, fg='bright_black')} {line}")


def print_json(data: Any) -> None:
    """Print an answer of the API, or data that contains some."""
    put(json.dumps(data, indent=2, default=lambda answer: answer.model_dump(mode="json")))


def print_facts(facts: Mapping[str, object]) -> None:
    """Print the facts about one thing, one per line, omitting those that do not apply.

    A list takes a line for each of its items.
    """
    shown = {key: value for key, value in facts.items() if value}
    width = max(map(len, shown))
    show = visible_line if is_terminal(sys.stdout) else str
    for key, value in shown.items():
        lines = value if isinstance(value, list) else [value]
        for name, line in zip(itertools.chain([key], itertools.repeat("")), lines, strict=False):
            put(f"{name:{width}}  {show(str(line))}")


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns: cut to fit and coloured on a terminal, whole and plain elsewhere."""
    if not is_terminal(sys.stdout):
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        for row in (head, *rows):
            put(
                "  ".join(
                    f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)
                ).rstrip()
            )
        return
    from rich.console import Console  # noqa: PLC0415 - late
    from rich.table import Table  # noqa: PLC0415 - late
    from rich.text import Text  # noqa: PLC0415 - late

    table = Table(*head, box=None, pad_edge=False, header_style="bold")
    for column in table.columns[:3]:
        column.no_wrap = True
    for row in rows:
        cells = [Text(visible_line(cell)) for cell in row]
        cells[1].style = style_of(row[1])
        table.add_row(*cells)
    Console(file=sys.stdout).print(table)


def _colour(state: str) -> str:
    return _COLOURS.get(State(state), "yellow") if state in set(State) else ""


def style_of(state: str) -> str:
    """Return the style in which rich shows a state; empty for an unknown one."""
    return _colour(state).replace("bright_black", "dim")


def coloured(state: str, stream: IO[str] | None) -> str:
    """Return a state in its colour."""
    return styled(str(state), stream, fg=_colour(state) or None)


def ago(moment: str) -> str:
    """Return the age of a time in one unit."""
    seconds = _age(moment)
    return moment if seconds is None else f"{_in_one_unit(seconds)} ago"


def ahead(moment: str) -> str:
    """Return how far a time is ahead, in one unit."""
    seconds = _age(moment)
    return moment if seconds is None else f"in {_in_one_unit(-seconds)}"


def _age(moment: str) -> float | None:
    """Return the age of a time in seconds; None if it is no time."""
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()
    except (TypeError, ValueError):
        return None


def _in_one_unit(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{max(0, int(seconds))} s"


@contextmanager
def waiting(what: str | Callable[[], str], *, after: float = 1.0) -> Iterator[None]:
    """Show on a terminal, after `after` seconds, what takes time and how long.

    A callable is called for its text every second.
    """
    if not is_terminal(sys.stderr):
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_spin, args=(what, done, after), name="spinner", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _spin(what: str | Callable[[], str], done: threading.Event, after: float) -> None:
    if done.wait(after):
        return
    from rich.console import Console  # noqa: PLC0415 - late
    from rich.progress import Progress, SpinnerColumn, TextColumn  # noqa: PLC0415 - late

    columns = SpinnerColumn(), TextColumn("{task.description} {task.fields[seconds]:.0f} s")
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None, seconds=after)
        for passed in itertools.count():
            progress.update(
                task, description=what if isinstance(what, str) else what(), seconds=after + passed
            )
            if done.wait(1.0):
                return
