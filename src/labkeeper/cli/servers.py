"""Server commands: `ls`, `show`, `stop`, `restart`, `rotate-token`."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import click

from labkeeper.cli.completion import name_argument, to_stop
from labkeeper.cli.connect import connected
from labkeeper.cli.errors import complain_of
from labkeeper.cli.measures import cpus, measured, memory_of, mib
from labkeeper.cli.options import (
    Where,
    as_json_option,
    examples,
    wait_option,
    where_options,
)
from labkeeper.cli.output import (
    ago,
    coloured,
    hint,
    is_terminal,
    print_facts,
    print_json,
    print_table,
    put,
    say,
    show_log_tail,
    waiting,
)
from labkeeper.cli.start import show_started
from labkeeper.core.culling import Rule, culled_by
from labkeeper.core.durations import format_duration
from labkeeper.core.errors import ClientError, LabkeeperError
from labkeeper.core.lifecycle import State
from labkeeper.core.spec import DEFAULT_NAME

if TYPE_CHECKING:
    from labkeeper.client import Client, Gateway, Kernel, Library, Limit, Server, StopOrder, Usage


@click.command(
    epilog=examples(
        "labkeeper ls --state running --label team=blue",
        "labkeeper ls --json | jq -r '.servers[].name'",
    )
)
@click.option(
    "--state",
    multiple=True,
    type=click.Choice([str(state) for state in State]),
    help="Only servers in this state; repeatable.",
)
@click.option(
    "--label",
    multiple=True,
    metavar="KEY[=VALUE]",
    help="Only servers with this label; repeatable, all must match.",
)
@as_json_option
@where_options
@click.pass_obj
def ls(where: Where, /, state: tuple[str, ...], label: tuple[str, ...], as_json: bool) -> None:
    """List servers."""
    is_wide = is_terminal(sys.stdout) and shutil.get_terminal_size().columns >= _WIDE
    with connected(where) as (client, _), waiting("asking"):

        def ask() -> list[Server]:
            return list(client.list(state=state, label=label))

        servers = measured(ask) if as_json or is_wide else ask()
    if as_json:
        print_json({"servers": servers, "next": None})
        return
    measures = ("MEMORY", "CPUS") if is_wide else ()
    rows = [
        (
            s.name,
            str(s.state),
            ago(s.since),
            *(_measures(s) if is_wide else ()),
            "(slept)" if _slept(s) else _address(s),
            s.root_dir,
            s.gateway.url if s.gateway else "-",
        )
        for s in servers
    ]
    print_table(("NAME", "STATE", "SINCE", *measures, "ADDRESS", "ROOT", "GATEWAY"), rows)
    if not servers:
        hint("no servers fit" if state or label else "no servers; `labkeeper start` starts one")


_WIDE: Final = 120
"""Minimum columns of a terminal for a list to include memory and processors."""


def _measures(server: Server) -> tuple[str, str]:
    usage = server.usage
    return ("-", "-") if usage is None else (mib(memory_of(usage)), cpus(usage))


@click.command(epilog=examples("labkeeper show", "labkeeper show demo --json | jq .pid"))
@name_argument()
@as_json_option
@where_options
@click.pass_obj
def show(where: Where, /, name: str, as_json: bool) -> None:
    """Show a server's details, without secrets.

    `open --print` and `--json` print those.
    """
    with connected(where) as (client, _), waiting("asking"):
        (server,) = measured(lambda: [client.get(name)])
        kernels = [] if as_json else _kernels(client, server)
        libraries = [] if as_json else _libraries(client, server)
    if as_json:
        print_json(server)
        return
    print_facts(_facts(server, kernels, libraries))
    if server.failure is not None:
        show_log_tail(server.failure.log_tail)


def _limit(name: str, limit: Limit) -> str:
    amount = f"{limit.limit / 2**20:.0f} MiB" if name == "memory" else f"{limit.limit:g}"
    used = f", {limit.used / limit.limit:.0%} used" if limit.used is not None else ""
    return f"{name} {amount}{used}" + (f" (by {limit.limited_by})" if limit.limited_by else "")


def _usage(usage: Usage) -> str:
    shared = (
        f" (PSS {mib(usage.memory_proportional)})" if usage.memory_proportional is not None else ""
    )
    busy = f" ({usage.cpus:.2f} CPUs now)" if usage.cpus is not None else ""
    processes = f"{usage.processes} process{'' if usage.processes == 1 else 'es'}"
    cpu_time = f"CPU time {usage.cpu_seconds:.1f} s{busy}"
    return f"memory {mib(usage.memory)}{shared}, {cpu_time}, {processes}"


def _gateway(gateway: Gateway) -> str:
    if gateway.reachable is None:
        return gateway.url
    if gateway.error is not None:
        return f"{gateway.url} (not usable since {gateway.since}: {gateway.error.message})"
    plural = "" if gateway.kernelspecs == 1 else "s"
    return f"{gateway.url} (answers, {gateway.kernelspecs} kernelspec{plural})"


def _kernels(client: Client, server: Server) -> list[str]:
    """Return a line for each kernel of a running server, or why they cannot be listed."""
    if server.state != State.RUNNING:
        return []
    try:
        return [_kernel(kernel) for kernel in client.kernels(server.name)]
    except LabkeeperError as error:
        return [f"cannot be listed: {error.message}"]


def _libraries(client: Client, server: Server) -> list[str]:
    """Return a line for each library that kernels of a running server are to share."""
    if server.state != State.RUNNING or server.gateway is not None or server.kernels_by == "exec":
        return []
    try:
        return [_library(library) for library in client.libraries()]
    except LabkeeperError as error:
        return [f"cannot be listed: {error.message}"]


def _library(library: Library) -> str:
    return library.name if library.loaded else f"{library.name}: not loaded ({library.reason})"


def _kernel(kernel: Kernel) -> str:
    how = _launched(kernel)
    return f"{kernel.id}: {kernel.name}, {kernel.execution_state}" + (f", {how}" if how else "")


def _launched(one: Server | Kernel) -> str:
    reason = f" ({one.exec_reason})" if one.exec_reason else ""
    return one.launched_by + reason if one.launched_by else ""


def _facts(server: Server, kernels: list[str], libraries: list[str]) -> dict[str, object]:
    """Return the facts about a server; those that do not apply are empty."""
    return {
        "name": server.name,
        "state": coloured(server.state, sys.stdout),
        "goal": server.goal,
        "place in queue": server.queue_position,
        "progress": server.progress and server.progress.message,
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
        "sleep after": server.sleep_after and format_duration(server.sleep_after),
        "snoozed until": server.snoozed_until,
        "limits": ", ".join(_limit(name, limit) for name, limit in server.limits.items()),
        "launched by": _launched(server),
        "kernels by": server.gateway is None and server.kernels_by,
        "preloaded": libraries,
        "kernels": kernels,
        "jupyter server": server.version,
        "options": ", ".join(
            f"{name}={json.dumps(value)}" for name, value in sorted(server.jupyter_options.items())
        ),
        "description": server.description,
        "labels": ", ".join(f"{key}={value}" for key, value in sorted(server.labels.items())),
        "created": server.created_at,
        "ready": server.started_at,
        "restarts": server.restarts,
        "failure": server.failure and f"{server.failure.message} ({server.failure.failure_class})",
        "stopped": server.stop_report and _stopped(server),
        "stopped by": server.stopped_by and _stopped_by(server.stopped_by),
    }


def _stopped_by(order: StopOrder) -> str:
    return f"{order.actor} ({order.reason})" if order.reason else order.actor


def _slept(server: Server) -> bool:
    order = server.stopped_by
    return order is not None and culled_by(order.actor, order.reason) is Rule.SLEEP_AFTER


@click.command(
    epilog=examples("labkeeper stop", "labkeeper stop demo spark --delete", "labkeeper stop --all")
)
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=to_stop)
@click.option("--all", "every", is_flag=True, help="All servers.")
@click.option("--force", is_flag=True, help="Kill immediately, without a graceful shutdown.")
@click.option("--delete", is_flag=True, help="Also delete the server, with its spec and log.")
@wait_option
@as_json_option
@where_options
@click.pass_obj
def stop(
    where: Where,
    /,
    *,
    names: tuple[str, ...],
    every: bool,
    force: bool,
    delete: bool,
    wait: float | None,
    as_json: bool,
) -> int:
    """Stop servers, together with their kernels.

    Their specs are kept, so they can be started again.

    Continues if one cannot be stopped; the exit code is that of the first failure.
    """
    if every and names:
        raise click.UsageError("--all takes no names")
    codes = []
    with connected(where) as (client, _):
        names = (
            tuple(server.name for server in client.list()) if every else names or (DEFAULT_NAME,)
        )
        if len(names) > 1:
            _ask_to_stop(client, names, force)
        for name in names:
            try:
                with waiting(f"stopping '{name}'"):
                    server = (client.delete if delete else client.stop)(
                        name, force=force, wait=wait
                    )
            except ClientError:
                raise
            except LabkeeperError as error:
                codes.append(complain_of(error))
            else:
                _show_stopped(server, as_json)
    return codes[0] if codes else 0


def _ask_to_stop(client: Client, names: Sequence[str], force: bool) -> None:
    """Send all requests without waiting: the servers stop in parallel and are reported in order."""
    with waiting("asking"):
        for name in names:
            try:
                client.stop(name, force=force, wait=0)
            except ClientError:
                raise
            except LabkeeperError:
                # The keeper repeats the error when this server's turn to be reported comes.
                continue


def _show_stopped(server: Server, as_json: bool) -> None:
    if as_json:
        print_json(server)
    else:
        put(f"{server.name}: {_stopped(server)}")
    left = server.stop_report.kernels_left if server.stop_report else ()
    if left:
        say(
            f"{server.name}: kernels may be left on its gateway, "
            f"and are ended when it answers: {', '.join(left)}"
        )


def _stopped(server: Server) -> str:
    report = server.stop_report
    if server.state != State.STOPPED or report is None:
        return str(server.state)
    count = len(report.kernels_stopped)
    kernels = f", with {count} kernel{'s' if count > 1 else ''}" if count else ""
    means = {
        "none": "had ended by itself",
        "shutdown": "shut down",
        "sigterm": "ended by SIGTERM",
        "sigkill": "ended by SIGKILL",
    }
    return f"{means.get(report.method, report.method)} in {report.seconds:.1f} s{kernels}"


@click.command(epilog=examples("labkeeper restart demo", "labkeeper restart spark --keep-kernels"))
@name_argument()
@click.option(
    "--keep-kernels", is_flag=True, help="Keep kernels on the gateway running, and take them over."
)
@wait_option
@as_json_option
@where_options
@click.pass_obj
def restart(
    where: Where, /, name: str, keep_kernels: bool, wait: float | None, as_json: bool
) -> None:
    """Restart a server, and print its new link.

    A server that is not running is started.
    """
    with connected(where) as (client, _):
        with waiting(f"restarting '{name}'"):
            server = client.restart(name, keep_kernels=keep_kernels, wait=wait)
        show_started(client, server, as_json)


@click.command(
    "rotate-token",
    epilog=examples("labkeeper rotate-token demo", "labkeeper rotate-token demo --wait 0"),
)
@name_argument(State.RUNNING)
@wait_option
@as_json_option
@where_options
@click.pass_obj
def rotate_token(where: Where, /, name: str, wait: float | None, *, as_json: bool) -> None:
    """Restart a server with a new token, and print its new link.

    Kernels on a gateway keep running, local kernels end. Open browsers must sign in again.
    """
    with connected(where) as (client, _):
        with waiting(f"launching '{name}' again"):
            server = client.rotate_token(name, wait=wait)
        show_started(client, server, as_json)


def _address(server: Server) -> str:
    """Return the link without its token."""
    return server.lab_url.partition("?")[0] if server.lab_url else "-"
