"""Commands that open a Lab or the dashboard: `link`, `open`, `dashboard`."""

from __future__ import annotations

from typing import Final

import click

from labkeeper.cli.completion import name_argument
from labkeeper.cli.connect import connected
from labkeeper.cli.options import Where, as_json_option, examples, where_options
from labkeeper.cli.output import print_json, put, say, waiting
from labkeeper.core.errors import Conflict
from labkeeper.core.lifecycle import State

_STARTING: Final = (State.QUEUED, State.STARTING, State.BACKOFF)
"""States that lead to a running server."""


@click.command(
    epilog=examples(
        "labkeeper link demo", "labkeeper link demo --expires 10m --page /lab/tree/report.ipynb"
    )
)
@name_argument(State.RUNNING)
@click.option(
    "--expires",
    "expires_in",
    metavar="TIME",
    help="Lifetime of the link, at most 1h.  [default: 60s]",
)
@click.option("--page", metavar="PATH", help="Page to open.  [default: the server's own]")
@as_json_option
@where_options
@click.pass_obj
def link(
    where: Where, /, name: str, *, expires_in: str | None, page: str | None, as_json: bool
) -> None:
    """Print a one-time link to a running Lab.

    It shows a button that opens the Lab, so that programs that follow links do not use it up. It
    does not contain the Lab's token, and is worthless once it was used or has expired.
    """
    with connected(where) as (client, _), waiting("asking"):
        # It may be for others: mail scanners follow links.
        made = client.link(name, expires_in=expires_in, page=page, confirm=True)
    if as_json:
        print_json(made)
    else:
        put(made.url)


@click.command("open", epilog=examples("labkeeper open", "labkeeper open demo --print"))
@name_argument(State.RUNNING, *_STARTING)
@click.option(
    "--print",
    "print_only",
    is_flag=True,
    help="Print a link that opens it, and do not open it.",
)
@where_options
@click.pass_obj
def open_(where: Where, /, name: str, print_only: bool) -> None:
    """Open a running server in the browser."""
    with connected(where) as (client, _), waiting(f"waiting for '{name}'"):
        server = client.get(name)
        if server.state in _STARTING:
            server = client.get(name, wait_for=State.RUNNING)
        if server.lab_url is None:
            raise Conflict(_CLOSED[server.state == State.RUNNING].format(server))
        # A browser gets its URL as an argument, which all users can read: no token there.
        once = None if print_only else client.link(name).url
        if once is None or not _browse(once):
            from labkeeper.client.opening import opening_url  # noqa: PLC0415 - late

            put(opening_url(client, server))


@click.command(
    "dashboard", epilog=examples("labkeeper dashboard", "labkeeper dashboard --print --expires 10m")
)
@click.option(
    "--print",
    "print_only",
    is_flag=True,
    help="Print a link that opens it, and do not open it.",
)
@click.option(
    "--expires",
    "expires_in",
    metavar="TIME",
    help="Lifetime of the link, at most 1h.  [default: 60s]",
)
@as_json_option
@where_options
@click.pass_obj
def dashboard(where: Where, /, *, print_only: bool, expires_in: str | None, as_json: bool) -> None:
    """Open the dashboard in the browser, signed in.

    The link works once and shows a button. The browser then has your token's permissions: it also
    opens the address of each Lab that you may manage. It does not contain your token.
    """
    with connected(where) as (client, _), waiting("asking"):
        made = client.session_link(expires_in=expires_in)
    if as_json:
        print_json(made)
    elif print_only or not _browse(made.url):
        put(made.url)


_CLOSED: Final = {
    False: "cannot open server '{0.name}': it is {0.state}; `labkeeper start {0.name}` starts it",
    True: (
        "cannot open server '{0.name}': your token is for reading; "
        "one with the scope 'manage' opens it"
    ),
}


def _browse(link: str) -> bool:
    import webbrowser  # noqa: PLC0415 - 2 ms of every command

    if webbrowser.open(link):
        return True
    say("cannot find a browser here; open this link:")
    return False
