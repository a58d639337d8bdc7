"""Commands about servers: `start`, `ls`, `show`, `stop`, `restart`, `rotate-token`, `logs`, `events`, `link`, `open`."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import click

from labkeeper.cli.connect import connected
from labkeeper.cli.errors import complain_of
from labkeeper.cli.options import Size, Where, as_json_option, examples, name_argument, pairs_of, wait_option, where_options
from labkeeper.cli.output import (
    ago,
    coloured,
    is_terminal,
    print_facts,
    print_json,
    print_table,
    put,
    say,
    show_log_tail,
    styled,
    waiting,
)
from labkeeper.core.durations import format_duration
from labkeeper.core.errors import ClientError, Conflict, LabkeeperError, ServerNotFound, StartFailed
from labkeeper.core.lifecycle import State
from labkeeper.core.spec import DEFAULT_NAME

if TYPE_CHECKING:
    from labkeeper.client import Client, Event, Gateway, Limit, Server, Usage


@click.command(
    epilog=examples(
        "labkeeper start",
        "labkeeper start demo --root-dir courses/demo --label team=blue -o ServerApp.terminals_enabled=false",
        "labkeeper start ada bob eve --label course=5",
        "labkeeper start spark --gateway-url http://gateway:8888 --kernel-env KERNEL_USERNAME=ada",
        'echo \'{"name": "x", "gateway_headers": {"X-Team": "blue"}}\' | labkeeper start --json-spec -',
    )
)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option(
    "--root-dir",
    metavar="PATH",
    help="Directory that the Lab shows, within the keeper's allowed roots. Relative: from here, if the keeper is on this "
    "machine, else from its notebook directory.",
)
@click.option("--gateway-url", metavar="URL", help="Jupyter kernel gateway that runs the kernels.")
@click.option("--no-require-gateway", is_flag=True, help="Start also when the gateway cannot be used.")
@click.option("--kernel-env", multiple=True, metavar="KEY=VALUE", help="Environment variable for the kernels only; repeatable.")
@click.option("--port", type=click.IntRange(1, 65535), metavar="PORT", help="Port of the Lab, and no other.")
@click.option("--base-url", metavar="PATH", help="Path prefix of the Lab.")
@click.option("--default-url", metavar="PATH", help="Page to open with.  [default: /lab]")
@click.option("--env", multiple=True, metavar="KEY=VALUE", help="Environment variable for the Lab and its kernels; repeatable.")
@click.option(
    "-o",
    "--option",
    "jupyter_options",
    multiple=True,
    metavar="NAME=VALUE",
    help="Option of Jupyter, its value as JSON, as ServerApp.terminals_enabled=false; repeatable.",
)
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Label, to filter lists by; repeatable.")
@click.option("--memory-limit", type=Size(), metavar="SIZE", help="Memory for the Lab with its kernels, as 2G or 512MiB.")
@click.option("--cpu-limit", type=click.FloatRange(0.01), metavar="N", help="Processors for them; 1.5 is one and a half.")
@click.option("--process-limit", type=click.IntRange(16), metavar="N", help="Processes and threads of them.")
@click.option("--idle-timeout", metavar="TIME", help="Stop it when nobody has used it for so long, as 90m or 2h; 0: never.")
@click.option("--max-age", metavar="TIME", help="Stop it after so long, used or not; 0: never.")
@click.option("--user", metavar="NAME", help="User to run as; needs a keeper that runs as root.")
@click.option(
    "--json-spec",
    type=click.File(encoding="utf-8"),
    metavar="FILE",
    help="Request as JSON, `-` for stdin; the options win over it.",
)
@wait_option
@as_json_option
@where_options
@click.pass_obj
def start(
    where: Where, /, names: tuple[str, ...], *, wait: float | None, as_json: bool, json_spec: IO[str] | None, **options: Any
) -> int:
    """Start servers, new or stopped, and print their links. NAME is `default` when not given.

    Starting what already runs is no error.

    Several are of one kind, and start beside each other, as many at a time as the keeper lets; the exit code is that of the first
    that could not be started, and 1 when some were not ready in time.
    """
    fields = _spec(json_spec) | _fields(options) | ({"name": names[0]} if len(names) == 1 else {})
    as_it_was = json_spec is None and not fields.keys() - {"name"}
    with connected(where) as (client, is_here):
        if is_here and options["root_dir"]:
            fields["root_dir"] = os.path.abspath(Path(options["root_dir"]).expanduser())  # noqa: PTH100 - links are kept as given
        if len(names) > 1:
            return _start_many(client, tuple(dict.fromkeys(names)), fields, wait, as_it_was=as_it_was, as_json=as_json)
        name = fields.get("name", DEFAULT_NAME)
        with waiting(lambda: _progress(client, [name])):
            server = _start(client, fields, wait, as_it_was=as_it_was)
    _show_started(server, as_json)
    return 0


def _progress(client: Client, names: Sequence[str]) -> str:
    """Say how far a start has come."""
    try:
        found = [server for server in client.list() if server.name in names]
    except LabkeeperError:
        found = []
    if len(names) > 1:
        ready, queued = (sum(server.state == state for server in found) for state in (State.RUNNING, State.QUEUED))
        return f"starting {len(names)} servers: {ready} ready, {queued} queued"
    place = next((server.queue_position for server in found), None)
    return f"starting '{names[0]}'" + (f", number {place} in the queue" if place else "")


def _start_many(
    client: Client, names: Sequence[str], fields: dict[str, Any], wait: float | None, *, as_it_was: bool, as_json: bool
) -> int:
    """Start all, those that are there already as they are where nothing else is asked for; give the exit code."""
    with waiting(lambda: _progress(client, names)):
        there = {server.name for server in client.list()} & {*names} if as_it_was else set()
        results: dict[str, Server | LabkeeperError] = {name: _asked(client, name) for name in names if name in there}
        new = [name for name in names if name not in there]
        for at in range(0, len(new), _MOST_AT_ONCE):
            for one in client.start_many(new[at : at + _MOST_AT_ONCE], wait=wait, **fields):
                results[one.name] = one.server or one.error or LabkeeperError(f"cannot start server '{one.name}'")
        for name in there:
            results[name] = _ready(client, results[name], wait)
    codes = []
    for name in names:
        match results[name]:
            case LabkeeperError() as error:
                codes.append(complain_of(error))
            case server:
                _show_started(server, as_json)
                codes.append(0 if server.state == State.RUNNING else 1)
    return next(filter(None, codes), 0)


_MOST_AT_ONCE: Final = 200
"""Names in one request; the API takes no more."""
_LONGEST_WAIT: Final = 3600.0
"""Seconds; the same."""


def _asked(client: Client, name: str) -> Server | LabkeeperError:
    """Ask for one that is there already, and do not wait."""
    try:
        return client.start(name, wait=0)
    except ClientError:
        raise
    except LabkeeperError as error:
        return error


def _ready(client: Client, asked: Server | LabkeeperError, wait: float | None) -> Server | LabkeeperError:
    """Wait for one that was asked for."""
    if isinstance(asked, LabkeeperError) or asked.state == State.RUNNING:
        return asked
    server = client.get(asked.name, wait_for=State.RUNNING, wait=_LONGEST_WAIT if wait is None else wait)
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
    return {key.replace("-", "_"): value for key, value in spec.items()}


_PAIRS: Final = {"env": "--env", "kernel_env": "--kernel-env", "labels": "--label"}
"""Options of `KEY=VALUE`, by the field that they fill."""


def _fields(options: dict[str, Any]) -> dict[str, Any]:
    pairs = {name: pairs_of(option, options.pop(name)) for name, option in _PAIRS.items()}
    set_ = {
        "jupyter_options": {name: _value(text) for name, text in pairs_of("--option", options.pop("jupyter_options")).items()}
    }
    required = {"require_gateway": False} if options.pop("no_require_gateway") else {}
    return {name: value for name, value in (options | pairs | set_).items() if value} | required


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not JSON, such as true, 10 or 0.5", param_hint="'--option'") from error


def _start(client: Client, fields: dict[str, Any], wait: float | None, *, as_it_was: bool) -> Server:
    if as_it_was:
        # Only its name was given: whatever it was made of is to be started again, not compared with the defaults.
        with suppress(ServerNotFound):
            return client.start(fields.get("name", DEFAULT_NAME), wait=wait)
    return client.create(fields, wait=wait)


def _show_started(server: Server, as_json: bool) -> None:
    if as_json:
        print_json(server)
    elif server.lab_url is not None:
        put(server.lab_url)
    else:
        say(f"server '{server.name}' is {server.state}; `labkeeper show {server.name}` tells more")


@click.command(epilog=examples("labkeeper ls --state running --label team=blue", "labkeeper ls --json | jq -r '.servers[].name'"))
@click.option(
    "--state", multiple=True, type=click.Choice([str(state) for state in State]), help="Only servers in this state; repeatable."
)
@click.option("--label", multiple=True, metavar="KEY[=VALUE]", help="Only servers with this label; repeatable, all must fit.")
@as_json_option
@where_options
@click.pass_obj
def ls(where: Where, /, state: tuple[str, ...], label: tuple[str, ...], as_json: bool) -> None:
    """List servers."""
    with connected(where) as (client, _), waiting("asking"):
        servers = (_measured if as_json or _is_wide() else _as_it_is)(lambda: list(client.list(state=state, label=label)))
    if as_json:
        print_json({"servers": [server.model_dump(mode="json") for server in servers], "next": None})
        return
    head: tuple[str, ...] = ("NAME", "STATE", "SINCE", "ADDRESS", "ROOT", "GATEWAY")
    rows: list[tuple[str, ...]] = [
        (s.name, str(s.state), ago(s.since), _address(s), s.root_dir, s.gateway.url if s.gateway else "-") for s in servers
    ]
    if _is_wide():
        head = (*head[:3], "MEMORY", "CPUS", *head[3:])
        rows = [(*row[:3], *_columns(server), *row[3:]) for row, server in zip(rows, servers, strict=True)]
    print_table(head, rows)
    if not servers and is_terminal(sys.stderr):
        say("no servers; `labkeeper start` starts one" if not (state or label) else "no servers fit")


_WIDE: Final = 120
"""Columns of a terminal on which a list tells of memory and processors, too."""


def _is_wide() -> bool:
    return is_terminal(sys.stdout) and shutil.get_terminal_size().columns >= _WIDE


def _columns(server: Server) -> tuple[str, str]:
    usage = server.usage
    if usage is None:
        return "-", "-"
    # Divided, since what a group counts and what processes have resident are not alike, and a list is to be compared.
    memory = usage.memory if usage.memory_proportional is None else usage.memory_proportional
    return _mib(memory), "-" if usage.cpus is None else f"{usage.cpus:.2f}"


@click.command(epilog=examples("labkeeper show", "labkeeper show demo --json | jq .pid"))
@name_argument
@as_json_option
@where_options
@click.pass_obj
def show(where: Where, /, name: str, as_json: bool) -> None:
    """Tell all of one server but its secrets.

    `open --print` and `--json` give those.
    """
    with connected(where) as (client, _), waiting("asking"):
        (server,) = _measured(lambda: [client.get(name)])
    if as_json:
        print_json(server)
        return
    facts = _facts(server)
    print_facts(facts)
    if server.failure is not None:
        show_log_tail(server.failure.log_tail)


def _limit(name: str, limit: Limit) -> str:
    amount = f"{limit.limit / 2**20:.0f} MiB" if name == "memory" else f"{limit.limit:g}"
    used = f", {limit.used / limit.limit:.0%} used" if limit.used is not None else ""
    return f"{name} {amount}{used}" + (f" (by {limit.limited_by})" if limit.limited_by else "")


def _usage(usage: Usage) -> str:
    shared = f" ({_mib(usage.memory_proportional)} with shared pages divided)" if usage.memory_proportional is not None else ""
    busy = f", {usage.cpus:.2f} now" if usage.cpus is not None else ""
    processes = f"{usage.processes} process{'' if usage.processes == 1 else 'es'}"
    return f"memory {_mib(usage.memory)}{shared}, {usage.cpu_seconds:.1f} s of processors{busy}, {processes}"


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def _measured(ask: Callable[[], Sequence[Server]]) -> Sequence[Server]:
    """Ask, and once more where what runs was not measured yet: that begins when somebody asks."""
    servers = ask()
    if any(server.state == State.RUNNING and server.usage is None for server in servers):
        time.sleep(_MEASURED_WITHIN)
        servers = ask()
    return servers


def _as_it_is(ask: Callable[[], Sequence[Server]]) -> Sequence[Server]:
    return ask()


_MEASURED_WITHIN: Final = 0.5
"""Seconds."""


def _gateway(gateway: Gateway) -> str:
    if gateway.reachable is None:
        return gateway.url
    if gateway.error is not None:
        return f"{gateway.url} (not usable since {gateway.since}: {gateway.error.message})"
    return f"{gateway.url} (answers, {gateway.kernelspecs} kernelspec{'' if gateway.kernelspecs == 1 else 's'})"


def _facts(server: Server) -> dict[str, str]:
    """Name what there is to say of a server; what is not so is left out."""
    facts = {
        "name": server.name,
        "state": coloured(server.state, sys.stdout),
        "goal": server.goal,
        "place in queue": server.queue_position,
        "since": f"{server.since} ({ago(server.since)})",
        "address": _address(server),
        "root": server.root_dir,
        "gateway": server.gateway and _gateway(server.gateway),
        "kernels kept": ", ".join(server.kernels_kept),
        "pid": server.pid,
        "user": server.user,
        "usage": server.usage and _usage(server.usage),
        "idle timeout": server.idle_timeout and format_duration(server.idle_timeout),
        "max age": server.max_age and format_duration(server.max_age),
        "snoozed until": server.snoozed_until,
        "limits": ", ".join(_limit(name, limit) for name, limit in server.limits.items()),
        "launched by": server.launched_by and server.launched_by + (f" ({server.exec_reason})" if server.exec_reason else ""),
        "jupyter server": server.version,
        "options": ", ".join(f"{name}={json.dumps(value)}" for name, value in sorted(server.jupyter_options.items())),
        "labels": ", ".join(f"{key}={value}" for key, value in sorted(server.labels.items())),
        "created": server.created_at,
        "ready": server.started_at,
        "restarts": server.restarts or None,
        "failure": server.failure and f"{server.failure.message} ({server.failure.failure_class})",
        "stopped": server.stop_report and _stopped(server),
    }
    return {key: str(value) for key, value in facts.items() if value}


@click.command(epilog=examples("labkeeper stop", "labkeeper stop demo spark --delete", "labkeeper stop --all"))
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--all", "every", is_flag=True, help="All servers that there are, instead of named ones.")
@click.option("--force", is_flag=True, help="Kill at once instead of asking.")
@click.option("--delete", is_flag=True, help="Forget it too: its spec and its log.")
@wait_option
@as_json_option
@where_options
@click.pass_obj
def stop(
    where: Where, /, *, names: tuple[str, ...], every: bool, force: bool, delete: bool, wait: float | None, as_json: bool
) -> int:
    """Stop servers with their kernels.

    What they are made of is kept for the next start.

    Goes on to the next when one cannot be stopped; the exit code is that of the first that could not.
    """
    if every and names:
        raise click.UsageError("--all takes no names")
    codes = []
    with connected(where) as (client, _):
        names = tuple(server.name for server in client.list()) if every else names or (DEFAULT_NAME,)
        if len(names) > 1:
            _ask_to_stop(client, names, force)
        for name in names:
            try:
                with waiting(f"stopping '{name}'"):
                    server = (client.delete if delete else client.stop)(name, force=force, wait=wait)
            except ClientError:
                raise
            except LabkeeperError as error:
                codes.append(complain_of(error))
            else:
                _show_stopped(server, as_json)
    return codes[0] if codes else 0


def _ask_to_stop(client: Client, names: Sequence[str], force: bool) -> None:
    """Ask all at once, and wait for none: they end beside each other, and are then reported on in the order given."""
    with waiting("asking"):
        for name in names:
            try:
                client.stop(name, force=force, wait=0)
            except ClientError:
                raise
            except LabkeeperError:
                # The keeper says it again when this one's turn to be reported on has come.
                continue


def _show_stopped(server: Server, as_json: bool) -> None:
    if as_json:
        print_json(server)
    else:
        put(f"{server.name}: {_stopped(server)}")
    left = server.stop_report.kernels_left if server.stop_report else ()
    if left:
        say(f"{server.name}: kernels may be left on its gateway, and are ended when it answers: {', '.join(left)}")


def _stopped(server: Server) -> str:
    report = server.stop_report
    if server.state != State.STOPPED or report is None:
        return str(server.state)
    count = len(report.kernels_stopped)
    kernels = f", with {count} kernel{'s' if count > 1 else ''}" if count else ""
    means = {"none": "had ended by itself", "shutdown": "shut down", "sigterm": "ended by SIGTERM", "sigkill": "ended by SIGKILL"}
    return f"{means.get(report.method, report.method)} in {report.seconds:.1f} s{kernels}"


@click.command(epilog=examples("labkeeper restart demo", "labkeeper restart spark --keep-kernels"))
@name_argument
@click.option("--keep-kernels", is_flag=True, help="Let the kernels on its gateway live on, and have them again.")
@wait_option
@as_json_option
@where_options
@click.pass_obj
def restart(where: Where, /, name: str, keep_kernels: bool, wait: float | None, as_json: bool) -> None:
    """Stop a server if it runs, start it, and print its new link."""
    with connected(where) as (client, _), waiting(f"restarting '{name}'"):
        server = client.restart(name, keep_kernels=keep_kernels, wait=wait)
    _show_started(server, as_json)


@click.command(epilog=examples("labkeeper logs -n 20", "labkeeper logs demo -f"))
@name_argument
@click.option("-f", "--follow", is_flag=True, help="Go on with each new line until the server has ended.")
@click.option("-n", "--tail", type=click.IntRange(0, 1_000_000), metavar="N", help="Lines from the end.  [default: 200]")
@where_options
@click.pass_obj
def logs(where: Where, /, name: str, follow: bool, tail: int | None) -> None:
    """Print the log of a server; it is kept after its end."""
    with connected(where) as (client, _):
        if follow:
            for line in client.follow(name, tail=tail):
                put(line)
        else:
            put(client.logs(name, tail=tail), nl=False)


@click.command(epilog=examples("labkeeper events", "labkeeper events demo -f", "labkeeper events --json"))
@click.argument("name", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on with each new event until the keeper ends.")
@click.option(
    "-n", "--tail", type=click.IntRange(1, 1000), default=30, show_default=True, metavar="N", help="Events from the end."
)
@as_json_option
@where_options
@click.pass_obj
def events(where: Where, /, name: str | None, follow: bool, tail: int, as_json: bool) -> None:
    """Tell what happened, to one server or to all, and who set it off.

    The history of a server is kept when it is deleted. With --json, one event a line.
    """
    with connected(where) as (client, _):
        newest = client.events(name, limit=tail)
        for event in newest:
            _show_event(event, as_json)
        if follow:
            # Of all servers: what comes between the two questions belongs to the second one.
            last = max((event.id for event in newest), default=0)
            for event in client.follow_events(name, after=last):
                _show_event(event, as_json)


def _show_event(event: Event, as_json: bool) -> None:
    if as_json:
        put(event.model_dump_json())
        return
    by = "" if event.actor == "keeper" else f" [{event.actor}{f': {event.reason}' if event.reason else ''}]"
    put(f"{styled(event.at, sys.stdout, fg='bright_black')}  {event.message}{by}")


@click.command("rotate-token", epilog=examples("labkeeper rotate-token demo", "labkeeper rotate-token demo --wait 0"))
@name_argument
@wait_option
@as_json_option
@where_options
@click.pass_obj
def rotate_token(where: Where, /, name: str, wait: float | None, *, as_json: bool) -> None:
    """Give a running server another token, and print its new link.

    It is launched again: kernels on a gateway live on, those beside it end. Browsers have to be let in anew.
    """
    with connected(where) as (client, _), waiting(f"launching '{name}' again"):
        server = client.rotate_token(name, wait=wait)
    _show_started(server, as_json)


@click.command(epilog=examples("labkeeper link demo", "labkeeper link demo --expires 10m --page /lab/tree/report.ipynb"))
@name_argument
@click.option("--expires", "expires_in", metavar="TIME", help="Time from now; at most 1h.  [default: 60s]")
@click.option("--page", metavar="PATH", help="Page to open.  [default: the server's own]")
@as_json_option
@where_options
@click.pass_obj
def link(where: Where, /, name: str, *, expires_in: str | None, page: str | None, as_json: bool) -> None:
    """Print a link that opens a running Lab once.

    The Lab's token is not in it: it is worth nothing once it was used, or when its time is over.
    """
    with connected(where) as (client, _), waiting("asking"):
        made = client.link(name, expires_in=expires_in, page=page)
    if as_json:
        print_json(made)
    else:
        put(made.url)


@click.command("open", epilog=examples("labkeeper open", "labkeeper open demo --print"))
@name_argument
@click.option("--print", "print_only", is_flag=True, help="Only print the link, with its token.")
@where_options
@click.pass_obj
def open_(where: Where, /, name: str, print_only: bool) -> None:
    """Open a running server in the browser."""
    with connected(where) as (client, _), waiting(f"waiting for '{name}'"):
        server = client.get(name)
        if server.state in {State.QUEUED, State.STARTING, State.BACKOFF}:
            server = client.get(name, wait_for=State.RUNNING)
        if server.lab_url is None:
            raise Conflict(_CLOSED[server.state == State.RUNNING].format(server))
        # A browser is told what to open on its command line, which all users of the machine can read: no token there.
        once = None if print_only else client.link(name).url
    if once is None or not _browse(once):
        put(server.lab_url)


_CLOSED: Final = {
    False: "cannot open server '{0.name}': it is {0.state}; `labkeeper start {0.name}` starts it",
    True: "cannot open server '{0.name}': your token is for reading; one with the scope 'manage' opens it",
}


def _browse(link: str) -> bool:
    import webbrowser  # noqa: PLC0415 - late

    if webbrowser.open(link):
        return True
    say("cannot find a browser here; open this link:")
    return False


def _address(server: Server) -> str:
    """Give the link without its token."""
    return server.lab_url.partition("?")[0] if server.lab_url else "-"
