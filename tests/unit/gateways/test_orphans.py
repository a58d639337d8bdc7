"""Orphaned kernels are remembered until they have ended, across full disks and keepers."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from structlog.testing import capture_logs

from labkeeper.core.server import OrphanedKernel
from labkeeper.core.spec import Gateway, ServerName
from labkeeper.gateways.orphans import OrphanedKernels
from labkeeper.store.queries import SqliteStore

ONE, OTHER = Gateway("http://one", "ws://one"), Gateway("http://other", "ws://other")


def orphan(kernel_id, since=1_000_000.0, gateway=ONE):
    return OrphanedKernel(kernel_id, gateway, ServerName("lab"), since)


def test_orphaned_kernels_are_stored_for_the_next_keeper(store, clock):
    orphans = OrphanedKernels(store, clock)
    orphans.add([orphan("k2", 20.0), orphan("k1", 10.0), orphan("k3", 10.0, OTHER)])
    after = OrphanedKernels(store, clock)
    assert [orphans.kernel_id for orphans in after.all()] == ["k1", "k3", "k2"]
    assert [orphans.kernel_id for orphans in after.on(ONE)] == ["k1", "k2"]
    after.discard(["k1", "k3", "never owed"])
    assert [orphans.kernel_id for orphans in OrphanedKernels(store, clock).all()] == ["k2"]


def test_a_gateways_token_is_wiped_with_its_last_orphaned_kernel(clock, tmp_path):
    with contextlib.closing(SqliteStore(tmp_path / "store.sqlite")) as store:
        orphans = OrphanedKernels(store, clock)
        orphans.add([orphan("k1", gateway=replace(ONE, auth_token="gateway-secret"))])
        orphans.discard(["k1"])
        assert [
            path.name for path in tmp_path.iterdir() if b"gateway-secret" in path.read_bytes()
        ] == []


def test_a_full_disk_neither_loses_nor_restores_orphaned_kernels(store, clock):
    orphans = OrphanedKernels(store, clock)
    orphans.add([orphan("settled later")])
    store.failing = True
    orphans.add([orphan("owed meanwhile"), orphan("owed and settled")])
    orphans.discard(["owed and settled", "settled later"])
    orphans.save()
    assert [orphans.kernel_id for orphans in orphans.all()] == ["owed meanwhile"]
    store.failing = False
    assert set(store.kernels) == {"settled later"}
    orphans.save()
    assert set(store.kernels) == {"owed meanwhile"}


def test_a_disk_that_fills_up_between_two_writes_loses_nothing(store, clock, monkeypatch):
    orphans = OrphanedKernels(store, clock)
    orphans.add([orphan("old")])
    store.failing = True
    orphans.add([orphan("new")])
    orphans.discard(["old"])
    store.failing = False
    real = store.add_orphans
    monkeypatch.setattr(
        store, "add_orphans", lambda orphans: (real(orphans), setattr(store, "failing", True))
    )
    orphans.save()
    assert set(store.kernels) == {"old", "new"}
    store.failing = False
    monkeypatch.undo()
    orphans.save()
    assert set(store.kernels) == {"new"}


def test_an_unchanged_list_is_not_saved_again(store, clock):
    orphans = OrphanedKernels(store, clock)
    orphans.add([orphan("k1")])
    store.failing = True  # A pending write would now be retried later.
    orphans.save()
    store.kernels.clear()
    store.failing = False
    orphans.save()
    assert store.kernels == {}


def test_an_orphaned_kernel_is_given_up_after_30_days_with_a_warning(store, clock):
    orphans = OrphanedKernels(store, clock)
    orphans.add([orphan("old", clock.time()), orphan("new", clock.time() + 60)])
    clock.advance(30 * 86400)
    orphans.expire()
    assert len(orphans.all()) == 2
    clock.advance(1)
    with capture_logs() as logs:
        orphans.expire()
    assert [orphans.kernel_id for orphans in orphans.all()] == ["new"]
    assert set(store.kernels) == {"new"}
    assert [(line["log_level"], line["kernel"], line["server"]) for line in logs] == [
        ("warning", "old", "lab")
    ]
