"""Webhooks: each history entry is posted to a URL, signed, in order, until accepted or given up.

The format is Standard Webhooks (standardwebhooks.com): the headers `webhook-id`,
`webhook-timestamp` and `webhook-signature`, an HMAC-SHA256 over both and the body. An entry may be
delivered twice, then with the same id.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import urlsplit

import structlog

from labkeeper import addresses
from labkeeper.core.errors import StoreError
from labkeeper.core.messages import HistoryEntry, WebhookStatus
from labkeeper.core.ports import Clock
from labkeeper.events.log import EventLog
from labkeeper.threads import ThreadGroup

if TYPE_CHECKING:
    import httpx

_TIMEOUT: Final = 10.0
"""Seconds for one POST."""
_FIRST_PAUSE: Final = 1.0
"""Delay in seconds after a failed POST; doubled each time."""
_LONGEST_PAUSE: Final = 300.0
_GIVEN_UP_AFTER: Final = 86400.0
"""Seconds after which an undelivered entry is dead."""
_PIECES: Final = 3
"""Chunks of a response body to read. Its content does not matter."""
_LOOK_EVERY: Final = 0.5
_PAGE: Final = 100
_LAST_WORDS: Final = 2.0
"""Seconds for pending entries when the keeper ends, if the receiver was responsive before."""
_LATER: Final = frozenset({408, 425, 429})
"""Temporary client errors; any other 4xx is permanent."""
_KEY_BYTES: Final = range(24, 65)
"""As required by Standard Webhooks."""
_KEY_PREFIX: Final = "whsec_"

_log = structlog.get_logger("labkeeper.events.webhooks")


class WebhookStore(Protocol):
    """Where a keeper stores its progress."""

    def webhook(self, url: str) -> tuple[int, int, int] | None:
        """Return the last posted entry, and how many are delivered and dead. Raises StoreError."""

    def note_webhook(self, url: str, told: int, delivered: int, dead: int) -> None:
        """Store the same. Raises StoreError."""


@dataclass(slots=True)
class Webhook:
    """Posts to one URL, in a thread of its own."""

    url: str
    key: bytes = field(repr=False)
    event_log: EventLog
    store: WebhookStore
    clock: Clock
    body_of: Callable[[HistoryEntry], Mapping[str, Any]]
    """Returns an entry as the API presents it."""
    _threads: ThreadGroup = field(default_factory=ThreadGroup)
    _client: httpx.Client | None = None
    _told: int = 0
    _delivered: int = 0
    _dead: int = 0
    _error: str | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> None:
        """Resume where an earlier keeper ended, or begin with new entries. Raises StoreError."""
        known = self.store.webhook(self.url)
        told, self._delivered, self._dead = known or (self.event_log.last_id, 0, 0)
        # A full disk may have cost the end of the history, whose ids are then used again.
        self._told = min(told, self.event_log.last_id)
        if known is None:
            self._note()
        self._threads.watch("webhook", self._round, every=lambda: _LOOK_EVERY)

    def close(self) -> None:
        """Stop; pending entries are left to the next keeper."""
        self._threads.close()
        self._last_words()
        if self._client is not None:
            self._client.close()

    @property
    def failing(self) -> Mapping[str, str]:
        """Why the last round failed, if it did."""
        return self._threads.failing

    def status(self) -> WebhookStatus:
        """Return the state of the webhook."""
        with self._lock:
            pending = self.event_log.last_id - self._told
            return WebhookStatus(
                place_of(self.url), self._delivered, self._dead, pending, self._error
            )

    def _round(self) -> None:
        while entries := self._due():
            for entry in entries:
                if not self._tell_until_done(entry):
                    return

    def _due(self) -> list[HistoryEntry]:
        """Return the next entries to post."""
        try:
            return self.event_log.after(self._told, limit=_PAGE)
        except StoreError:
            return []  # The store has logged it; the next round retries.

    def _last_words(self) -> None:
        """Post each pending entry once while the receiver accepts them, for a moment at most."""
        end = self.clock.monotonic() + _LAST_WORDS
        for entry in self._due():
            if self._error is not None or self.clock.monotonic() > end:
                return
            refused = self._post(entry, within=_LAST_WORDS)
            if refused is None:
                self._over(entry, taken=True)

    def _tell_until_done(self, entry: HistoryEntry) -> bool:
        """Post an entry until it is accepted or dead; return False if the keeper ends before."""
        pause = _FIRST_PAUSE
        while (refused := self._post(entry)) is not None:
            late = self.clock.time() - entry.at > _GIVEN_UP_AFTER
            if refused.for_good or late:
                _log.error(
                    "a webhook did not accept an event; it is dropped",
                    id=entry.id,
                    place=place_of(self.url),
                    error=refused.why,
                )
                self._over(entry, taken=False)
                return True
            if pause == _FIRST_PAUSE:
                _log.warning(
                    "a webhook cannot be called",
                    id=entry.id,
                    place=place_of(self.url),
                    error=refused.why,
                )
            if self._threads.sleep(max(pause, refused.not_before)):
                return False
            pause = min(pause * 2, _LONGEST_PAUSE)
        self._over(entry, taken=True)
        return True

    def _over(self, entry: HistoryEntry, *, taken: bool) -> None:
        with self._lock:
            # Entries that were dropped from the history before this one are dead, too.
            self._dead += entry.id - self._told - taken
            self._told = entry.id
            self._delivered += taken
        self._note()

    def _note(self) -> None:
        try:
            self.store.note_webhook(self.url, self._told, self._delivered, self._dead)
        except StoreError:
            return  # The store has logged it. A duplicate delivery has the same id.

    def _post(self, entry: HistoryEntry, *, within: float = _TIMEOUT) -> _Refused | None:
        import httpx  # noqa: PLC0415 - late: 30 ms, and most keepers have no webhook

        body = json.dumps(self.body_of(entry), separators=(",", ":")).encode()
        # Includes the time: a new or truncated history uses ids again.
        headers = signed(
            self.key, f"event_{entry.id}_{round(entry.at * 1000)}", self.clock.time(), body
        )
        try:
            self._client = self._client or httpx.Client(follow_redirects=False)
            with self._client.stream(
                "POST", self.url, content=body, headers=headers, timeout=within
            ) as answer:
                refused = None if answer.is_success else _refusal(answer)
                # Read a short body, so that the connection can be reused; a long one ends it.
                with contextlib.suppress(httpx.HTTPError):
                    deque(islice(answer.iter_raw(), _PIECES), maxlen=0)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            refused = _Refused(str(error) or type(error).__name__)
        with self._lock:
            self._error = None if refused is None else refused.why
        return refused


@dataclass(frozen=True, slots=True)
class _Refused:
    """Why a POST failed."""

    why: str
    for_good: bool = False
    not_before: float = 0.0
    """Seconds to wait, as requested by the receiver."""


def _refusal(answer: httpx.Response) -> _Refused:
    lasting = answer.is_client_error and answer.status_code not in _LATER
    wait = answer.headers.get("Retry-After", "")
    return _Refused(
        f"it answered {answer.status_code}",
        lasting,
        min(float(wait), _LONGEST_PAUSE) if wait.isdecimal() else 0.0,
    )


def signed(key: bytes, message_id: str, at: float, body: bytes) -> dict[str, str]:
    """Return the headers of a POST."""
    moment = str(int(at))
    mac = hmac.digest(key, f"{message_id}.{moment}.".encode() + body, hashlib.sha256)
    return {
        "Content-Type": "application/json",
        "User-Agent": "labkeeper",
        "webhook-id": message_id,
        "webhook-timestamp": moment,
        "webhook-signature": f"v1,{base64.b64encode(mac).decode()}",
    }


def key_of(secret: str) -> bytes:
    """Parse a secret. Raises ValueError with the rule."""
    try:
        key = base64.b64decode(secret.removeprefix(_KEY_PREFIX), validate=True)
    except ValueError:
        key = b""
    if len(key) not in _KEY_BYTES:
        size = f"{_KEY_BYTES.start} to {_KEY_BYTES.stop - 1}"
        raise ValueError(
            f"must be {size} bytes in base64, such as `openssl rand -base64 32` prints"
        )
    return key


def place_of(url: str) -> str:
    """Return the part of a URL that may be shown."""
    parts = urlsplit(url)
    return addresses.url(parts.scheme, parts.hostname or "", parts.port)
