"""The command line: commands over the client, and `serve`.

Data goes to stdout, messages go to stderr. Exit codes: 0 success; 1 rejected by the keeper or the
server, or a problem found by `doctor`; 2 wrong usage or settings; 3 no keeper reachable; 4 no such
server; 130 interrupted. Slow imports are made where they are used.
"""

from __future__ import annotations

import io
import sys

import click

from labkeeper.cli import (
    access,
    completion,
    culling,
    doctor,
    history,
    keeper,
    links,
    servers,
    start,
    top,
)
from labkeeper.cli.errors import Group
from labkeeper.cli.options import Where, examples, where_options


@click.group(
    cls=Group,
    commands=(
        keeper.serve,
        keeper.version,
        doctor.doctor,
        completion.completion,
        access.token,
        access.session,
        access.whoami,
        start.start,
        servers.ls,
        top.top,
        servers.show,
        servers.stop,
        servers.restart,
        servers.rotate_token,
        history.logs,
        history.events,
        culling.idle,
        culling.snooze,
        links.link,
        links.open_,
        links.dashboard,
    ),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=examples(
        "labkeeper serve --start          run a keeper here, with one JupyterLab",
        "labkeeper start demo             start one more, and print its link",
        "labkeeper ls                     list the servers",
        "labkeeper logs demo -f           follow the log of one",
        "labkeeper stop demo --delete     stop it and delete it",
    ),
)
@click.version_option(package_name="labkeeper", message="%(package)s %(version)s")
@where_options
@click.pass_context
def cli(context: click.Context, /) -> None:
    """JupyterLab servers on demand.

    A keeper starts, watches and stops them. These commands use the keeper of this machine, or
    the one at --url.
    """
    context.ensure_object(Where)


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A log line outside of the terminal's encoding must not end the command.
            stream.reconfigure(errors="backslashreplace")
    cli(prog_name="labkeeper")
