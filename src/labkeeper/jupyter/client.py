"""HTTP requests to a running Jupyter server.

Source: jupyter_server 2.x (`services/`).
"""

from __future__ import annotations

import http.client
import ssl
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict
from datetime import datetime
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from labkeeper import addresses, shortage
from labkeeper.bounded_http import Answer, exchange
from labkeeper.core.errors import BackendTimeout, BackendUnavailable
from labkeeper.core.server import Activity, Endpoint, Kernel, KernelUse, Load, OwnKernel, TerminalUse

_LOOK_TIMEOUT: Final = 1.0
"""Seconds for a look at whether a server answers; what is to end it may wait behind it, so it is shorter than any grace."""


_END_KERNEL_TIMEOUT: Final = 10.0
"""Seconds for a kernel to end; Jupyter gives one that does not listen five."""


class _KernelModel(BaseModel):
    model_config = ConfigDict(extra="ignore")

    id: str
    name: str
    execution_state: str = "unknown"
    last_activity: str = ""
    connections: int = 0


class _TerminalModel(BaseModel):
    model_config = ConfigDict(extra="ignore")

    name: str
    last_activity: str = ""


class _StatusModel(BaseModel):
    model_config = ConfigDict(extra="ignore")

    last_activity: str
    kernels: int
    connections: int


_LAZY: Final = ConfigDict(defer_build=True)


_KERNELS: Final = TypeAdapter(list[_KernelModel], config=_LAZY)


_TERMINALS: Final = TypeAdapter(list[_TerminalModel], config=_LAZY)


_STATUS: Final = TypeAdapter(_StatusModel)


_UNTRACKED: Final = "?no_track_activity=1"
"""With this a question is no activity."""


