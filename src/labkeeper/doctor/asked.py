"""What only a running keeper knows: it is asked once, and the checks judge its answers."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator
from typing import Final

from labkeeper.client import Client, Kernel, Server
from labkeeper.core.errors import BackendUnavailable, LabkeeperError
from labkeeper.core.lifecycle import State
from labkeeper.doctor.case import Answers, Case, Running
from labkeeper.doctor.findings import Finding, ok, problem, setting, skipped, warning

_MOST: Final = 20
"""Maximum number of servers whose kernels are asked for: each server has to answer."""
_CHOSEN: Final = ("forking is turned off", "forking kernels is turned off", "forking needs Linux")
"""How reasons begin that are choices, or cannot be changed."""
_VARIABLE: Final = "the environment variable "


def ask(client: Client) -> Answers:
    """Return what a running keeper says. Raises LabkeeperError."""
    version = client.version()
    servers = list(client.list())
    try:
        libraries, failing = client.libraries(), ""
    except BackendUnavailable as error:
        libraries, failing = (), error.message
    there = [server for server in servers if server.state == State.RUNNING][:_MOST]
    running = [_running(client, server) for server in there]
    return Answers(client.base_url, version, servers, running, libraries, failing)


def _running(client: Client, server: Server) -> Running:
    try:
        return Running(server, client.kernels(server.name))
    except LabkeeperError as error:
        return Running(server, error=error.message)


def keeper(case: Case) -> Iterator[Finding]:
    """Whether a keeper runs, and has our version."""
    if case.keeper is None:
        yield (
            problem("keeper", case.why_none, case.mend_none)
            if case.mend_none
            else skipped("keeper", case.why_none)
        )
    elif case.keeper.version != case.version:
        yield warning(
            "keeper",
            f"the keeper at {case.keeper.url} has version {case.keeper.version}, "
            f"and this command {case.version}",
            "restart the keeper, so that it runs what is installed",
        )
    else:
        yield ok("keeper", f"version {case.version} answers at {case.keeper.url}")


def watchers(case: Case) -> Iterator[Finding]:
    """Whether all watchers of the keeper work."""
    if case.keeper is None:
        return
    if case.keeper.failing:
        yield problem(
            "watchers",
            case.keeper.failing,
            "remove that cause: the keeper tries again by itself",
        )
    else:
        yield ok("watchers", "all of them work")


def servers(case: Case) -> Iterator[Finding]:
    """Whether servers have failed, or are lost."""
    if case.keeper is None:
        return
    for server in case.keeper.servers:
        if server.state == State.FAILED:
            why = server.failure.message if server.failure else "the reason is unknown"
            yield warning(
                "servers", f"'{server.name}' has failed: {why}", f"labkeeper start {_word(server)}"
            )
        elif server.state == State.LOST:
            yield warning(
                "servers",
                f"'{server.name}' is lost: the keeper cannot determine whether it still runs",
                f"labkeeper stop {_word(server)} --force",
            )
    counts = Counter(str(server.state) for server in case.keeper.servers)
    states = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    yield ok("servers", states or "there are none")


def launches(case: Case) -> Iterator[Finding]:
    """Why running servers were executed instead of forked."""
    if case.keeper is None:
        return
    running = [one for one in case.keeper.servers if one.state == State.RUNNING]
    for server in running:
        reason = server.exec_reason
        if reason and not reason.startswith(_CHOSEN):
            yield warning(
                "fork server", f"'{server.name}' was executed: {reason}", _forked(server, reason)
            )
    forked = sum(server.launched_by == "fork" for server in running)
    chosen = {server.exec_reason for server in running} - {None}
    reasons = sorted(reason for reason in chosen if reason and reason.startswith(_CHOSEN))
    if running:
        yield ok("fork server", f"{forked} of {len(running)} running servers were forked", reasons)
    else:
        yield skipped("fork server", "no server runs that would show how it was launched")


def _forked(server: Server, reason: str) -> str:
    """Return what makes the next launch of an executed server a fork."""
    if reason.startswith(_VARIABLE):
        variable = reason.removeprefix(_VARIABLE).split()[0]
        return f"remove {variable} from `env` of the request for '{server.name}'"
    return f"labkeeper restart {_word(server)}"


def kernels(case: Case) -> Iterator[Finding]:
    """How the kernels of running servers were launched; executed ones with the reason."""
    if case.keeper is None:
        return
    found = [(one.server, kernel) for one in case.keeper.running for kernel in one.kernels]
    for one in case.keeper.running:
        if one.error:
            yield warning("kernels", one.error, f"labkeeper restart {_word(one.server)}")
    counts = Counter(kernel.launched_by or "on a gateway" for _, kernel in found)
    how = {"fork": "forked", "exec": "executed"}
    summary = ", ".join(f"{count} {how.get(by, by)}" for by, count in sorted(counts.items()))
    yield ok("kernels", summary or "there are none", [_executed(*one) for one in _reasons(found)])


def _reasons(found: list[tuple[Server, Kernel]]) -> Iterator[tuple[Server, Kernel]]:
    return ((server, kernel) for server, kernel in found if kernel.exec_reason)


def _executed(server: Server, kernel: Kernel) -> str:
    return f"{server.name}: {kernel.name} {kernel.id} was executed: {kernel.exec_reason}"


def libraries(case: Case) -> Iterator[Finding]:
    """Whether all libraries are preloaded that the settings of the keeper name."""
    if case.keeper is None:
        return
    there = [library.name for library in case.keeper.libraries if library.loaded]
    for library in case.keeper.libraries:
        if library.loaded is False:
            yield without_library(library.name, str(library.reason), there)
    if there:
        yield ok("libraries", f"kernels share {', '.join(there)}")


def without_library(name: str, reason: str, others: list[str]) -> Finding:
    """Return the finding that a library is not preloaded; `others` are those that can be."""
    return warning(
        "libraries",
        f"{name} is not preloaded: {reason}",
        setting("preload", ",".join(others))
        if others
        else f"remove {name} from LABKEEPER_PRELOAD in the settings of the keeper",
    )


def gateways(case: Case) -> Iterator[Finding]:
    """Whether the gateways of running servers are usable."""
    if case.keeper is None:
        return
    found = {server.gateway.url: server.gateway for server in case.keeper.servers if server.gateway}
    for gateway in found.values():
        if gateway.error is not None:
            yield gateway_problem(gateway.error.message)
    usable = [url for url, gateway in found.items() if gateway.reachable and not gateway.error]
    if usable:
        yield ok("gateway", f"{', '.join(sorted(usable))} can be used")


def gateway_problem(message: str) -> Finding:
    """Return the finding of a gateway's check, whose message ends with what to do next."""
    why, _, mend = message.rpartition("; ")
    return problem("gateway", why, mend)


def _word(server: Server) -> str:
    return shlex.quote(server.name)
