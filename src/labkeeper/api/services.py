"""What the API speaks for, and by which numbers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from labkeeper.api.concurrency import ConcurrencyLimit
from labkeeper.api.links import Links
from labkeeper.core.messages import WebhookStatus
from labkeeper.core.ports import Backend, CullStatus, History, Keeper, Meter, Probe
from labkeeper.core.server import OrphanedKernel, Sample, Snapshot
from labkeeper.identity.authenticators import Authenticator, Credentials
from labkeeper.identity.peers import Peer
from labkeeper.identity.tokens import Tokens
from labkeeper.schema.servers import Defaults


@dataclass(frozen=True, slots=True)
class Services:
    """The parts behind the API, put together by whoever makes the application. Times in seconds."""

    keeper: Keeper
    backend: Backend
    probe: Probe
    orphans: Callable[[], Sequence[OrphanedKernel]]
    """Gives the kernels that gateways still have to end."""
    history: History
    meter: Meter
    culler: CullStatus
    defaults: Defaults
    version: str
    tokens: Tokens
    authenticators: Sequence[Authenticator]
    """Asked in this order."""
    url: str = "http://127.0.0.1:8000"
    """Where the keeper answers, as seen from its machine."""
    hosts: Collection[str] = ()
    """Names that lead to the keeper, beside addresses and names without a dot; `*.example.org` is all below it, `*` any."""
    origins: Collection[str] = ()
    """Sites whose pages may ask, as `https://hub.example.org`."""
    max_request_rate: float = 0.0
    """Requests a second and caller; 0: any number."""
    links: Links = field(default_factory=Links)
    failing: Callable[[], Mapping[str, str]] = dict
    """Says why the last round of a watcher failed, by the watcher's name."""
    webhooks: Callable[[], Sequence[WebhookStatus]] = tuple
    """Says how the webhooks fare."""
    usage: Callable[[Snapshot], Sample | None] = lambda _: None
    """Gives the last sample of what a server uses, at once."""
    advertised_host: str | None = None
    start_wait: float = 65.0
    """How long a start is waited for, when the caller does not say."""
    stop_wait: float = 15.0
    concurrency: ConcurrencyLimit = field(default_factory=lambda: ConcurrencyLimit(256))
    """How many callers may wait or stream at once; the WSGI server has more threads, so that quick requests stay quick."""
    log_readers: threading.BoundedSemaphore = field(default_factory=lambda: threading.BoundedSemaphore(2))
    """How many long logs are read at once: reading them takes a processor, which all callers share."""
    max_snooze: float = 86400.0
    """For how long one call may put off the culling of a server."""
    max_body: int = 1024 * 1024
    """Bytes of the largest request body."""

    def may_know(self, authorization: str | None, peer: Peer | None) -> bool:
        """Whether a request may be of a known caller, as far as that can be told without blocking; else its body is dropped."""
        shown = Credentials(authorization, peer)
        return any(authenticator.may_accept(shown) for authenticator in self.authenticators)