class JupyterClient:
    """Speaks to running servers over loopback or the address that they listen on. Thread-safe."""

    def __init__(self, *, timeout: float = 3.0) -> None:
        self._timeout = timeout

    def answers(self, endpoint: Endpoint) -> bool | None:
        """Whether it is alive, None where we could not ask: `GET api` needs no token and touches no gateway."""
        with _connection(endpoint) as connection:
            return _ok(connection, endpoint, "api", {})

    def proves(self, endpoint: Endpoint) -> bool:
        """Whether it is alive and knows its token: `GET api/me` needs one, and touches no gateway either."""
        with _connection(endpoint) as connection:
            known = {"Authorization": f"token {endpoint.token}"}
            return bool(_ok(connection, endpoint, "api", {}) and _ok(connection, endpoint, "api/me", known))

    def kernels(self, endpoint: Endpoint) -> list[Kernel]:
        """List its kernels, without counting as activity. Raises BackendUnavailable, BackendTimeout."""
        with _failing(f"cannot list the kernels of the server on port {endpoint.port}"):
            found = _KERNELS.validate_json(self._told(endpoint, "api/kernels"))
        return [Kernel(k.id, k.name, k.execution_state, k.last_activity) for k in found]

    def load(self, endpoint: Endpoint) -> Load:
        """Return how many kernels and connections it has: `GET api/status`, which is no activity, and may wait for a gateway."""
        with _failing(f"cannot ask the server on port {endpoint.port} for its kernels and connections"):
            status = _STATUS.validate_json(self._told(endpoint, "api/status"))
        return Load(status.kernels, status.connections)

    def activity(self, endpoint: Endpoint) -> Activity:
        """Ask how it is used, without counting as use. Raises BackendUnavailable, BackendTimeout."""
        with _failing(f"cannot ask the server on port {endpoint.port} how it is used"):
            status = _STATUS.validate_json(self._told(endpoint, "api/status"))
            kernels = _KERNELS.validate_json(self._told(endpoint, "api/kernels")) if status.kernels else []
            # A server without terminals has no such page.
            terminals = _TERMINALS.validate_json(self._told(endpoint, "api/terminals", absent=b"[]"))
        return Activity(
            _epoch(status.last_activity),
            tuple(KernelUse(k.id, k.execution_state, _epoch(k.last_activity), k.connections) for k in kernels),
            tuple(TerminalUse(t.name, _epoch(t.last_activity)) for t in terminals),
        )

    def end_kernel(self, endpoint: Endpoint, kernel_id: str) -> None:
        """End one of its kernels, without counting as use. Raises BackendUnavailable, BackendTimeout."""
        with _failing(f"cannot end kernel {kernel_id} of the server on port {endpoint.port}"):
            path = f"api/kernels/{kernel_id}{_UNTRACKED}"
            answer = self._ask("DELETE", endpoint, path, timeout=_END_KERNEL_TIMEOUT)
            if answer.status not in {http.client.NO_CONTENT, http.client.NOT_FOUND}:
                raise BackendUnavailable(f"it answered {answer.status}")

    def shutdown(self, endpoint: Endpoint, *, timeout: float) -> bool:
        """Ask it to end with its kernels; it answers when that is done. Says whether it did."""
        try:
            answer = self._ask("POST", endpoint, "api/shutdown", timeout=timeout)
        except (OSError, http.client.HTTPException):
            return False
        return answer.status == http.client.OK

    def take_over(self, endpoint: Endpoint, kernel: OwnKernel) -> None:
        """Hand over a kernel that already runs on its gateway, with its sessions. Raises BackendUnavailable, BackendTimeout."""
        asked: list[tuple[str, dict[str, Any]]] = [("api/kernels", {"kernel_id": kernel.id})]
        asked += [("api/sessions", {**asdict(session), "kernel": {"id": kernel.id}}) for session in kernel.sessions]
        what = f"the server on port {endpoint.port} cannot take over kernel {kernel.id}"
        for path, body in asked:
            try:
                answer = self._ask("POST", endpoint, path, body=body)
            except TimeoutError as error:
                raise BackendTimeout(f"{what}: it did not answer in time") from error
            except (OSError, http.client.HTTPException) as error:
                raise BackendUnavailable(f"{what}: {type(error).__name__}") from error
            if answer.status != http.client.CREATED:
                raise BackendUnavailable(f"{what}: it answered {answer.status}")

    def _told(self, endpoint: Endpoint, path: str, *, absent: bytes | None = None) -> bytes:
        """Return what a page says, or `absent` where there is no such page. Raises as `_ask` does, and BackendUnavailable."""
        answer = self._ask("GET", endpoint, path + _UNTRACKED)
        if answer.status == http.client.NOT_FOUND and absent is not None:
            return absent
        if answer.status != http.client.OK:
            because = "its gateway is not reachable" if answer.status == http.client.SERVICE_UNAVAILABLE else ""
            raise BackendUnavailable(f"it answered {answer.status} {because}".rstrip())
        return answer.body

    def _ask(self, method: str, endpoint: Endpoint, path: str, *, timeout: float | None = None, body: Any = None) -> Answer:
        """Show the token and ask. Raises OSError, of which TimeoutError is one, and HTTPException."""
        patience = self._timeout if timeout is None else timeout
        known = {"Authorization": f"token {endpoint.token}"}
        with _connection(endpoint, patience) as connection:
            return exchange(connection, method, endpoint.base_url + path, headers=known, within=patience, body=body)


@contextmanager
def _failing(what: str) -> Iterator[None]:
    """Make of all that can go wrong with a question the error that says so."""
    try:
        yield
    except TimeoutError as error:
        raise BackendTimeout(f"{what}: it did not answer in time") from error
    except BackendUnavailable as error:
        raise BackendUnavailable(f"{what}: {error.message}") from error
    except (OSError, http.client.HTTPException, ValidationError) as error:
        raise BackendUnavailable(f"{what}: {type(error).__name__}") from error


def _epoch(instant: str) -> float | None:
    """Read a time of Jupyter's; None where it is none."""
    try:
        return datetime.fromisoformat(instant).timestamp()
    except ValueError:
        return None


def _connection(endpoint: Endpoint, timeout: float = _LOOK_TIMEOUT) -> closing[http.client.HTTPConnection]:
    host = addresses.from_here(endpoint.hostname)
    if not endpoint.secure:
        return closing(http.client.HTTPConnection(host, endpoint.port, timeout=timeout))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # It is known by its pid and its token; its certificate says nothing more.
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return closing(http.client.HTTPSConnection(host, endpoint.port, timeout=timeout, context=context))


def _ok(connection: http.client.HTTPConnection, endpoint: Endpoint, path: str, headers: Mapping[str, str]) -> bool | None:
    """Whether a page is given; None where we could not ask for it."""
    try:
        answer = exchange(connection, "GET", endpoint.base_url + path, headers=headers, within=_LOOK_TIMEOUT)
    except (OSError, http.client.HTTPException) as error:
        return None if shortage.is_ours(error) else False
    return answer.status == http.client.OK
