"""Names are unique for each owner, although the API knows one owner only so far."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fake_keeper import TOKEN, fake_keeper
from labkeeper.api.app import create_app
from labkeeper.core.access import Caller, Scope, View
from labkeeper.core.errors import Conflict, ServerNotFound, TokenNotFound
from labkeeper.core.messages import Create, HistoryEntry, HistoryKind
from labkeeper.core.spec import (
    DEFAULT_NAME,
    LOCAL,
    Owner,
    ServerName,
    parse_qualified_name,
    qualified_name,
)
from labkeeper.identity.authenticators import Identity
from labkeeper.store.queries import SqliteStore
from labkeeper.testing.fakes import a_spec

ADA = Owner("ada")


@pytest.mark.parametrize(
    ("name", "owner", "text"),
    [("lab", LOCAL, "lab"), ("lab", ADA, "lab.ada"), ("a-b", Owner("c-d"), "a-b.c-d")],
)
def test_a_qualified_name_tells_its_name_and_owner(name, owner, text):
    assert qualified_name(ServerName(name), owner) == text
    assert parse_qualified_name(text) == (name, owner)


@pytest.mark.parametrize("text", ["", ".", "lab.", ".ada", "lab.local", "a.b.c", "lab.Ada", "a/b"])
def test_other_texts_are_no_qualified_names(text):
    with pytest.raises(ValueError, match=r"must be 1 to 63|is not written"):
        parse_qualified_name(text)


class Ada:
    """An authenticator that takes every caller for a user named ada."""

    def authenticate(self, _):
        return Identity(Caller("user:ada", Scope.ADMIN, owner=ADA))


class Clients:
    """The API of one keeper, as two owners see it."""

    def __init__(self, running):
        self.running = running
        self.local = create_app(running.services).test_client()
        self.local.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {TOKEN}"
        self.ada = create_app(replace(running.services, authenticators=[Ada()])).test_client()

    def each(self):
        return {"local": self.local, "ada": self.ada}.items()


@pytest.fixture
def clients(tmp_path):
    with fake_keeper(tmp_path) as running:
        yield Clients(running)


def test_two_owners_run_servers_of_one_name(clients):
    pids = {}
    for owner, client in clients.each():
        made = client.post("/api/servers", json={"name": "lab"})
        assert (made.status_code, made.json["owner"]) == (201, owner)
        assert made.headers["Location"] == "/api/servers/lab"
        pids[owner] = made.json["pid"]
    assert len(set(pids.values())) == 2
    for owner, client in clients.each():
        assert client.get("/api/servers/lab").json["pid"] == pids[owner]
        (listed,) = client.get("/api/servers", query_string={"owner": owner}).json["servers"]
        assert (listed["name"], listed["owner"], listed["pid"]) == ("lab", owner, pids[owner])
    assert clients.ada.delete("/api/servers/lab").json["state"] == "stopped"
    assert clients.ada.get("/api/servers/lab").status_code == 404
    assert clients.local.get("/api/servers/lab").json["state"] == "running"


def test_no_path_names_the_server_of_another_owner(clients):
    """Its qualified name, which the keeper uses inside, names nothing in a path."""
    clients.ada.post("/api/servers", json={"name": "lab"})
    for path in (
        "/api/servers/lab.ada",
        "/api/servers/lab.ada/logs",
        "/api/servers/lab.ada/events",
    ):
        assert clients.local.get(path).status_code == 404
    for path in ("stop", "start", "restart", "link", "snooze"):
        body = {"for": "1h"} if path == "snooze" else {}
        assert clients.local.post(f"/api/servers/lab.ada/{path}", json=body).status_code == 404
    assert clients.local.delete("/api/servers/lab.ada").status_code == 404
    assert clients.ada.get("/api/servers/lab").json["state"] == "running"


def test_events_are_those_of_the_callers_owner(clients):
    for _, client in clients.each():
        client.post("/api/servers", json={"name": "lab"})
    for owner, client in clients.each():
        for path in ("/api/events", "/api/servers/lab/events"):
            events = client.get(path, query_string={"owner": owner}).json["events"]
            assert {event["owner"] for event in events} == {owner}
            assert {event["server"] for event in events} == {"lab"}
        me = client.get("/api/me").json
        assert me["owner"] == owner


def test_the_filter_for_another_owner_finds_nothing(clients):
    """Even with servers and events of that owner: it does not tell whether there are any."""
    clients.ada.post("/api/servers", json={"name": "lab"})
    clients.ada.post("/api/tokens", json={"name": "ci", "scope": "read"})
    for listed in ("servers", "events", "tokens"):
        for owner in ("ada", "eve"):
            answer = clients.local.get(f"/api/{listed}", query_string={"owner": owner})
            assert (answer.status_code, answer.json[listed]) == (200, [])


def test_token_names_are_unique_for_each_owner(clients):
    texts = {}
    for owner, client in clients.each():
        made = client.post("/api/tokens", json={"name": "ci", "scope": "manage"})
        assert (made.status_code, made.json["owner"]) == (201, owner)
        texts[owner] = made.json["token"]
        assert client.post("/api/tokens", json={"name": "ci", "scope": "read"}).status_code == 409
        (listed,) = client.get("/api/tokens", query_string={"owner": owner}).json["tokens"]
        assert (listed["name"], listed["owner"]) == ("ci", owner)
    tokens = clients.running.services.tokens
    assert tokens.caller(texts["ada"])[0].owner == ADA
    assert tokens.caller(texts["local"])[0].owner == LOCAL
    tokens.revoke("ci", owner=ADA)
    with pytest.raises(TokenNotFound):
        tokens.revoke("ci", owner=ADA)
    assert [token.name for token in tokens.all()] == ["ci"]
    assert tokens.caller(texts["local"])[0].owner == LOCAL


def test_a_caller_has_no_server_of_a_qualified_name():
    caller = Caller("user:root", Scope.ADMIN)
    assert caller.qualified("lab") == "lab"
    assert replace(caller, owner=ADA).qualified("lab") == "lab.ada"
    with pytest.raises(ServerNotFound, match=r"'lab\.ada'"):
        caller.qualified("lab.ada")


def test_the_default_port_is_for_the_default_server_of_local_only(clients):
    services = clients.running.services
    made = clients.local.post("/api/servers", json={})
    assert (made.json["name"], made.status_code) == (DEFAULT_NAME, 201)
    assert services.keeper.get("default").spec.port == services.defaults.lab_port
    assert clients.ada.post("/api/servers", json={}).status_code == 201
    assert services.keeper.get("default.ada").spec.port is None


def test_equal_specs_of_two_owners_do_not_conflict(clients):
    keeper = clients.running.keeper
    spec = a_spec("lab")
    assert keeper.ask(Create(spec)).created
    assert keeper.ask(Create(replace(spec, owner=ADA))).created
    with pytest.raises(Conflict, match="differs in root_dir"):
        keeper.ask(Create(replace(spec, owner=ADA, root_dir="/elsewhere")))


def test_stored_events_without_an_owner_are_local(tmp_path):
    """Those from before there were owners."""
    store = SqliteStore(tmp_path / "labkeeper.sqlite")
    entries = [
        HistoryEntry(id_, 1.0, HistoryKind.STATE, ServerName("lab"), "said", owner=owner)
        for id_, owner in ((1, LOCAL), (2, ADA))
    ]
    store.remember(entries, keep=10)
    store._db.execute("UPDATE history SET entry = json_remove(entry, '$.owner') WHERE id = 1")
    for owner, ids in ((None, [1, 2]), (LOCAL, [1]), (ADA, [2])):
        found = store.remembered(View(owner=owner), after=0, limit=9)
        assert [entry.id for entry in found] == ids
        assert [entry.owner for entry in found] == [LOCAL if id_ == 1 else ADA for id_ in ids]
    store.close()
