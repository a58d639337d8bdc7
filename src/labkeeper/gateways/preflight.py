"""Preflight check of gateways: a server is ready when it answers *and* its gateway is usable.

The check runs while the server starts, so a working gateway costs no time. A failed check ends the
start with its cause, unless the server does not require the gateway.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import structlog

from labkeeper.core.errors import BackendError
from labkeeper.core.messages import Ended, Ready, Report, Vetoed
from labkeeper.core.ports import Probe
from labkeeper.core.server import Endpoint, Failure, FailureClass, GatewayHealth, OwnKernel
from labkeeper.core.spec import Gateway, QualifiedName, ServerSpec
from labkeeper.gateways.client import GatewayClient
from labkeeper.threads import ThreadGroup

_log = structlog.get_logger("labkeeper.gateways.preflight")


@dataclass(slots=True, eq=False)
class _Start:
    """A launch whose server is not ready yet."""

    generation: int
    gateway: Gateway
    kernels: tuple[OwnKernel, ...]
    health: GatewayHealth | None = None
    """Result of the check; None until the gateway has answered."""
    ready: Ready | None = None
    """The backend's report, if it came before the gateway's answer."""


class GatewayPreflight:
    """See `core.ports.GatewayPreflight`. Filters a backend's reports. Thread-safe."""

    def __init__(
        self,
        tell: Callable[[Report], object],
        *,
        threads: ThreadGroup,
        client: GatewayClient,
        probe: Probe,
    ) -> None:
        self._tell = tell
        self._threads = threads
        self._client = client
        self._probe = probe
        self._starts: dict[QualifiedName, _Start] = {}
        self._lock = threading.Lock()

    def begin(self, spec: ServerSpec, generation: int, kernels: Sequence[OwnKernel]) -> None:
        """Start to check a launch's gateway. Raises BackendUnavailable if that is impossible."""
        with self._lock:
            self._starts.pop(spec.qualified_name, None)
        if spec.gateway is None:
            return
        start = _Start(generation, spec.gateway, tuple(kernels))
        self._threads.start(
            f"preflight-{spec.qualified_name}", self._check, spec.qualified_name, start
        )
        # Nothing is launched yet, so no report can precede this entry.
        with self._lock:
            self._starts[spec.qualified_name] = start

    def receive(self, report: Report) -> None:
        """Pass on a report of the backend; hold back `Ready` until the gateway is found usable."""
        with self._lock:
            start = self._starts.get(report.name)
            if start is None or start.generation != report.generation:
                start = None
            elif isinstance(report.fact, Ended):
                del self._starts[report.name]
            elif isinstance(report.fact, Ready):
                start.ready = report.fact
        if start is not None and isinstance(report.fact, Ready):
            self._admit(report.name, start)
        else:
            self._tell(report)

    def _check(self, name: QualifiedName, start: _Start) -> None:
        try:
            health = self._client.check(start.gateway)
        except BackendError as error:
            sentence = f"cannot start server '{name}': {error.message}"
            self._tell(
                Report(name, start.generation, Vetoed(Failure(FailureClass.OTHER, sentence)))
            )
            return
        if health.error is not None and start.gateway.required:
            sentence = (
                f"cannot start server '{name}': {health.error.message} "
                "(require_gateway: false starts it all the same)"
            )
            self._tell(Report(name, start.generation, Vetoed(Failure(health.error.kind, sentence))))
            return
        with self._lock:
            start.health = health
        self._admit(name, start)

    def _admit(self, name: QualifiedName, start: _Start) -> None:
        """Report a ready server whose gateway was checked, after handing over its old kernels."""
        with self._lock:
            ready, health = start.ready, start.health
            if ready is None or health is None or self._starts.get(name) is not start:
                return
            del self._starts[name]
        missed = tuple(
            kernel.id
            for kernel in start.kernels
            if not (health.reachable and self._hand_over(name, start, ready.endpoint, kernel))
        )
        self._tell(
            Report(name, start.generation, replace(ready, gateway=health, not_taken_over=missed))
        )

    def _hand_over(
        self, name: QualifiedName, start: _Start, endpoint: Endpoint, kernel: OwnKernel
    ) -> bool:
        """Hand a server an earlier launch's kernel; return whether it was taken or is gone."""
        try:
            if not self._client.has_kernel(start.gateway, kernel.id):
                # A kernel that was still starting may appear later, and would have no owner.
                return not kernel.starting
            self._probe.take_over(endpoint, kernel)
        except BackendError as error:
            _log.warning(
                "a kernel cannot be taken over",
                server=name,
                generation=start.generation,
                kernel=kernel.id,
                gateway=start.gateway.url,
                error=error.message,
            )
            return False
        return True
