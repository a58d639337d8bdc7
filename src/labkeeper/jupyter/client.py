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
from labkeeper.core.server import (
    Activity,
    Endpoint,
    Kernel,
    KernelUse,
    Load,
    OwnKernel,
    TerminalUse,
)

_LOOK_TIMEOUT: Final = 1.0
"""Timeout in seconds of a liveness probe.

A termination may wait behind it, so it is shorter than any grace period.
"""


_END_KERNEL_TIMEOUT: Final = 10.0
"""Seconds for a kernel to end; Jupyter gives an unresponsive one five."""


_LONGEST_REASON: Final = 300
"""Characters of an `exec_reason`, which the server's user can write."""


class _KernelModel(BaseModel):
    model_config = ConfigDict(defer_build=True)

    id: str
    name: str
    execution_state: str = "unknown"
    last_activity: str = ""
    connections: int = 0
    # Labkeeper's own additions to Jupyter's model. Whatever they are, the kernel is listed.
    launched_by: Any = None
    exec_reason: Any = None

    @property
    def kernel(self) -> Kernel:
        """The kernel, without additions that have an unknown value."""
        has_reason = self.launched_by == "exec" and isinstance(self.exec_reason, str)
        return Kernel(
            self.id,
            self.name,
            self.execution_state,
            self.last_activity,
            self.connections,
            launched_by=self.launched_by if self.launched_by in ("fork", "exec") else None,
            exec_reason=self.exec_reason[:_LONGEST_REASON] if has_reason else None,
        )


class _TerminalModel(BaseModel):
    model_config = ConfigDict(defer_build=True)

    name: str
    last_activity: str = ""


class _StatusModel(BaseModel):
    model_config = ConfigDict(defer_build=True)

    last_activity: str
    kernels: int
    connections: int


_LAZY: Final = ConfigDict(defer_build=True)


_KERNELS: Final = TypeAdapter(list[_KernelModel], config=_LAZY)


_TERMINALS: Final = TypeAdapter(list[_TerminalModel], config=_LAZY)


_UNTRACKED: Final = "?no_track_activity=1"
"""Keeps a request from counting as activity."""


