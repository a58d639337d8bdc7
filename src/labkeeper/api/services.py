"""The dependencies and limits of the API."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from labkeeper.api.concurrency import ConcurrencyLimit
from labkeeper.api.links import Links
from labkeeper.core.messages import EdgeUse, WebhookStatus
from labkeeper.core.policy import Policy
from labkeeper.core.ports import Backend, CullStatus, Probe
from labkeeper.core.server import GatewayHealth, OrphanedKernel, Sample, Snapshot
from labkeeper.core.spec import Gateway, QualifiedName
from labkeeper.core.usage import RecentUsage, UsageHistory
from labkeeper.events.log import EventLog
from labkeeper.identity.authenticators import Authenticator
from labkeeper.identity.sessions import Sessions
from labkeeper.identity.tokens import Tokens
from labkeeper.lab_addresses import LabAddresses
from labkeeper.metrics.collector import Metrics
from labkeeper.runtime import Keeper
from labkeeper.schema.requests.servers import Defaults


@dataclass(frozen=True, slots=True)
class SettingInForce:
    """A setting of the keeper as people may see it: the value of a secret is left out."""

    variable: str
    """Its environment variable."""
    value: str
    source: str
    """Where it comes from, in words."""
    is_default: bool = False


@dataclass(frozen=True, slots=True)
class Services:
    """The parts behind the API, supplied by the application's creator. Times in seconds."""

    keeper: Keeper
    backend: Backend
    probe: Probe
    orphans: Callable[[], Sequence[OrphanedKernel]]
    """Returns the kernels that gateways still have to end."""
    event_log: EventLog
    metrics: Metrics
    culler: CullStatus
    defaults: Defaults
    version: str
    tokens: Tokens
    sessions: Sessions
    authenticators: Sequence[Authenticator]
    """Tried in this order."""
    usage_history: Callable[[QualifiedName, float | None], UsageHistory]
    """Returns a server's usage since a time, None for an hour ago. Raises StoreError."""
    recent_usage: Callable[[Collection[QualifiedName], int], Mapping[QualifiedName, RecentUsage]]
    """Returns the last points of the servers that have any, as many as asked for, from memory."""
    url: str = "http://127.0.0.1:8000"
    """The keeper's URL as seen from its machine."""
    hosts: Collection[str] = ()
    """Host names of the keeper besides addresses and names without a dot; `*.example.org` includes
    all names below it, `*` any."""
    origins: Collection[str] = ()
    """Sites with CORS access, such as `https://hub.example.org`."""
    max_request_rate: float = 0.0
    """Requests per second and caller; 0: unlimited."""
    links: Links = field(default_factory=Links)
    failing: Callable[[], Mapping[str, str]] = dict
    """Returns why the last round of each failing watcher failed, by name."""
    webhooks: Callable[[], Sequence[WebhookStatus]] = tuple
    """Returns the state of the webhooks."""
    check_gateway: Callable[[Gateway], GatewayHealth] = lambda _: GatewayHealth(0.0)
    """Returns whether a gateway can be used; takes as long as that needs."""
    edge_use: Callable[[], EdgeUse | None] = lambda: None
    """Returns how the edge is used; None if there is none."""
    usage: Callable[[Snapshot], Sample | None] = lambda _: None
    """Returns a server's last usage sample without blocking."""
    advertised_host: str | None = None
    labs: LabAddresses = LabAddresses()  # noqa: RUF009 - frozen
    """Where the edge serves Labs."""
    start_wait: float = 65.0
    """Default wait for a start."""
    stop_wait: float = 15.0
    concurrency: ConcurrencyLimit = field(default_factory=lambda: ConcurrencyLimit(128))
    """Limit of callers that wait or stream; the WSGI server has more threads for others."""
    log_readers: threading.BoundedSemaphore = field(
        default_factory=lambda: threading.BoundedSemaphore(2)
    )
    """Limit of long logs read concurrently: each occupies a processor that callers share."""
    max_snooze: float = 86400.0
    """Longest postponement of culling by one call."""
    max_body: int = 1024 * 1024
    """Bytes of the largest request body."""
    policy: Policy = Policy()  # noqa: RUF009 - frozen
    settings: Sequence[SettingInForce] = ()
