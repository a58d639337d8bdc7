"""Checks of what others reach, and what the keeper reaches: ports, the edge, gateways."""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import shlex
import socket
import ssl
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import psutil

from labkeeper import discovery
from labkeeper.backends.local.ports import hold_port
from labkeeper.backends.local.processes import carries
from labkeeper.bounded_http import exchange
from labkeeper.core.errors import BackendRefused, InvalidSpec, SettingsError
from labkeeper.core.server import FailureClass
from labkeeper.doctor import asked
from labkeeper.doctor.case import Case, default_spec
from labkeeper.doctor.findings import Finding, ok, problem, setting, skipped
from labkeeper.forkserver.marks import MARK
from labkeeper.gateways.client import GatewayClient
from labkeeper.runtime import SystemClock
from labkeeper.serve.edge.instances import EdgeError, Instances
from labkeeper.serve.listening import listen
from labkeeper.serve.process import only_keeper

_WITHIN: Final = 5.0
"""Seconds in which the public address must answer."""
_EDGE: Final = "labkeeper.edge"


def ports(case: Case) -> Iterator[Finding]:
    """Whether the port of the API and the one of the server named `default` can be had."""
    if case.keeper is None:
        yield _api_port(case)
    else:
        yield ok("ports", f"the API is at {case.keeper.url}")
    at_work = case.keeper.servers if case.keeper else ()
    if not any(server.port == case.settings.lab_port for server in at_work):
        yield from _lab_port(case)


def _api_port(case: Case) -> Finding:
    host, port = case.settings.host, case.settings.port
    try:
        listen(host, port).close()
    except SettingsError as error:
        why, cause = error.message.partition("; ")[0], error.__cause__
        number = cause.errno if isinstance(cause, OSError) else None
        if number not in {errno.EADDRINUSE, errno.EACCES}:
            return problem("ports", why, setting("host", "127.0.0.1"))
        holder = _holder(port) if number == errno.EADDRINUSE else None
        if holder is not None and _is_edge(holder, case.settings.state_dir):
            return ok("ports", f"port {port} is held by our edge, which the next keeper takes over")
        return problem("ports", why + _by(holder), setting("port", _free_port(host)))
    return ok("ports", f"port {port} on {host} is free for the API")


def _lab_port(case: Case) -> Iterator[Finding]:
    """Whether the server named `default` can have its port."""
    port = case.settings.lab_port
    try:
        hold_port(default_spec(case.settings)).close()
    except InvalidSpec:
        yield skipped("ports", "the port of the server named `default`: see notebook directory")
    except BackendRefused as error:
        yield _no_lab_port(case, error)
    else:
        yield ok("ports", f"port {port} is free for the server named `default`")


def _no_lab_port(case: Case, error: BackendRefused) -> Finding:
    port, ip, cause = case.settings.lab_port, case.settings.lab_ip, error.__cause__
    in_use = error.details.get("failure_class") == FailureClass.PORT_IN_USE
    holder = _holder(port) if in_use else None
    if holder is not None and _is_server(holder, case.settings.server_dirs):
        return ok("ports", f"port {port} is held by a server, which the next keeper takes over")
    fits = in_use or isinstance(cause, PermissionError)
    mend = setting("lab_port", _free_port(ip)) if fits else setting("lab_ip", "127.0.0.1")
    return problem("ports", error.message.partition("; ")[0] + _by(holder), mend)


def _by(holder: psutil.Process | None) -> str:
    if holder is None:
        return ""
    with contextlib.suppress(psutil.Error):
        return f" (process {holder.pid}, {holder.name()}, holds it)"
    return ""


def _free_port(host: str) -> int:
    """Return a free port on an address, or on any if it cannot be used."""
    for address in (host, ""):
        with contextlib.suppress(OSError):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            with socket.create_server((address, 0), family=family) as free:
                return int(free.getsockname()[1])
    return 8000


def _holder(port: int) -> psutil.Process | None:
    """Return the process that listens on a port, as far as this user may see it."""
    with contextlib.suppress(psutil.Error, OSError):
        for found in psutil.net_connections(kind="tcp"):
            if found.status == psutil.CONN_LISTEN and found.laddr[1:] == (port,) and found.pid:
                return psutil.Process(found.pid)
    return None


