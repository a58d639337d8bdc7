"""Commands about servers, in the order of a server's life: `start`, `ls`, `show`, `stop`, `restart`, `logs`, `open`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from labkeeper.cli.connect import connected
from labkeeper.cli.errors import complain_of
from labkeeper.cli.options import Size, Where, as_json_option, examples, name_argument, wait_option, where_options
from labkeeper.cli.output import ago, coloured, is_terminal, print_json, print_table, say, show_log_tail, waiting
from labkeeper.core.errors import ClientError, Conflict, LabkeeperError, ServerNotFound
from labkeeper.core.lifecycle import State
from labkeeper.core.model import DEFAULT_NAME
from labkeeper.core.times import spoken

if TYPE_CHECKING:
    from labkeeper.client import Client, Gateway, Limit, Server


@click.command(
    epilog=examples(
        "labkeeper start",
        "labkeeper start demo --root-dir ~/demo --label team=blue",
        "labkeeper start spark --gateway-url http://gateway:8888 --kernel-env KERNEL_USERNAME=ada",
        'echo \'{"name": "x", "gateway_headers": {"X-Team": "blue"}}\' | labkeeper start --json-spec -',
    )
)
@click.argument("name", required=False)
@click.option(
    "--root-dir", metavar="PATH", help="Directory that the Lab shows. Relative: from here, if the keeper is on this machine."
)
@click.option("--gateway-url", metavar="URL", help="Jupyter kernel gateway that runs the kernels.")
@click.option("--no-require-gateway", is_flag=True, help="Start also when the gateway cannot be used.")
@click.option("--kernel-env", multiple=True, metavar="KEY=VALUE", help="Environment variable for the kernels only; repeatable.")
@click.option("--port", type=click.IntRange(1, 65535), metavar="PORT", help="Port of the Lab, and no other.")
@click.option("--base-url", metavar="PATH", help="Path prefix of the Lab.")
@click.option("--default-url", metavar="PATH", help="Page to open with.  [default: /lab]")
@click.option("--env", multiple=True, metavar="KEY=VALUE", help="Environment variable for the Lab and its kernels; repeatable.")
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
    where: Where, /, name: str | None, *, wait: float | None, as_json: bool, json_spec: IO[str] | None, **options: Any
) -> None:
    """Start a server, new or stopped, and print its link. NAME is `default` when not given.

    Starting what already runs is no error.
    """
    fields = _spec(json_spec) | _fields(options) | ({"name": name} if name else {})
    with connected(where) as (client, is_here):
        if is_here and options["root_dir"]:
            fields["root_dir"] = os.path.abspath(Path(options["root_dir"]).expanduser())  # noqa: PTH100 - links are kept as given
        with waiting(f"starting '{fields.get('name', DEFAULT_NAME)}'"):
            server = _start(client, fields, wait, as_it_was=json_spec is None and not fields.keys() - {"name"})
    _show_started(server, as_json)


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


def _fields(options: dict[str, Any]) -> dict[str, Any]:
    pairs = {name: _pairs(name, options.pop(name)) for name in ("env", "kernel_env", "labels")}
    required = {"require_gateway": False} if options.pop("no_require_gateway") else {}
    return {name: value for name, value in (options | pairs).items() if value} | required


def _pairs(name: str, texts: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        key, is_pair, value = text.partition("=")
        if not is_pair:
            raise click.BadParameter(f"{text!r} is not KEY=VALUE", param_hint=f"'--{name.removesuffix('s').replace('_', '-')}'")
        pairs[key] = value
    return pairs


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
        click.echo(server.lab_url)
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
        servers = list(client.list(state=state, label=label))
    if as_json:
        print_json({"servers": [server.model_dump(mode="json") for server in servers], "next": None})
        return
    rows = [(s.name, str(s.state), ago(s.since), _address(s), s.root_dir, s.gateway_url or "-") for s in servers]
    print_table(("NAME", "STATE", "SINCE", "ADDRESS", "ROOT", "GATEWAY"), rows)
    if not servers and is_terminal(sys.stderr):
        say("no servers; `labkeeper start` starts one" if not (state or label) else "no servers fit")


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
        server = client.get(name)
    if as_json:
        print_json(server)
        return
    facts = _facts(server)
    width = max(map(len, facts))
    for key, value in facts.items():
        click.echo(f"{key:{width}}  {value}")
    if server.failure is not None:
        show_log_tail(server.failure.log_tail)


def _limit(name: str, limit: Limit) -> str:
    amount = f"{limit.limit / 2**20:.0f} MiB" if name == "memory" else f"{limit.limit:g}"
    return f"{name} {amount}" + (f" (by {limit.limited_by})" if limit.limited_by else "")


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
        "since": f"{server.since} ({ago(server.since)})",
        "address": _address(server),
        "root": server.root_dir,
        "gateway": server.gateway and _gateway(server.gateway),
        "kernels kept": ", ".join(server.kernels_kept),
        "pid": server.pid,
        "user": server.user,
        "idle timeout": server.idle_timeout and spoken(server.idle_timeout),
        "max age": server.max_age and spoken(server.max_age),
        "snoozed until": server.snoozed_until,
        "limits": ", ".join(_limit(name, limit) for name, limit in server.limits.items()),
        "launched by": server.launched_by and server.launched_by + (f" ({server.exec_reason})" if server.exec_reason else ""),
        "jupyter server": server.version,
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
        click.echo(f"{server.name}: {_stopped(server)}")
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
                click.echo(line)
        else:
            click.echo(client.logs(name, tail=tail), nl=False)


@click.command("open", epilog=examples("labkeeper open", "labkeeper open demo --print"))
@name_argument
@click.option("--print", "print_only", is_flag=True, help="Only print the link, with its token.")
@where_options
@click.pass_obj
def open_(where: Where, /, name: str, print_only: bool) -> None:
    """Open a running server in the browser."""
    with connected(where) as (client, _), waiting(f"waiting for '{name}'"):
        server = client.get(name)
        if server.state in {State.STARTING, State.BACKOFF}:
            server = client.get(name, wait_for=State.RUNNING)
    if server.lab_url is None:
        raise Conflict(f"cannot open server '{name}': it is {server.state}; `labkeeper start {name}` starts it")
    if print_only or not _browse(server.lab_url):
        click.echo(server.lab_url)


def _browse(link: str) -> bool:
    import webbrowser  # noqa: PLC0415 - late

    if webbrowser.open(link):
        return True
    say("cannot find a browser here; open this link:")
    return False


def _address(server: Server) -> str:
    """Give the link without its token."""
    return server.lab_url.partition("?")[0] if server.lab_url else "-"
