"""API tokens over a store: create, verify, expire, revoke."""

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
from labkeeper.identity import tokens as module
from labkeeper.identity.tokens import OWNER, Tokens
from labkeeper.store.queries import SqliteStore
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


def test_the_owner_token_has_every_scope(tokens, store, clock):
    assert tokens.caller(OWNERS)[0] is OWNER
    for shown in ("", "wrong", OWNERS + "x", "lk_000000000000_" + "x" * 43, "zażółć", "\ud800"):
        with pytest.raises(NotAuthenticated):
            tokens.caller(shown)
    without_owner = over(store, clock, owner=None)
    with pytest.raises(NotAuthenticated):
        without_owner.caller("")


def test_tokens_are_stored_across_keepers_as_hashes(tmp_path, clock):
    """In SQLite, with their limits."""
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


def test_a_wrong_secret_with_a_known_id_is_refused(tokens):
    _, text = tokens.make("ci", Scope.READ, EVERYTHING, lifetime=None)
    with pytest.raises(NotAuthenticated):
        tokens.caller(text[:-1] + ("a" if text[-1] != "a" else "b"))


def test_the_last_use_is_stored_once_a_minute(tokens, store, clock):
    _, text = tokens.make("ci", Scope.READ, EVERYTHING, lifetime=None)
    first = clock.time()
    for _ in range(3):
        tokens.caller(text)
        clock.advance(20.0)
    (kept,) = store.tokens()
    assert kept.last_used_at == first
    tokens.caller(text)
    assert store.tokens()[0].last_used_at == first + 60.0


def test_tokens_remain_valid_on_a_full_disk(tokens, store):
    _, text = tokens.make("ci", Scope.READ, EVERYTHING, lifetime=None)
    store.failing = True
    assert tokens.caller(text)[0].actor == "token:ci"
    with pytest.raises(StoreError):
        tokens.make("other", Scope.READ, EVERYTHING, lifetime=None)


def test_a_token_revoked_on_a_full_disk_is_refused(tokens, store):
    """It stays listed until a repeated revocation is stored."""
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


def test_names_are_unique_and_the_number_of_tokens_is_limited(tokens, monkeypatch):
    tokens.make("ci", Scope.READ, EVERYTHING, lifetime=None)
    for name in ("ci", "owner"):
        with pytest.raises(Conflict, match="taken"):
            tokens.make(name, Scope.READ, EVERYTHING, lifetime=None)
    monkeypatch.setattr(module, "_MOST", 1)
    with pytest.raises(CapacityReached, match="revoke"):
        tokens.make("other", Scope.READ, EVERYTHING, lifetime=None)
    tokens.revoke("ci")
    with pytest.raises(TokenNotFound):
        tokens.revoke("ci")


def test_recording_a_use_does_not_restore_a_revoked_token(tokens, store):
    made, _ = tokens.make("ci", Scope.READ, EVERYTHING, lifetime=None)
    tokens.revoke("ci")
    tokens._note_use(made, 5.0)
    assert (tokens.all(), store.tokens()) == ([], [])