class JupyterClient:
    """Client of running servers, over loopback or their listening address. Thread-safe."""

    def __init__(self, *, timeout: float = 3.0) -> None:
        self._timeout = timeout

    def answers(self, endpoint: Endpoint) -> bool | None:
        """Whether the server is alive; None if it could not be asked.

        `GET api` needs no token and involves no gateway.
        """
        with _connection(endpoint) as connection:
            return _ok(connection, endpoint, "api", {})

    def proves(self, endpoint: Endpoint) -> bool:
        """Whether the server is alive and knows its token.

        `GET api/me` needs a token, and involves no gateway either.
        """
        with _connection(endpoint) as connection:
            known = {"Authorization": f"token {endpoint.token}"}
            return bool(
                _ok(connection, endpoint, "api", {}) and _ok(connection, endpoint, "api/me", known)
            )

    def kernels(self, endpoint: Endpoint) -> list[Kernel]:
        """Return the server's kernels, without counting as activity.

        Raises BackendUnavailable, BackendTimeout.
        """
        with _failing(f"cannot list the kernels of the server on port {endpoint.port}"):
            found = _KERNELS.validate_json(self._told(endpoint, "api/kernels"))
        return [model.kernel for model in found]

    def load(self, endpoint: Endpoint) -> Load:
        """Return the number of kernels and connections, without counting as activity.

        `GET api/status` may wait for a gateway. Raises BackendUnavailable, BackendTimeout.
        """
        with _failing(
            f"cannot ask the server on port {endpoint.port} for its kernels and connections"
        ):
            status = _StatusModel.model_validate_json(self._told(endpoint, "api/status"))
        return Load(status.kernels, status.connections)

    def activity(self, endpoint: Endpoint) -> Activity:
        """Return the server's activity, without counting as activity.

        Raises BackendUnavailable, BackendTimeout.
        """
        with _failing(f"cannot ask the server on port {endpoint.port} how it is used"):
            status = _StatusModel.model_validate_json(self._told(endpoint, "api/status"))
            kernels = (
                _KERNELS.validate_json(self._told(endpoint, "api/kernels"))
                if status.kernels
                else []
            )
            # A server without terminals lacks this route.
            terminals = _TERMINALS.validate_json(
                self._told(endpoint, "api/terminals", absent=b"[]")
            )
        return Activity(
            _epoch(status.last_activity),
            tuple(
                KernelUse(k.id, k.execution_state, _epoch(k.last_activity), k.connections)
                for k in kernels
            ),
            tuple(TerminalUse(t.name, _epoch(t.last_activity)) for t in terminals),
        )

    def end_kernel(self, endpoint: Endpoint, kernel_id: str) -> None:
        """End a kernel, without counting as activity. Raises BackendUnavailable, BackendTimeout."""
        self._command(endpoint, kernel_id, "end", "DELETE", _UNTRACKED)

    def interrupt_kernel(self, endpoint: Endpoint, kernel_id: str) -> None:
        """Interrupt what a kernel executes. Raises BackendUnavailable, BackendTimeout."""
        self._command(endpoint, kernel_id, "interrupt", "POST", "/interrupt")

    def restart_kernel(self, endpoint: Endpoint, kernel_id: str) -> None:
        """End a kernel and begin it again. Raises BackendUnavailable, BackendTimeout."""
        self._command(endpoint, kernel_id, "restart", "POST", "/restart")

    def _command(
        self, endpoint: Endpoint, kernel_id: str, what: str, method: str, suffix: str
    ) -> None:
        """Command a kernel if it exists. Raises BackendUnavailable, BackendTimeout."""
        with _failing(f"cannot {what} kernel {kernel_id} of the server on port {endpoint.port}"):
            path = f"api/kernels/{kernel_id}{suffix}"
            answer = self._ask(method, endpoint, path, timeout=_END_KERNEL_TIMEOUT)
            done = {http.client.OK, http.client.NO_CONTENT, http.client.NOT_FOUND}
            if answer.status not in done:
                raise BackendUnavailable(f"it answered {answer.status}")

    def shutdown(self, endpoint: Endpoint, *, timeout: float) -> bool:
        """Ask the server to end its kernels and itself; return whether it confirmed that."""
        try:
            answer = self._ask("POST", endpoint, "api/shutdown", timeout=timeout)
        except (OSError, http.client.HTTPException):
            return False
        return answer.status == http.client.OK

    def take_over(self, endpoint: Endpoint, kernel: OwnKernel) -> None:
        """Hand the server a kernel that already runs on its gateway, with its sessions.

        Raises BackendUnavailable, BackendTimeout.
        """
        asked: list[tuple[str, dict[str, Any]]] = [("api/kernels", {"kernel_id": kernel.id})]
        asked += [
            ("api/sessions", {**asdict(session), "kernel": {"id": kernel.id}})
            for session in kernel.sessions
        ]
        with _failing(f"the server on port {endpoint.port} cannot take over kernel {kernel.id}"):
            for path, body in asked:
                answer = self._ask("POST", endpoint, path, body=body)
                if answer.status != http.client.CREATED:
                    raise BackendUnavailable(f"it answered {answer.status}")

    def _told(self, endpoint: Endpoint, path: str, *, absent: bytes | None = None) -> bytes:
        """Return the body of an answer, or `absent` for status 404.

        Raises as `_ask` does, and BackendUnavailable.
        """
        answer = self._ask("GET", endpoint, path + _UNTRACKED)
        if answer.status == http.client.NOT_FOUND and absent is not None:
            return absent
        if answer.status != http.client.OK:
            because = (
                "its gateway is not reachable"
                if answer.status == http.client.SERVICE_UNAVAILABLE
                else ""
            )
            raise BackendUnavailable(f"it answered {answer.status} {because}".rstrip())
        return answer.body

    def _ask(
        self,
        method: str,
        endpoint: Endpoint,
        path: str,
        *,
        timeout: float | None = None,
        body: Any = None,
    ) -> Answer:
        """Send a request with the token. Raises OSError (or TimeoutError), HTTPException."""
        patience = self._timeout if timeout is None else timeout
        known = {"Authorization": f"token {endpoint.token}"}
        with _connection(endpoint, patience) as connection:
            return exchange(
                connection,
                method,
                endpoint.base_url + path,
                headers=known,
                within=patience,
                body=body,
            )


@contextmanager
def _failing(what: str) -> Iterator[None]:
    """Translate all failures of a request into BackendTimeout or BackendUnavailable."""
    try:
        yield
    except TimeoutError as error:
        raise BackendTimeout(f"{what}: it did not answer in time") from error
    except BackendUnavailable as error:
        raise BackendUnavailable(f"{what}: {error.message}") from error
    except (OSError, http.client.HTTPException, ValidationError) as error:
        raise BackendUnavailable(f"{what}: {type(error).__name__}") from error


def _epoch(instant: str) -> float | None:
    """Return a time of Jupyter's in seconds since the epoch; None if it is invalid."""
    try:
        return datetime.fromisoformat(instant).timestamp()
    except ValueError:
        return None


def _connection(
    endpoint: Endpoint, timeout: float = _LOOK_TIMEOUT
) -> closing[http.client.HTTPConnection]:
    host = addresses.from_here(endpoint.hostname)
    if not endpoint.secure:
        return closing(http.client.HTTPConnection(host, endpoint.port, timeout=timeout))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Pid and token identify the server; its certificate adds nothing.
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return closing(
        http.client.HTTPSConnection(host, endpoint.port, timeout=timeout, context=context)
    )


def _ok(
    connection: http.client.HTTPConnection,
    endpoint: Endpoint,
    path: str,
    headers: Mapping[str, str],
) -> bool | None:
    """Whether the answer is 200; None if the keeper lacked resources to ask."""
    try:
        answer = exchange(
            connection, "GET", endpoint.base_url + path, headers=headers, within=_LOOK_TIMEOUT
        )
    except (OSError, http.client.HTTPException) as error:
        return None if shortage.is_ours(error) else False
    return answer.status == http.client.OK
