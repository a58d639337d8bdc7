"""A kernel that is owed an end is not forgotten, whatever the disk does and whoever keeps the book."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from structlog.testing import capture_logs

from labkeeper.core.server import KernelDebt
from labkeeper.core.spec import Gateway, ServerName
from labkeeper.gateways.orphans import Ledger
from labkeeper.store import SqliteStore

ONE, OTHER = Gateway("http://one", "ws://one"), Gateway("http://other", "ws://other")


def debt(kernel_id, since=1_000_000.0, gateway=ONE):
    return KernelDebt(kernel_id, gateway, ServerName("lab"), since)


def test_what_is_owed_is_kept_and_taken_up_by_the_next(store, clock):
    ledger = Ledger(store, clock)
    ledger.owe([debt("k2", 20.0), debt("k1", 10.0), debt("k3", 10.0, OTHER)])
    after = Ledger(store, clock)
    assert [owed.kernel_id for owed in after.all()] == ["k1", "k3", "k2"]
    assert [owed.kernel_id for owed in after.on(ONE)] == ["k1", "k2"]
    after.settle(["k1", "k3", "never owed"])
    assert [owed.kernel_id for owed in Ledger(store, clock).all()] == ["k2"]


def test_the_token_of_a_gateway_goes_from_the_disk_with_the_last_debt_there(clock, tmp_path):
    with contextlib.closing(SqliteStore(tmp_path / "store.sqlite")) as store:
        ledger = Ledger(store, clock)
        ledger.owe([debt("k1", gateway=replace(ONE, auth_token="gateway-secret"))])
        ledger.settle(["k1"])
        assert [path.name for path in tmp_path.iterdir() if b"gateway-secret" in path.read_bytes()] == []


def test_a_full_disk_loses_no_debt_and_brings_none_back(store, clock):
    ledger = Ledger(store, clock)
    ledger.owe([debt("settled later")])
    store.failing = True
    ledger.owe([debt("owed meanwhile"), debt("owed and settled")])
    ledger.settle(["owed and settled", "settled later"])
    ledger.save()
    assert [owed.kernel_id for owed in ledger.all()] == ["owed meanwhile"]
    store.failing = False
    assert set(store.owed) == {"settled later"}
    ledger.save()
    assert set(store.owed) == {"owed meanwhile"}


def test_a_disk_that_fills_up_between_two_writes_loses_nothing(store, clock, monkeypatch):
    ledger = Ledger(store, clock)
    ledger.owe([debt("old")])
    store.failing = True
    ledger.owe([debt("new")])
    ledger.settle(["old"])
    store.failing = False
    real = store.owe
    monkeypatch.setattr(store, "owe", lambda debts: (real(debts), setattr(store, "failing", True)))
    ledger.save()
    assert set(store.owed) == {"old", "new"}
    store.failing = False
    monkeypatch.undo()
    ledger.save()
    assert set(store.owed) == {"new"}


def test_a_book_that_is_in_order_is_not_written_again(store, clock):
    ledger = Ledger(store, clock)
    ledger.owe([debt("k1")])
    store.failing = True  # Whatever is tried now would be tried again and again.
    ledger.save()
    store.owed.clear()
    store.failing = False
    ledger.save()
    assert store.owed == {}


def test_a_debt_is_given_up_after_30_days_and_that_is_told(store, clock):
    ledger = Ledger(store, clock)
    ledger.owe([debt("old", clock.time()), debt("new", clock.time() + 60)])
    clock.advance(30 * 86400)
    ledger.forgive()
    assert len(ledger.all()) == 2
    clock.advance(1)
    with capture_logs() as logs:
        ledger.forgive()
    assert [owed.kernel_id for owed in ledger.all()] == ["new"]
    assert set(store.owed) == {"new"}
    assert [(line["log_level"], line["kernel"], line["server"]) for line in logs] == [("warning", "old", "lab")]
