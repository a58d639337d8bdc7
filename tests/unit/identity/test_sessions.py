"""Browser sessions over a store: begin, find, expire, revoke, and what the edge hears of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from labkeeper.core.access import EVERYTHING, Caller, Scope, TokenLimits
from labkeeper.core.errors import NotAuthenticated, SessionNotFound, StoreError
from labkeeper.core.lifecycle import Event, Goal, State
from labkeeper.core.messages import Change, Origin
from labkeeper.core.server import Snapshot
from labkeeper.core.spec import Owner
from labkeeper.events.log import EventLog
from labkeeper.identity import sessions as module
from labkeeper.identity.sessions import LIFETIME, Sessions
from labkeeper.identity.tokens import Tokens
from labkeeper.store.queries import SqliteStore
from labkeeper.testing.fakes import FakeClock, MemoryStore, a_spec


class Edge:
    """What an edge knows after all that it was told."""

    def __init__(self):
        self.known, self.heard_of = {}, []

    def hear(self, begun, ended):
        self.known |= {session.digest: session for session in begun}
        self.heard_of += [*begun, *ended]
        for session in ended:
            self.known.pop(session.digest, None)


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def store():
    return MemoryStore()


@pytest.fixture
def edge():
    return Edge()


def over(store, clock, edge):
    return Sessions(store, clock, EventLog(store, clock, size=100), edge.hear)


@pytest.fixture
def sessions(store, clock, edge):
    return over(store, clock, edge)


def test_a_session_is_found_by_its_cookie_until_it_expires(sessions, clock, edge):
    session, cookie = sessions.make("lab", "token:ada")
    assert sessions.find(cookie) == session == edge.known[session.digest]
    assert (session.server, session.actor) == ("lab", "token:ada")
    for wrong in ("", "x", cookie + "x", cookie[:-1], "\ud800"):
        assert sessions.find(wrong) is None
    clock.advance(LIFETIME - 1)
    assert sessions.find(cookie) == session
    clock.advance(1)
    assert sessions.find(cookie) is None
    assert sessions.all() == []


def test_a_session_ends_with_the_credentials_of_who_made_the_link(sessions, clock):
    session, _ = sessions.make("lab", "token:ada", until=clock.time() + 10)
    assert session.expires_at == clock.time() + 10
    session, _ = sessions.make("lab", "token:ada", until=clock.time() + 10 * LIFETIME)
    assert session.expires_at == clock.time() + LIFETIME


def test_sessions_are_stored_across_keepers_as_hashes(tmp_path, clock, edge):
    path = tmp_path / "labkeeper.sqlite"
    store = SqliteStore(path)
    session, cookie = over(store, clock, edge).make("lab.ada", "token:ada")
    other, _ = over(store, clock, edge).make("lab", "user:bob")
    store.close()
    assert cookie.encode() not in path.read_bytes()
    store, later = SqliteStore(path), Edge()
    sessions = over(store, clock, later)
    assert list(later.known.values()) == [session, other]
    assert sessions.find(cookie) == session
    sessions.revoke(session.id, owner="ada")
    assert over(store, clock, Edge()).find(cookie) is None
    store.close()


def test_a_revoked_session_is_ended_at_the_edge_too(sessions, store, edge):
    session, cookie = sessions.make("lab", "token:ada")
    other, stays = sessions.make("lab", "token:ada")
    assert sessions.revoke(session.id, origin=Origin("token:owner")) == session
    assert (sessions.find(cookie), sessions.find(stays)) == (None, other)
    assert list(edge.known.values()) == sessions.all() == [other]
    with pytest.raises(SessionNotFound, match="cannot find session"):
        sessions.revoke(session.id)
    told = [(entry.kind, entry.server, entry.origin.actor) for entry in store.history]
    assert told.count(("session", "lab", "token:owner")) <= 1


def test_only_an_owners_own_sessions_are_listed_and_revoked(sessions):
    session, _ = sessions.make("lab.ada", "token:x")
    assert (sessions.all("ada"), sessions.all()) == ([session], [])
    with pytest.raises(SessionNotFound):
        sessions.revoke(session.id)
    assert sessions.revoke(session.id, owner="ada") == session


def test_on_a_full_disk_a_revoked_session_is_refused_at_once(sessions, store, clock, edge):
    session, cookie = sessions.make("lab", "token:ada")
    store.failing = True
    with pytest.raises(StoreError):
        sessions.revoke(session.id)
    assert (sessions.find(cookie), edge.known) == (None, {})
    store.failing = False
    # The next keeper would accept it, so it can be revoked again.
    assert over(store, clock, Edge()).find(cookie) is not None
    assert sessions.revoke(session.id) == session
    assert over(store, clock, Edge()).find(cookie) is None


def test_a_session_that_cannot_be_stored_does_not_begin(sessions, store, edge):
    store.failing = True
    with pytest.raises(StoreError):
        sessions.make("lab", "token:ada")
    assert (sessions.all(), edge.known) == ([], {})


def test_the_sessions_of_a_revoked_token_end(sessions, edge):
    sessions.make("lab", "token:ada")
    bob, _ = sessions.make("lab", "token:bob")
    other, _ = sessions.make("lab.ada", "token:ada")
    sessions.revoke_made_by("token:ada", "local")
    assert list(edge.known.values()) == [bob, other]


def test_sessions_whose_makers_are_no_more_end_with_the_next_keeper(store, clock, edge):
    """Their keeper may have died after it had revoked the token, and before it ended them."""
    sessions, tokens = (
        over(store, clock, edge),
        Tokens(store, clock, EventLog(store, clock, size=9), owner=None),
    )
    for name in ("ada", "bob"):
        tokens.make(name, Scope.MANAGE, EVERYTHING, lifetime=None)
    made = {
        actor: sessions.make("lab", actor)
        for actor in ("token:ada", "token:bob", "user:x", "token:owner")
    }
    # A token of another owner has made this one.
    _, elsewhere = sessions.make("lab.bob", "token:bob")
    clock.advance(1)
    for name in ("ada", "bob"):
        tokens.revoke(name)
    # Another token of the same name.
    tokens.make("bob", Scope.MANAGE, EVERYTHING, lifetime=None)
    later = Edge()
    again = Sessions(store, clock, EventLog(store, clock, size=9), later.hear, stands=tokens.stands)
    stay = [made["user:x"][0], made["token:owner"][0]]
    assert list(later.known.values()) == again.all() == stay
    assert list(store.kept_sessions.values()) == stay
    assert [again.find(cookie) for _, cookie in made.values()] == [None, None, *stay]
    assert again.find(elsewhere) is None
    # An edge may know them still.
    assert len(later.heard_of) == 5


def test_a_session_does_not_begin_with_a_link_that_is_valid_no_longer(sessions, edge, store):
    with pytest.raises(NotAuthenticated, match="cannot begin a session"):
        sessions.make("lab", "token:ada", still_valid=lambda: False)
    assert (sessions.all(), edge.known, store.kept_sessions) == ([], {}, {})


def test_a_session_is_not_for_the_next_server_of_the_name(sessions, clock, store, edge):
    """The store may have kept it: the disk was full."""
    before, cookie = sessions.make("lab", "token:ada")
    other, _ = sessions.make("other", "token:ada")
    clock.advance(1)
    lab = Snapshot(a_spec("lab"), State.STOPPED, Goal.UP, 0.0, 0.0)
    sessions.changed(Change(Event.START, lab, lab, clock.time()))
    assert sessions.find(cookie) == before
    new = replace(lab, created_at=clock.time())
    sessions.changed(Change(Event.READY, new, new, clock.time()))
    assert sessions.find(cookie) == before
    sessions.changed(Change(Event.START, new, new, clock.time()))
    assert list(edge.known.values()) == list(store.kept_sessions.values()) == [other]


def test_there_are_not_more_sessions_than_a_limit(sessions, edge, store, clock, monkeypatch):
    monkeypatch.setattr(module, "_MOST", 2)
    made = [sessions.make("lab", "token:ada") for _ in range(3)]
    assert sessions.all() == list(edge.known.values()) == [session for session, _ in made[1:]]
    clock.advance(LIFETIME)
    last, _ = sessions.make("lab", "token:ada")
    assert list(edge.known.values()) == list(store.kept_sessions.values()) == [last]


ADA = Caller("token:ada", Scope.MANAGE, TokenLimits(("lab-*",)), Owner("ada"), until=2_000_000.0)


def test_a_session_at_the_bare_host_has_the_permissions_of_who_made_its_link(
    sessions, store, clock, edge
):
    session, cookie = sessions.sign_in(ADA)
    assert sessions.find(cookie) == session
    assert (session.server, session.actor, session.owner) == (None, "token:ada", "ada")
    assert session.caller == replace(ADA, until=session.expires_at)
    assert session.expires_at == clock.time() + LIFETIME
    # The edge has nothing to check at the bare host.
    assert edge.known == {}
    later = over(store, clock, edge)
    assert (later.find(cookie), later.all("ada"), edge.known) == (session, [session], {})


def test_sessions_that_follow_from_one_end_with_it(sessions, clock, edge):
    parent, text = sessions.sign_in(replace(ADA, until=clock.time() + 10))
    child, cookie = sessions.follow(parent, "lab-1.ada")
    other, _ = sessions.make("lab-1.ada", "token:bob")
    assert (child.parent, child.server, child.actor) == (parent.id, "lab-1.ada", "token:ada")
    assert (child.expires_at, child.owner) == (clock.time() + 10, "ada")
    assert set(edge.known) == {child.digest, other.digest}
    assert sessions.revoke(parent.id, owner="ada") == parent
    assert [sessions.find(one) for one in (text, cookie)] == [None, None]
    assert sessions.all("ada") == list(edge.known.values()) == [other]
    with pytest.raises(NotAuthenticated):
        sessions.follow(parent, "lab-1.ada")


def test_a_session_is_forgotten_after_those_that_follow_from_it(sessions, store, monkeypatch):
    """A keeper that is killed in between must not leave one that outlives what it follows from."""
    parent, _ = sessions.sign_in(ADA)
    children = [sessions.follow(parent, f"lab-{number}.ada")[0] for number in (1, 2)]
    forgotten = []
    monkeypatch.setattr(store, "forget_sessions", forgotten.extend)
    sessions.revoke(parent.id, owner="ada")
    assert forgotten == [*(child.id for child in children), parent.id]


def test_no_session_begins_once_its_makers_token_is_revoked(sessions, store):
    revoked = {"still_valid": lambda: False}
    with pytest.raises(NotAuthenticated):
        sessions.make("lab", "token:ada", **revoked)
    with pytest.raises(NotAuthenticated):
        sessions.sign_in(ADA, **revoked)
    assert (sessions.all(), store.kept_sessions) == ([], {})


LIMIT = 3600.0


@pytest.fixture
def limited(store, clock, edge):
    """Sessions that end when they were not used for an hour."""
    event_log = EventLog(store, clock, size=100)
    return Sessions(store, clock, event_log, edge.hear, idle_limit=LIMIT)


def test_a_session_that_is_not_used_for_too_long_ends(limited, store, clock, edge):
    session, cookie = limited.make("lab", "token:ada")
    used, stays = limited.make("lab", "token:ada")
    clock.advance(LIMIT - 1)
    limited.observe({used.digest: 10.0, "unknown": 0.0}, complete=True)
    assert limited.all() == [session, used]
    assert (limited.unused_for(session), limited.unused_for(used)) == (LIMIT - 1, 10.0)
    clock.advance(1)
    limited.observe({}, complete=True)
    assert (limited.find(cookie), limited.find(stays)) == (None, used)
    assert list(edge.known.values()) == list(store.kept_sessions.values()) == [used]
    limited.use(used)
    clock.advance(LIMIT - 1)
    limited.observe({}, complete=True)
    assert limited.all() == [used]


def test_no_session_ends_unless_all_uses_are_known(limited, clock):
    session, _ = limited.make("lab", "token:ada")
    clock.advance(10 * LIMIT)
    limited.observe({}, complete=False)
    assert limited.all() == [session]
    limited.observe({session.digest: 0.0}, complete=True)
    assert limited.all() == [session]


def test_a_session_at_the_bare_host_is_used_as_long_as_one_that_follows(limited, clock):
    parent, _ = limited.sign_in(replace(ADA, owner="local"))
    child, _ = limited.follow(parent, "lab-1")
    idle, _ = limited.follow(parent, "lab-2")
    clock.advance(LIMIT)
    limited.observe({child.digest: 0.0}, complete=True)
    assert limited.all() == [parent, child]
    clock.advance(LIMIT)
    limited.use(parent)
    limited.observe({}, complete=True)
    assert limited.all() == [parent]
    clock.advance(LIMIT)
    limited.observe({}, complete=True)
    assert limited.all() == []
    assert idle.parent == parent.id


def test_without_a_limit_no_session_ends(sessions, clock):
    session, _ = sessions.make("lab", "token:ada")
    clock.advance(LIFETIME - 1)
    sessions.observe({}, complete=True)
    assert sessions.all() == [session]


def test_the_last_use_is_known_to_the_next_keeper(tmp_path, clock, edge):
    store = SqliteStore(tmp_path / "labkeeper.sqlite")

    def keeper(*, seen):
        log = EventLog(store, clock, size=100)
        return Sessions(store, clock, log, edge.hear, idle_limit=LIMIT, seen=seen)

    edge.known = {}
    sessions = keeper(seen=False)
    idle, used = (sessions.make("lab", "token:ada")[0] for _ in range(2))
    sessions.observe({}, complete=True)
    clock.advance(LIMIT / 2)
    sessions.observe({used.digest: 0.0}, complete=True)
    clock.advance(LIMIT / 2)
    # The edge has ended, too: nobody could use a session meanwhile.
    blind = keeper(seen=False)
    assert [blind.unused_for(one) for one in (idle, used)] == [LIMIT / 2, 0.0]
    later = keeper(seen=True)
    assert [later.unused_for(one) for one in (idle, used)] == [LIMIT, LIMIT / 2]
    later.observe({}, complete=True)
    assert later.all() == [used]
    assert [session.id for session in store.sessions()] == [used.id]
    store.close()


def test_on_a_full_disk_an_idle_session_ends_all_the_same(limited, store, clock, edge):
    _, cookie = limited.make("lab", "token:ada")
    clock.advance(LIMIT)
    store.failing = True
    limited.observe({}, complete=True)
    assert (limited.find(cookie), edge.known) == (None, {})
    store.failing = False
    limited.observe({}, complete=True)
    assert store.kept_sessions == {}
