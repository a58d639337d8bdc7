"""Kernels on gateways that have lost their server; recorded until they have been ended."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Final

import structlog

from labkeeper.core.errors import StoreError
from labkeeper.core.ports import Clock, Store
from labkeeper.core.server import OrphanedKernel
from labkeeper.core.spec import Gateway

_EXPIRE_AFTER: Final = 30 * 86400.0
"""Seconds after which a kernel is given up; gateways end idle kernels themselves."""

_log = structlog.get_logger("labkeeper.gateways.orphans")


class OrphanedKernels:
    """See `core.ports.OrphanedKernels`. Thread-safe."""

    def __init__(self, store: Store, clock: Clock) -> None:
        """Load the orphaned kernels of earlier keepers. Raises StoreError."""
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()
        self._kernels = {orphan.kernel_id: orphan for orphan in store.orphans()}
        self._unsaved: set[str] = set()
        """Ids of kernels whose row in the store is out of date."""

    def add(self, orphans: Sequence[OrphanedKernel]) -> None:
        """Add orphaned kernels."""
        for orphan in orphans:
            _log.info(
                "a kernel is to be ended on its gateway",
                kernel=orphan.kernel_id,
                gateway=orphan.gateway.url,
                server=orphan.server,
            )
        with self._lock:
            self._kernels |= {orphan.kernel_id: orphan for orphan in orphans}
            self._unsaved |= {orphan.kernel_id for orphan in orphans}
        self.save()

    def discard(self, kernel_ids: Iterable[str]) -> None:
        """Remove kernels that have been ended."""
        with self._lock:
            for kernel_id in kernel_ids:
                self._kernels.pop(kernel_id, None)
                self._unsaved.add(kernel_id)
        self.save()

    def save(self) -> None:
        """Update the store; if that fails, the next call retries."""
        with self._lock:
            if not self._unsaved:
                return
            gone = [id_ for id_ in self._unsaved if id_ not in self._kernels]
            try:
                self._store.add_orphans(
                    [self._kernels[id_] for id_ in self._unsaved if id_ in self._kernels]
                )
                self._store.discard_orphans(gone)
            except StoreError:
                return
            self._unsaved.clear()
        if gone:
            self._store.wipe()

    def expire(self) -> None:
        """Remove kernels that are too old."""
        limit = self._clock.time() - _EXPIRE_AFTER
        for orphan in [orphan for orphan in self.all() if orphan.since < limit]:
            _log.warning(
                "an orphaned kernel is given up: its gateway has not ended it",
                kernel=orphan.kernel_id,
                gateway=orphan.gateway.url,
                server=orphan.server,
            )
            self.discard([orphan.kernel_id])

    def all(self) -> list[OrphanedKernel]:
        """Return all, oldest first."""
        with self._lock:
            return sorted(
                self._kernels.values(), key=lambda orphan: (orphan.since, orphan.kernel_id)
            )

    def on(self, gateway: Gateway) -> list[OrphanedKernel]:
        """Return those on one gateway."""
        return [orphan for orphan in self.all() if orphan.gateway == gateway]