def _is_edge(process: psutil.Process, state_dir: Path) -> bool:
    """Whether a process is an edge of a state directory."""
    with contextlib.suppress(psutil.Error, OSError):
        is_ours = Path(process.cwd()).is_relative_to((state_dir / "edge").resolve())
        return is_ours and _EDGE in process.cmdline()
    return False


def _is_server(process: psutil.Process, server_dirs: Path) -> bool:
    """Whether a process belongs to a server of a runtime directory."""
    with contextlib.suppress(OSError):
        mark = os.fsdecode(carries(process.pid, MARK))
        return Path(mark).is_relative_to(server_dirs.resolve())
    return False


def edge(case: Case) -> Iterator[Finding]:
    """Whether the edge answers, or can be started."""
    if case.settings.edge == "off":
        yield ok("edge", "it is off: the keeper itself listens, for development")
    elif case.keeper is not None:
        yield _answering(case, discovery.read_address(case.settings.state_dir) or case.keeper.url)
    elif sys.platform == "linux":
        yield _started(case)


def _answering(case: Case, url: str) -> Finding:
    """Ask at the public address whether the keeper lives; its certificate may be for any name."""
    parts = urlsplit(url)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    host, port = parts.hostname or "", parts.port
    made = (
        http.client.HTTPSConnection(host, port, timeout=_WITHIN, context=context)
        if parts.scheme == "https"
        else http.client.HTTPConnection(host, port, timeout=_WITHIN)
    )
    try:
        with contextlib.closing(made) as connection:
            answer = exchange(connection, "GET", "/healthz", headers={}, within=_WITHIN)
    except (OSError, http.client.HTTPException) as error:
        why = f"the keeper runs, but {url} does not answer: {error or type(error).__name__}"
        return problem("edge", why, _look_at_log(case))
    if answer.status != http.client.OK:
        return problem("edge", f"{url} answers with {answer.status}", _look_at_log(case))
    return ok("edge", f"it answers at {url}")


def _look_at_log(case: Case) -> str:
    return f"tail {shlex.quote(str(case.settings.state_dir / 'logs' / '_edge.log'))}"


def _started(case: Case) -> Finding:
    """Start an edge as a keeper would, on another port and in another directory, and end it."""
    with tempfile.TemporaryDirectory(prefix="labkeeper-doctor-") as place:
        state_dir = Path(place)
        log = state_dir / "logs" / "_edge.log"
        with (
            only_keeper(state_dir, "state directory", "LABKEEPER_STATE_DIR"),
            listen("127.0.0.1", 0) as public,
        ):
            instances = Instances(
                state_dir,
                state_dir / "run",
                ("127.0.0.1", public.getsockname()[1]),
                secure=case.settings.certificate is not None,
            )
            try:
                instances.find()
                link = instances.start(public)
            except (EdgeError, OSError) as error:
                why = str(error).partition(" (log: ")[0]
                lines = log.read_text(errors="replace").splitlines()[-5:] if log.exists() else []
                return problem("edge", why, _reachable(), lines)
            link.close_public()
            instances.bury(link, kill=True)
    return ok("edge", "it can be started")


def _reachable() -> str:
    """Return what lets the edge's user read our program, the usual obstacle for a root keeper."""
    package = shlex.quote(str(Path(discovery.__file__).parent))
    return f"chmod -R a+rX {package}"


def gateway(case: Case) -> Iterator[Finding]:
    """Whether a gateway that is to be used can be, and those of servers are."""
    yield from asked.gateways(case)
    if case.gateway is None:
        return
    client = GatewayClient(SystemClock(), timeout=case.settings.gateway_timeout)
    health = client.check(case.gateway)
    if health.error is None:
        count = health.kernelspecs
        yield ok("gateway", f"{case.gateway.url} answers, with {count} kernelspecs")
    elif health.error.kind == FailureClass.GATEWAY_REFUSED and case.gateway.auth_token is None:
        url = shlex.quote(case.gateway.url)
        yield problem(
            "gateway",
            health.error.message.rpartition("; ")[0],
            f"labkeeper doctor --gateway {url} --gateway-token-file -",
        )
    else:
        yield asked.gateway_problem(health.error.message)
