"""Commands for the keeper itself: `serve`, `version`."""

from __future__ import annotations

import functools
import sys
from typing import Any, Literal, get_args, get_origin

import click

from labkeeper.cli.connect import connected, loading, read_settings
from labkeeper.cli.init import stay_behind
from labkeeper.cli.options import Where, as_json_option, examples, where_options
from labkeeper.cli.output import is_terminal, print_json, put, waiting
from labkeeper.forkserver.privileges import gain_nothing, hide
from labkeeper.settings.location import PREFIX


class _Serve(click.Command):
    """Has one flag per setting; created on use, since the settings are slow to import."""

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        # First: our environment may hold the token, and an earlier keeper's servers have our user.
        hide()
        # Inherited by all child processes, before they run any code.
        gain_nothing()
        # Before anything is loaded that only the keeper needs.
        stay_behind()
        return super().make_context(info_name, args, parent, **extra)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*_settings_flags(), *super().get_params(ctx)]


@functools.cache
def _settings_flags() -> tuple[click.Option, ...]:
    with loading():
        from labkeeper.settings.model import SECRETS, Settings  # noqa: PLC0415 - late

    return tuple(
        _settings_flag(name, field, PREFIX + name.upper())
        for name, field in Settings.model_fields.items()
        if name not in SECRETS
    )


def _settings_flag(name: str, field: Any, variable: str) -> click.Option:
    kind, flag = field.annotation, f"--{name.replace('_', '-')}"
    default = field.get_default(call_default_factory=True)
    shown = (
        ""
        if default in {None, ()}
        else f"; default: {str(default).lower() if kind is bool else default}"
    )
    about = f"{field.description}  [env: {variable}{shown}]"
    if kind is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}", name], default=None, help=about)
    if get_origin(kind) is Literal:
        return click.Option([flag, name], type=click.Choice(get_args(kind)), help=about)
    if "duration" in f"{kind}{field.metadata}":
        return click.Option([flag, name], metavar="TIME", help=about)
    if kind in {int, float}:
        return click.Option([flag, name], type=kind, metavar="NUMBER", help=about)
    metavar = "PATH" if "Path" in repr(kind) else "TEXT"
    return click.Option([flag, name], metavar=metavar, help=about)


@click.command(
    cls=_Serve,
    epilog=examples(
        "labkeeper serve --start",
        "labkeeper serve --host 0.0.0.0 --port 80 --notebook-dir /notebooks",
    ),
)
@click.option(
    "--start",
    "first",
    is_flag=True,
    help="Also start the server named `default`, and print its link on a terminal.",
)
@click.pass_obj
def serve(where: Where, /, *, first: bool, **flags: Any) -> int:
    """Run the keeper until Ctrl-C or SIGTERM.

    Its servers are stopped with it, unless LABKEEPER_ON_EXIT=leave.

    Each flag is a setting; flags win over the environment, and that over the file that
    LABKEEPER_CONFIG names.
    """
    with loading():
        from labkeeper import serve as keeper  # noqa: PLC0415 - late: it imports everything

    given = {name: value for name, value in flags.items() if value is not None}
    settings = read_settings(where, **given)
    return keeper.run(settings, first=first, announce=put, at_terminal=is_terminal(sys.stdout))


@click.command(epilog=examples("labkeeper version --json | jq -r .version"))
@as_json_option
@where_options
@click.pass_obj
def version(where: Where, /, as_json: bool) -> None:
    """Print the versions of this command and of the keeper.

    `labkeeper --version` asks no keeper.
    """
    from importlib.metadata import version as version_of  # noqa: PLC0415 - late

    ours = version_of("labkeeper")
    if not as_json:
        put(f"labkeeper {ours}")
    with connected(where) as (client, _), waiting("asking"):
        theirs = client.version()
    if as_json:
        print_json(
            {"name": "labkeeper", "version": theirs, "client_version": ours, "url": client.base_url}
        )
    else:
        put(f"keeper at {client.base_url}: {theirs}")
