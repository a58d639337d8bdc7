"""The command `start`."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import IO, TYPE_CHECKING, Any, Final, Literal, Union, get_args, get_origin

import click

from labkeeper.cli.completion import server_names
from labkeeper.cli.connect import connected
from labkeeper.cli.errors import complain_of
from labkeeper.cli.options import (
    Size,
    Where,
    as_json_option,
    examples,
    pairs_of,
    wait_option,
    where_options,
)
from labkeeper.cli.output import print_json, put, say, waiting
from labkeeper.core.errors import ClientError, LabkeeperError, ServerNotFound, StartFailed
from labkeeper.core.lifecycle import AT_REST, State
from labkeeper.core.spec import DEFAULT_NAME

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from labkeeper.client import Client, Server


class _Start(click.Command):
    """Has one option per request field; created on use, since the models are slow to import."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        own = super().get_params(ctx)
        return [*own[:1], *_request_options(), *own[1:]]


_SPECIAL: Final[dict[str, dict[str, Any]]] = {
    "root_dir": {
        "metavar": "PATH",
        "help": (
            "Directory that the Lab shows, within the keeper's allowed roots. Relative: from here, "
            "if the keeper is on this machine, else from its notebook directory."
        ),
    },
    "base_url": {"metavar": "PATH"},
    "user": {"metavar": "NAME"},
    "default_url": {"metavar": "PATH"},
    "labels": {"flags": ["--label"]},
    "memory_limit": {
        "type": Size(),
        "metavar": "SIZE",
        "help": "Memory for the Lab with its kernels, as 2G or 512MiB.",
    },
    "jupyter_options": {
        "flags": ["-o", "--option"],
        "multiple": True,
        "metavar": "NAME=VALUE",
        "help": (
            "Option of Jupyter, its value as JSON, as ServerApp.terminals_enabled=false; "
            "repeatable."
        ),
    },
}
"""Overrides of an option's attributes, which otherwise follow from the model."""


@functools.cache
def _request_options() -> tuple[click.Option, ...]:
    from labkeeper.schema.requests.base import is_secret  # noqa: PLC0415 - late
    from labkeeper.schema.requests.flat import flat_fields  # noqa: PLC0415 - late
    from labkeeper.schema.requests.servers import ServerRequest  # noqa: PLC0415 - late

    return tuple(
        _request_option(name, field)
        for name, field in flat_fields(ServerRequest)
        if name != "name" and not is_secret(field)
    )


def _request_option(name: str, field: FieldInfo) -> click.Option:
    special = dict(_SPECIAL.get(name, {}))
    dashed = name.replace("_", "-")
    flags = special.pop("flags", [f"--{dashed}"])
    kind, about = field.annotation, dict[str, Any](help=field.description)
    if kind is bool:
        return click.Option([f"--{dashed}/--no-{dashed}", name], default=None, **about)
    if get_origin(kind) is dict:
        about |= {
            "multiple": True,
            "metavar": "KEY=VALUE",
            "help": f"{str(field.description).rstrip('.')}; repeatable.",
        }
        return click.Option([*flags, name], **about)
    if choices := _choices(kind):
        about |= {"type": click.Choice(choices), "metavar": "|".join(choices)}
    elif kind in {int, float}:
        bounds = {
            edge: getattr(one, edge)
            for one in field.metadata
            for edge in ("ge", "gt", "le")
            if hasattr(one, edge)
        }
        ranges = click.IntRange if kind is int else click.FloatRange
        at_least = bounds.get("ge", bounds.get("gt"))
        about |= {
            "type": ranges(at_least, bounds.get("le"), min_open="gt" in bounds),
            "metavar": "N",
        }
    elif name.endswith("url"):
        about |= {"metavar": "URL"}
    elif name.endswith(("certs", "cert", "key")):
        about |= {"metavar": "PATH"}
    elif get_origin(kind) in {Union, UnionType}:
        about |= {"metavar": "TIME"}
    else:
        about |= {"metavar": "TEXT"}
    return click.Option([*flags, name], **(about | special))


def _choices(kind: Any) -> tuple[str, ...]:
    """Return the values of a literal type, or of one that is optional; empty for other types."""
    if get_origin(kind) in {Union, UnionType}:
        kind = get_args(kind)[0]
    return get_args(kind) if get_origin(kind) is Literal else ()


@click.command(
    cls=_Start,
    epilog=examples(
        "labkeeper start",
        (
            "labkeeper start demo --root-dir courses/demo --label team=blue "
            "-o ServerApp.terminals_enabled=false"
        ),
        "labkeeper start ada bob eve --label course=5",
        "labkeeper start spark --gateway-url http://gateway:8888 --kernel-env KERNEL_USERNAME=ada",
        (
            """echo '{"name": "x", "gateway": {"headers": {"X-Team": "blue"}}}' """
            "| labkeeper start --json-spec -"
        ),
    ),
)
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=server_names(*AT_REST))
@click.option(
    "--json-spec",
    type=click.File(encoding="utf-8"),
    metavar="FILE",
    help="Request as JSON, `-` for stdin. Options override it.",
)
@wait_option
@as_json_option
@where_options
@click.pass_obj
def start(
    where: Where,
    /,
    names: tuple[str, ...],
    *,
    wait: float | None,
    as_json: bool,
    json_spec: IO[str] | None,
    **options: Any,
) -> int:
    """Start servers, new or stopped, and print their links. NAME defaults to `default`.

    A server that is already running is no error.

    Several servers of one kind start in parallel, as the keeper allows; the exit code is that of
    the first that could not be started, and 1 if some were not ready in time.
    """
    fields = _merged(_spec(json_spec), _fields(options)) | (
        {"name": names[0]} if len(names) == 1 else {}
    )
    as_it_was = json_spec is None and not fields.keys() - {"name"}
    with connected(where) as (client, is_here):
        if is_here and options["root_dir"]:
            fields["root_dir"] = os.path.abspath(Path(options["root_dir"]).expanduser())  # noqa: PTH100 - links are kept as given
        if len(names) > 1:
            return _start_many(
                client,
                tuple(dict.fromkeys(names)),
                fields,
                wait,
                as_it_was=as_it_was,
                as_json=as_json,
            )
        name = fields.get("name", DEFAULT_NAME)
        with waiting(lambda: _progress(client, [name])):
            server = _start(client, fields, wait, as_it_was=as_it_was)
        show_started(client, server, as_json)
    return 0


