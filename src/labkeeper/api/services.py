"""What the API speaks for, and by which numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from labkeeper.api.places import Places
from labkeeper.api.requests import Defaults
from labkeeper.core.model import KernelDebt, Sample, Snapshot, WebhookStatus
from labkeeper.core.ports import Backend, Explainer, History, Keeper, Meter, Probe


@dataclass(frozen=True, slots=True)
class Services:
    """The parts behind the API, put together by whoever makes the application. Times in seconds."""

    keeper: Keeper
    backend: Backend
    probe: Probe
    debts: Callable[[], Sequence[KernelDebt]]
    """Gives the kernels that gateways still have to end."""
    history: History
    meter: Meter
    culler: Explainer
    defaults: Defaults
    version: str
    token: str | None = field(repr=False)
    """The bearer token; None turns access control off."""
    webhooks: Callable[[], Sequence[WebhookStatus]] = tuple
    """Says how the webhooks fare."""
    usage: Callable[[Snapshot], Sample | None] = lambda _: None
    """Gives the last sample of what a server uses, at once."""
    advertised_host: str | None = None
    start_wait: float = 65.0
    """How long a start is waited for, when the caller does not say."""
    stop_wait: float = 15.0
    places: Places = field(default_factory=lambda: Places(256))
    """How many callers may wait or follow at a time; the WSGI server has more threads, so that quick requests stay quick."""
    max_snooze: float = 86400.0
    """For how long one call may put off the culling of a server."""
    max_body: int = 1024 * 1024
    """Bytes of the largest request body."""
