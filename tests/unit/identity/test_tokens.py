"""Tokens over a store: made, known again, used, expired, revoked."""

from __future__ import annotations

from dataclasses import replace

import pytest

from labkeeper.core.access import EVERYTHING, Scope, TokenLimits
from labkeeper.core.errors import (
    CapacityReached,
    Conflict,
    NotAuthenticated,
    StoreError,
    TokenNotFound,
)
from labkeeper.core.messages import Origin
from labkeeper.events.log import EventLog
from labkeeper.identity import tokens as server_dir
from labkeeper.identity.tokens import OWNER, Tokens
from labkeeper.store import SqliteStore
from labkeeper.testing.fakes import FakeClock, MemoryStore

OWNERS = "the-owners-token"


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def store():
    return MemoryStore()


def over(store, clock, owner=OWNERS):
    return Tokens(store, clock, EventLog(store, clock, size=100), owner=owner)


@pytest.fixture
def tokens(store, clock):
    return over(store, clock)


def test_the_owners_token_may_do_everything(tokens, store, clock):
    assert tokens.caller(OWNERS)[0] is OWNER
    for shown in ("", "wrong", OWNERS + "x", "lk_000000000000_" + "x" * 43, "zażółć", "\ud800"):
        with pytest.raises(NotAuthenticated):
            tokens.caller(shown)
    nobody = over(store, clock, owner=None)
    with pytest.raises(NotAuthenticated):
        nobody.caller("")


def test_a_token_outlives_the_keeper(tmp_path, clock):
    """In SQLite, with its limits, and not in words."""
    path = tmp_path / "labkeeper.sqlite"
    reach = TokenLimits(("a-*",), {"team": "blue", 'o"dd': "'"}, ("ada",))
    store = SqliteStore(path)
    made, text = over(store, clock).make(
        "ci", Scope.MANAGE, reach, lifetime=60.0, origin=Origin("token:owner")
    )
    store.close()
    assert text.encode() not in b"".join(file.read_bytes() for file in tmp_path.iterdir())
    store = SqliteStore(path)
    again = over(store, clock)
    caller, still_valid = again.caller(text)
    assert (caller.actor, caller.scope, caller.limits) == ("token:ci", Scope.MANAGE, reach)
    assert still_valid()
    assert again.all() == [replace(made, last_used_at=clock.time())]
    again.revoke("ci")
    assert not still_valid()
    assert store.tokens() == []
    store.close()


def test_a_token_expires(tokens, clock):
    made, text = tokens.make("ci", Scope.READ, EVERYTHING, lifetime=60.0)
    _, still_valid = tokens.caller(text)
    clock.advance(59.0)
    assert still_valid()
    clock.advance(1.0)
    assert not still_valid()
    with pytest.raises(NotAuthenticated, match="has expired"):
        tokens.caller(text)
    assert made.expired(clock.time())


def test_the_secret_counts_and_not_the_id(tokens):
    _, text = tokens.make("ci", Scope.READ, EVERYTHING, lifetime=None)
    with pytest.raises(NotAuthenticated):
        tokens.caller(text[:-1] + ("a" if text[-1] != "a" else "b"))


def test_its_last_use_is_kept_to_the_minute(tokens, store, clock):
    _, text = tokens.make("ci", Scope.READ, EVERYTHING, lifetime=None)
    first = clock.time()
    for _ in range(3):
        tokens.caller(text)
        clock.advance(20.0)
    (kept,) = store.tokens()
    assert kept.last_used_at == first
    tokens.caller(text)
    assert store.tokens()[0].last_used_at == first + 60.0


def test_a_full_disk_keeps_nobody_out(tokens, store):
    _, text = tokens.make("ci", Scope.READ, EVERYTHING, lifetime=None)
    store.failing = True
    assert tokens.caller(text)[0].actor == "token:ci"
    with pytest.raises(StoreError):
        tokens.make("other", Scope.READ, EVERYTHING, lifetime=None)


def test_a_full_disk_lets_no_revoked_token_in(tokens, store):
    """It is listed, and its name taken, until the store has forgotten it, which is to be asked for again."""
    _, text = tokens.make("ci", Scope.READ, EVERYTHING, lifetime=None)
    store.failing = True
    for _ in range(2):
        with pytest.raises(StoreError):
            tokens.revoke("ci")
    with pytest.raises(NotAuthenticated):
        tokens.caller(text)
    assert [token.name for token in tokens.all()] == ["ci"]
    store.failing = False
    with pytest.raises(Conflict):
        tokens.make("ci", Scope.READ, EVERYTHING, lifetime=None)
    tokens.revoke("ci")
    assert (tokens.all(), store.tokens()) == ([], [])


def test_names_are_taken_once(tokens, monkeypatch):
    tokens.make("ci", Scope.READ, EVERYTHING, lifetime=None)
    for name in ("ci", "owner"):
        with pytest.raises(Conflict, match="taken"):
            tokens.make(name, Scope.READ, EVERYTHING, lifetime=None)
    monkeypatch.setattr(server_dir, "_MOST", 1)
    with pytest.raises(CapacityReached, match="revoke"):
        tokens.make("other", Scope.READ, EVERYTHING, lifetime=None)
    tokens.revoke("ci")
    with pytest.raises(TokenNotFound):
        tokens.revoke("ci")


def test_a_use_beside_a_revocation_does_not_bring_it_back(tokens, store):
    made, _ = tokens.make("ci", Scope.READ, EVERYTHING, lifetime=None)
    tokens.revoke("ci")
    tokens._note_use(made, 5.0)
    assert (tokens.all(), store.tokens()) == ([], [])
