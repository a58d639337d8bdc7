"""History commands: `logs`, `events`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from labkeeper.cli.completion import name_argument, server_names
from labkeeper.cli.connect import connected
from labkeeper.cli.options import Where, as_json_option, examples, where_options
from labkeeper.cli.output import (
    put,
    styled,
)

if TYPE_CHECKING:
    from labkeeper.client import Event


@click.command(epilog=examples("labkeeper logs -n 20", "labkeeper logs demo -f"))
@name_argument()
@click.option("-f", "--follow", is_flag=True, help="Follow the log until the server has ended.")
@click.option(
    "-n",
    "--tail",
    type=click.IntRange(0, 1_000_000),
    metavar="N",
    help="Number of lines from the end.  [default: 200]",
)
@where_options
@click.pass_obj
def logs(where: Where, /, name: str, follow: bool, tail: int | None) -> None:
    """Print a server's log. It is kept after the server ended."""
    with connected(where) as (client, _):
        if follow:
            for line in client.follow(name, tail=tail):
                put(line)
        else:
            put(client.logs(name, tail=tail), nl=False)


@click.command(
    epilog=examples("labkeeper events", "labkeeper events demo -f", "labkeeper events --json")
)
@click.argument("name", required=False, shell_complete=server_names())
@click.option("-f", "--follow", is_flag=True, help="Follow events until the keeper exits.")
@click.option(
    "-n",
    "--tail",
    type=click.IntRange(1, 1000),
    default=30,
    show_default=True,
    metavar="N",
    help="Number of events from the end.",
)
@as_json_option
@where_options
@click.pass_obj
def events(where: Where, /, name: str | None, follow: bool, tail: int, as_json: bool) -> None:
    """Show events of one server or of all, and who caused them.

    Events are kept when a server is deleted. With --json, one event per line.
    """
    with connected(where) as (client, _):
        newest = client.events(name, limit=tail)
        for event in newest:
            _show_event(event, as_json)
        if follow:
            # Of all servers: events between the two requests belong to the second one.
            last = max((event.id for event in newest), default=0)
            for event in client.follow_events(name, after=last):
                _show_event(event, as_json)


def _show_event(event: Event, as_json: bool) -> None:
    if as_json:
        put(event.model_dump_json())
        return
    reason = f": {event.reason}" if event.reason else ""
    by = "" if event.actor == "keeper" else f" [{event.actor}{reason}]"
    put(f"{styled(event.at, sys.stdout, fg='bright_black')}  {event.message}{by}")