def _progress(client: Client, names: Sequence[str]) -> str:
    """Return the progress of a start as text."""
    try:
        found = [server for server in client.list() if server.name in names]
    except LabkeeperError:
        found = []
    if len(names) > 1:
        ready, queued = (
            sum(server.state == state for server in found)
            for state in (State.RUNNING, State.QUEUED)
        )
        return f"starting {len(names)} servers: {ready} ready, {queued} queued"
    told = f"starting '{names[0]}'"
    for server in found:
        if server.queue_position:
            told += f", number {server.queue_position} in the queue"
        elif server.progress:
            told += f": {server.progress.message}"
    return told


def _start_many(
    client: Client,
    names: Sequence[str],
    fields: dict[str, Any],
    wait: float | None,
    *,
    as_it_was: bool,
    as_json: bool,
) -> int:
    """Start all servers, existing ones unchanged if no fields are given; return the exit code."""
    with waiting(lambda: _progress(client, names)):
        there = {server.name for server in client.list()} & {*names} if as_it_was else set()
        results: dict[str, Server | LabkeeperError] = {
            name: _asked(client, name) for name in names if name in there
        }
        new = [name for name in names if name not in there]
        for at in range(0, len(new), _MOST_AT_ONCE):
            for one in client.start_many(new[at : at + _MOST_AT_ONCE], wait=wait, **fields):
                results[one.name] = (
                    one.server or one.error or LabkeeperError(f"cannot start server '{one.name}'")
                )
        for name in there:
            results[name] = _ready(client, results[name], wait)
    codes = []
    for name in names:
        match results[name]:
            case LabkeeperError() as error:
                codes.append(complain_of(error))
            case server:
                show_started(client, server, as_json)
                codes.append(0 if server.state == State.RUNNING else 1)
    return next(filter(None, codes), 0)


_MOST_AT_ONCE: Final = 200
"""Maximum number of names in one request of the API."""


_LONGEST_WAIT: Final = 3600.0
"""Maximum wait of the API in seconds."""


def _asked(client: Client, name: str) -> Server | LabkeeperError:
    """Start an existing server without waiting."""
    try:
        return client.start(name, wait=0)
    except ClientError:
        raise
    except LabkeeperError as error:
        return error


def _ready(
    client: Client, asked: Server | LabkeeperError, wait: float | None
) -> Server | LabkeeperError:
    """Wait for a server that is starting."""
    if isinstance(asked, LabkeeperError) or asked.state == State.RUNNING:
        return asked
    server = client.get(
        asked.name, wait_for=State.RUNNING, wait=_LONGEST_WAIT if wait is None else wait
    )
    if server.failure is None or server.state != State.FAILED:
        return server
    return StartFailed(server.failure.message, log_tail=server.failure.log_tail)


def _spec(file: IO[str] | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        spec = json.load(file)
    except ValueError as error:
        raise click.BadParameter(f"not JSON: {error}", param_hint="'--json-spec'") from error
    if not isinstance(spec, dict):
        raise click.BadParameter("not a JSON object", param_hint="'--json-spec'")
    return spec


_PAIRS: Final = {"env": "--env", "kernel_env": "--kernel-env", "labels": "--label"}
"""Options of `KEY=VALUE`, by the field that they fill."""


def _fields(options: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that options were given for."""
    given = {name: value for name, value in options.items() if value not in {None, ()}}
    for name, option in _PAIRS.items():
        if name in given:
            given[name] = pairs_of(option, given[name])
    if "jupyter_options" in given:
        pairs = pairs_of("--option", given["jupyter_options"])
        given["jupyter_options"] = {name: _value(text) for name, text in pairs.items()}
    return given


def _merged(spec: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    if not spec:
        return fields
    from labkeeper.schema.requests.flat import merged  # noqa: PLC0415 - late

    try:
        return merged(spec, fields)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'--json-spec'") from error


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise click.BadParameter(
            f"{text!r} is not JSON, such as true, 10 or 0.5", param_hint="'--option'"
        ) from error


def _start(
    client: Client, fields: dict[str, Any], wait: float | None, *, as_it_was: bool
) -> Server:
    if as_it_was:
        # Only the name was given: start the server as it is, instead of comparing defaults.
        with suppress(ServerNotFound):
            return client.start(fields.get("name", DEFAULT_NAME), wait=wait)
    return client.create(fields, wait=wait)


def show_started(client: Client, server: Server, as_json: bool) -> None:
    """Print a started server: its link, or that it is still starting."""
    if as_json:
        print_json(server)
    elif server.lab_url is not None:
        from labkeeper.client.opening import opening_url  # noqa: PLC0415 - late

        put(opening_url(client, server))
    else:
        say(f"server '{server.name}' is {server.state}; `labkeeper show {server.name}` tells more")
