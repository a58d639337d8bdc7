"""Kernels of ours that live on a gateway and that nobody is to have any more: written down until they have been ended."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Final

import structlog

from labkeeper.core.errors import StoreError
from labkeeper.core.ports import Clock, Store
from labkeeper.core.server import KernelDebt
from labkeeper.core.spec import Gateway

_FORGIVEN_AFTER: Final = 30 * 86400.0
"""Seconds after which a kernel whose gateway never answered is given up; gateways end idle kernels themselves."""

_log = structlog.get_logger("labkeeper.gateways.orphans")


class Ledger:
    """See `core.ports.Ledger`. Thread-safe."""

    def __init__(self, store: Store, clock: Clock) -> None:
        """Take up what an earlier keeper owed. Raises StoreError."""
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()
        self._owed = {debt.kernel_id: debt for debt in store.debts()}
        self._unsaved: set[str] = set()
        """Ids of kernels whose row in the store is not what is so."""

    def owe(self, debts: Sequence[KernelDebt]) -> None:
        """Take in more."""
        for debt in debts:
            _log.info(
                "a kernel is to be ended on its gateway", kernel=debt.kernel_id, gateway=debt.gateway.url, server=debt.server
            )
        with self._lock:
            self._owed |= {debt.kernel_id: debt for debt in debts}
            self._unsaved |= {debt.kernel_id for debt in debts}
        self.save()

    def settle(self, kernel_ids: Iterable[str]) -> None:
        """Drop those that have been ended."""
        with self._lock:
            for kernel_id in kernel_ids:
                self._owed.pop(kernel_id, None)
                self._unsaved.add(kernel_id)
        self.save()

    def save(self) -> None:
        """Bring the store to what is so, now or, where it cannot be written, when this is called again."""
        with self._lock:
            if not self._unsaved:
                return
            try:
                self._store.owe([self._owed[id_] for id_ in self._unsaved if id_ in self._owed])
                self._store.settle([id_ for id_ in self._unsaved if id_ not in self._owed])
            except StoreError:
                return
            settled = any(id_ not in self._owed for id_ in self._unsaved)
            self._unsaved.clear()
        if settled:
            self._store.wipe()

    def forgive(self) -> None:
        """Give up what is too old ever to be ended."""
        limit = self._clock.time() - _FORGIVEN_AFTER
        for debt in [debt for debt in self.all() if debt.since < limit]:
            _log.warning(
                "a kernel is given up: its gateway has not ended it",
                kernel=debt.kernel_id,
                gateway=debt.gateway.url,
                server=debt.server,
            )
            self.settle([debt.kernel_id])

    def all(self) -> list[KernelDebt]:
        """Give all, the oldest first."""
        with self._lock:
            return sorted(self._owed.values(), key=lambda debt: (debt.since, debt.kernel_id))

    def on(self, gateway: Gateway) -> list[KernelDebt]:
        """Give those on one gateway."""
        return [debt for debt in self.all() if debt.gateway == gateway]
