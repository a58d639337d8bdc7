"""Culling commands: `idle`, `snooze`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from labkeeper.cli.completion import name_argument, server_names
from labkeeper.cli.connect import connected
from labkeeper.cli.options import Where, as_json_option, examples, where_options
from labkeeper.cli.output import hint, print_facts, print_json, print_table, put, waiting
from labkeeper.core.lifecycle import State

if TYPE_CHECKING:
    from labkeeper.client import Idle


@click.command(
    epilog=examples(
        "labkeeper idle", "labkeeper idle demo", "labkeeper idle --json | jq '.servers[0]'"
    )
)
@click.argument("name", required=False, shell_complete=server_names(State.RUNNING))
@as_json_option
@where_options
@click.pass_obj
def idle(where: Where, /, name: str | None, as_json: bool) -> None:
    """Show which servers are idle, and when they will be stopped.

    Stops nothing. With NAME, that server is polled now; otherwise the last poll of each counts.
    """
    with connected(where) as (client, _), waiting("asking"):
        found = [client.idle(name)] if name else list(client.idle_all())
    if as_json:
        print_json(found[0] if name else {"servers": found})
    elif name:
        _explain(found[0])
    else:
        rows = [
            (one.name, one.state, one.stops_at or "-", one.rule or "-", one.reason) for one in found
        ]
        print_table(("NAME", "STATE", "STOPS AT", "RULE", "WHY"), rows)
        if not found:
            hint("no servers; `labkeeper start` starts one")


@click.command(epilog=examples("labkeeper snooze demo --for 2h", "labkeeper snooze demo --for 0"))
@name_argument(State.RUNNING)
@click.option(
    "--for",
    "time",
    required=True,
    metavar="TIME",
    help="Duration, such as 90m or 2h; 0 ends the snooze.",
)
@as_json_option
@where_options
@click.pass_obj
def snooze(where: Where, /, name: str, time: str, as_json: bool) -> None:
    """Postpone the culling of a server."""
    with connected(where) as (client, _), waiting("asking"):
        told = client.snooze(name, time)
    if as_json:
        print_json(told)
    else:
        until = f"snoozed until {told.snoozed_until}" if told.snoozed_until else "not snoozed"
        put(f"{told.name}: {until}")


def _explain(told: Idle) -> None:
    facts = {
        "name": told.name,
        "state": told.state,
        "why": told.reason,
        "stops at": told.stops_at and f"{told.stops_at} ({told.rule})",
        "warns at": told.warns_at,
        "held by": ", ".join(
            f"{holder.kind} {holder.id} ({holder.reason})" for holder in told.held_by
        ),
        "last used": told.last_used_at and f"{told.last_used_at} ({told.last_used})",
        "snoozed until": told.snoozed_until,
        "looked at": told.looked_at,
    }
    print_facts(facts)
