"""The gate that every start passes: a server with a gateway is ready when it answers *and* its gateway can be used.

The gateway is asked while the server starts, so a good one costs nothing. A bad one ends the start, with its cause; unless the
server does not require it.
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
from labkeeper.core.spec import Gateway, ServerName, ServerSpec
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
    """What was found out; None as long as the gateway has not answered."""
    ready: Ready | None = None
    """What the backend said, before the gateway had answered."""


class GatewayPreflight:
    """See `core.ports.GatewayPreflight`. Stands between a backend and whoever hears its reports. Thread-safe."""

    def __init__(self, tell: Callable[[Report], None], *, threads: ThreadGroup, client: GatewayClient, probe: Probe) -> None:
        self._tell = tell
        self._threads = threads
        self._client = client
        self._probe = probe
        self._starts: dict[ServerName, _Start] = {}
        self._lock = threading.Lock()

    def begin(self, spec: ServerSpec, generation: int, kernels: Sequence[OwnKernel]) -> None:
        """Begin to ask the gateway of a launch. Raises BackendUnavailable where we cannot."""
        with self._lock:
            self._starts.pop(spec.name, None)
        if spec.gateway is None:
            return
        start = _Start(generation, spec.gateway, tuple(kernels))
        self._threads.start(f"preflight-{spec.name}", self._check, spec.name, start)
        # Nothing is launched yet, so nothing can be heard of it before it stands here.
        with self._lock:
            self._starts[spec.name] = start

    def receive(self, report: Report) -> None:
        """Take a report of the backend, and pass it on: `Ready` only when the gateway has been found fit."""
        with self._lock:
            start = self._starts.get(report.name)
            if start is None or start.generation != report.generation:
                start = None
            elif isinstance(report.fact, Ended):
                del self._starts[report.name]
            elif isinstance(report.fact, Ready):
                start.ready = report.fact
                if start.health is None:
                    return
        if start is not None and isinstance(report.fact, Ready):
            self._admit(report.name, start)
        else:
            self._tell(report)

    def _check(self, name: ServerName, start: _Start) -> None:
        try:
            health = self._client.check(start.gateway)
        except BackendError as error:
            sentence = f"cannot start server '{name}': {error.message}"
            self._tell(Report(name, start.generation, Vetoed(Failure(FailureClass.OTHER, sentence))))
            return
        if health.error is not None and start.gateway.required:
            sentence = f"cannot start server '{name}': {health.error.message} (require_gateway: false starts it all the same)"
            self._tell(Report(name, start.generation, Vetoed(Failure(health.error.kind, sentence))))
            return
        with self._lock:
            start.health = health
            waited = start.ready is not None
        if waited:
            self._admit(name, start)

    def _admit(self, name: ServerName, start: _Start) -> None:
        """Let a server through that is ready, with the kernels that it is to have."""
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
        self._tell(Report(name, start.generation, replace(ready, gateway=health, not_taken_over=missed)))

    def _hand_over(self, name: ServerName, start: _Start, endpoint: Endpoint, kernel: OwnKernel) -> bool:
        """Hand a server a kernel of its earlier launch; return whether it has the kernel, or the kernel is gone."""
        try:
            if not self._client.has_kernel(start.gateway, kernel.id):
                # One that was still starting may come yet, and would be nobody's.
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
