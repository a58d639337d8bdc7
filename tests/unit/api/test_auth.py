"""Authentication and authorization: rules of routes, tokens, the Unix socket, one-time links."""

from __future__ import annotations

import os
import pwd
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import structlog

from fake_keeper import TOKEN, FakeKeeper, fake_keeper
from harness import until
from labkeeper.api.app import _RULES, create_app
from labkeeper.api.auth import Extent
from labkeeper.api.routes import ROUTES
from labkeeper.core.access import Scope, TokenLimits
from labkeeper.core.server import OwnKernel
from labkeeper.core.spec import ServerName
from labkeeper.identity.authenticators import (
    OpenAuthenticator,
    PeerAuthenticator,
    TokenAuthenticator,
)
from labkeeper.identity.peers import PEER, Peer
from labkeeper.lab_addresses import LabAddresses


def parametrized(routes):
    return pytest.mark.parametrize(
        "route", routes, ids=lambda route: f"{route.method} {route.path}"
    )


EVERY_ROUTE = parametrized(ROUTES)
LIMITED_ROUTES = parametrized(
    [route for route in ROUTES if route.rule.scope not in {None, Scope.ADMIN}]
)
"""Those that a token can use whose limits name some servers."""


@pytest.fixture
def running(tmp_path):
    with fake_keeper(tmp_path) as made:
        yield made


class Callers:
    """Clients of one application, by the token they send."""

    def __init__(self, running):
        self.running = running
        self.app = create_app(running.services)
        self.tokens = running.services.tokens

    def with_token(self, token):
        client = self.app.test_client()
        if token is not None:
            client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {token}"
        return client

    @property
    def anonymous(self):
        return self.with_token(None)

    @property
    def owner(self):
        return self.with_token(TOKEN)

    def with_scope(self, scope, **limits):
        name = f"t{len(self.tokens.all())}"
        reach = TokenLimits(
            limits.get("servers", ()), limits.get("labels", {}), limits.get("users", ())
        )
        return self.with_token(self.tokens.make(name, Scope(scope), reach, lifetime=None)[1])


@pytest.fixture
def callers(running):
    return Callers(running)


def call(client, route, name="x"):
    path = re.sub(r"<\w+>", name, route.path)
    return client.open(path, method=route.method, json=None if route.method == "GET" else {})


def with_peers(services, is_server):
    return replace(
        services, authenticators=[TokenAuthenticator(services.tokens), PeerAuthenticator(is_server)]
    )


def forbidden(*_):
    raise AssertionError("an expensive check was made")


# The table


def test_every_route_has_an_access_rule(callers):
    """Pages included; a route without a rule would answer no request."""
    assert {rule.endpoint for rule in callers.app.url_map.iter_rules()} == set(_RULES)


@EVERY_ROUTE
def test_without_a_token_only_public_routes_answer(callers, route):
    for client in (
        callers.anonymous,
        callers.with_token("wrong"),
        callers.with_token("lk_000000000000_" + 43 * "x"),
    ):
        answer = call(client, route)
        assert (answer.status_code == 401) == (route.rule.scope is not None)
        if answer.status_code == 401:
            assert answer.headers["WWW-Authenticate"] == 'Bearer realm="labkeeper"'
            assert answer.json["code"] == "not_authenticated"


@EVERY_ROUTE
@pytest.mark.parametrize("scope", Scope)
def test_each_route_accepts_its_scope_and_the_scopes_that_include_it(callers, route, scope):
    """A 403 names the required scope, and does not reveal whether the server exists."""
    callers.owner.post("/api/servers", json={"name": "there"})
    answers = [call(callers.with_scope(scope), route, name) for name in ("there", "gone")]
    allowed = route.rule.scope is None or scope.covers(route.rule.scope)
    for answer in answers:
        assert answer.status_code != 401
        assert (answer.status_code != 403) == allowed, answer.json
    if not allowed:
        bodies = [{**answer.json, "request_id": ""} for answer in answers]
        assert bodies[0] == bodies[1]
        assert bodies[0]["scope"] == route.rule.scope
        assert f"the scope '{route.rule.scope}'" in bodies[0]["detail"]


@LIMITED_ROUTES
def test_a_limited_token_cannot_use_other_servers(callers, route):
    """A limit by name gives 403 and one by labels 404, whether the server exists or not."""
    callers.owner.post("/api/servers", json={"name": "theirs", "labels": {"team": "red"}})
    named = callers.with_scope("manage", servers=("mine-*",))
    labelled = callers.with_scope("manage", labels={"team": "blue"})
    responses = [
        [call(client, route, name) for name in ("theirs", "gone")] for client in (named, labelled)
    ]
    statuses = [[answer.status_code for answer in answers] for answers in responses]
    match route.rule.extent:
        case Extent.SERVER:
            assert statuses == [[403, 403], [404, 404]]
        case Extent.KEEPER:
            assert statuses == [[403, 403], [403, 403]]
        case _:
            assert [one == other for one, other in statuses] == [True, True]
    for answers in responses:
        one, other = (answer.text.replace("theirs", "?").replace("gone", "?") for answer in answers)
        assert re.sub(r'"request_id": "\w+"', "", one) == re.sub(r'"request_id": "\w+"', "", other)


# What each scope sees


def test_a_read_only_token_never_receives_what_opens_a_lab(callers):
    secret = callers.owner.post("/api/servers", json={}).json["token"]
    reader = callers.with_scope("read")
    for path in (
        "/api/servers/default",
        "/api/servers",
        "/api/events",
        "/api/servers/default/logs",
        "/api/idle",
        "/metrics",
    ):
        answer = reader.get(path)
        assert answer.status_code == 200
        assert secret not in answer.text
    shown = reader.get("/api/servers/default").json
    assert (shown["token"], shown["lab_url"], shown["state"]) == (None, None, "running")


def test_lists_contain_only_servers_within_the_limits(callers):
    for name, team in (("mine-1", "blue"), ("mine-2", "red"), ("other", "blue")):
        callers.owner.post("/api/servers", json={"name": name, "labels": {"team": team}})
    both = callers.with_scope("read", servers=("mine-?",), labels={"team": "blue"})
    labelled = callers.with_scope("read", labels={"team": "blue"})
    for client, names in ((both, ["mine-1"]), (labelled, ["mine-1", "other"])):
        assert [server["name"] for server in client.get("/api/servers").json["servers"]] == names
        assert sorted(server["name"] for server in client.get("/api/idle").json["servers"]) == names
        assert (
            sorted({event["server"] for event in client.get("/api/events?after=0").json["events"]})
            == names
        )
        assert (
            sorted({event["server"] for event in client.get("/api/events").json["events"]}) == names
        )


def test_the_history_of_a_deleted_server_stays_visible_to_the_same_tokens(callers):
    """Also when another server has its name."""
    callers.owner.post("/api/servers", json={"name": "lab", "labels": {"team": "blue"}})
    callers.owner.delete("/api/servers/lab")
    callers.owner.post("/api/servers", json={"name": "lab", "labels": {"team": "red"}})
    blue, red = (callers.with_scope("read", labels={"team": team}) for team in ("blue", "red"))
    seen = [
        [event["generation"] for event in client.get("/api/servers/lab/events").json["events"]]
        for client in (blue, red)
    ]
    assert set(seen[0]) == {1}
    assert set(seen[1]) == {2}
    assert blue.get("/api/servers/lab").status_code == 404


def test_a_wait_ends_without_a_response_if_permission_is_lost_meanwhile(callers):
    """The server got another team's label, or the token was revoked."""
    labels = {"labels": {"team": "blue"}}
    callers.owner.post("/api/servers", json=labels)
    blue = callers.with_scope("manage", labels={"team": "blue"})
    waits = "/api/servers/default?wait_for=queued&wait=20"
    for end, status in (
        (
            lambda: callers.owner.post(
                "/api/servers/default/restart", json={"labels": {"team": "red"}}
            ),
            404,
        ),
        (lambda: callers.owner.delete("/api/tokens/t0"), 401),
    ):
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(blue.get, waits)
            until(lambda: callers.running.services.concurrency._held, what="the request to wait")
            assert end().status_code < 300
            answer = waiting.result()
        assert answer.status_code == status
        callers.owner.post("/api/servers/default/restart", json=labels)


def test_a_limited_token_can_only_create_servers_within_its_limits(callers):
    named = callers.with_scope("manage", servers=("mine-*",))
    assert named.post("/api/servers", json={"name": "mine-1"}).status_code == 201
    assert "named mine-*" in named.post("/api/servers", json={"name": "other"}).json["detail"]
    results = named.post("/api/bulk/start", json={"names": ["mine-2", "other"]})
    assert results.status_code == 403
    labelled = callers.with_scope("manage", labels={"team": "blue"})
    assert "team=blue" in labelled.post("/api/servers", json={"name": "lab"}).json["detail"]
    assert (
        labelled.post("/api/servers", json={"name": "lab", "labels": {"team": "blue"}}).status_code
        == 201
    )
    assert (
        labelled.post("/api/servers/lab/restart", json={"labels": {"team": "red"}}).status_code
        == 403
    )


def test_a_conflict_with_a_server_outside_of_the_limits_has_no_details(callers):
    callers.owner.post("/api/servers", json={"name": "lab"})
    labelled = callers.with_scope("manage", labels={"team": "blue"})
    answer = labelled.post("/api/servers", json={"name": "lab", "labels": {"team": "blue"}})
    assert answer.status_code == 409
    assert "differs" not in answer.json


# Tokens


def test_a_token_is_shown_once_and_stored_as_a_hash(callers):
    made = callers.owner.post(
        "/api/tokens",
        json={"name": "ci", "scope": "manage", "servers": ["ci-*"], "expires-in": "30d"},
    )
    assert made.status_code == 201
    text = made.json["token"]
    assert re.fullmatch(r"lk_[0-9a-f]{12}_[\w-]{43}", text)
    assert callers.with_token(text).get("/api/me").json == {
        "actor": "token:ci", "owner": "local", "scope": "manage",
        "servers": ["ci-*"], "labels": {}, "users": [],
    }  # fmt: skip
    listed = callers.owner.get("/api/tokens")
    assert text not in listed.text
    (token,) = listed.json["tokens"]
    assert (
        token.items()
        >= {"name": "ci", "scope": "manage", "created_by": "token:owner", "expired": False}.items()
    )
    assert token["last_used_at"] is not None
    assert text not in repr(callers.running.store.__dict__)


def test_events_have_their_actor(callers):
    callers.with_scope("manage").post("/api/servers", json={})
    callers.owner.delete("/api/servers/default")
    actors = [
        (event["kind"], event["actor"]) for event in callers.owner.get("/api/events").json["events"]
    ]
    assert actors[0] == ("token", "keeper")
    assert ("state", "token:t0") in actors
    assert actors[-1] == ("state", "token:owner")


def test_a_revoked_token_is_refused_and_ends_streams(callers):
    text = callers.owner.post("/api/tokens", json={"name": "ci", "scope": "read"}).json["token"]
    follower = callers.with_token(text).get("/api/events?follow=true", buffered=False)
    pieces = iter(follower.response)
    assert b"retry" in next(filter(None, pieces))
    assert callers.owner.delete("/api/tokens/ci").json["name"] == "ci"
    callers.owner.post("/api/servers", json={})
    assert b"".join(pieces) == b""
    answer = callers.with_token(text).get("/api/me")
    assert answer.status_code == 401
    assert callers.owner.delete("/api/tokens/ci").json["code"] == "token_not_found"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"name": "x"}, "scope"),
        ({"name": "x", "scope": "root"}, "scope"),
        ({"name": "x", "scope": "admin", "servers": ["a"]}, "cannot be limited"),
        ({"name": "x", "scope": "read", "servers": ["[a]"]}, "servers.0"),
        ({"name": "x", "scope": "read", "expires_in": 0}, "expires_in"),
        ({"name": "X", "scope": "read"}, "name"),
        ({"name": "x", "scope": "read", "users": ["no user"]}, "users.0"),
    ],
)
def test_an_invalid_token_request_is_refused(callers, body, words):
    answer = callers.owner.post("/api/tokens", json=body)
    assert answer.status_code == 422
    assert words in answer.json["detail"]
    assert callers.tokens.all() == []


def test_without_access_control_every_request_is_allowed(running):
    client = create_app(
        replace(running.services, authenticators=[OpenAuthenticator()])
    ).test_client()
    assert client.post("/api/servers", json={}).status_code == 201
    assert client.get("/api/me").json["actor"] == "anybody"
    assert client.get("/api/events").json["events"][-1]["actor"] == "anybody"


def test_refused_requests_are_summarized_in_one_log_line(callers):
    with structlog.testing.capture_logs() as log:
        for _ in range(500):
            assert callers.with_token("wrong").get("/api/servers").status_code == 401
    assert [line["event"] for line in log if line["log_level"] == "warning"] == [
        "requests without a valid token were refused"
    ]


def test_each_caller_has_its_own_rate_limit(running):
    callers = Callers(replace(running, services=replace(running.services, max_request_rate=0.1)))
    reader = callers.with_scope("read")
    assert reader.get("/api/servers").status_code == 200
    answer = reader.get("/api/servers")
    assert (answer.status_code, answer.json["code"]) == (429, "too_many_requests")
    assert 1 <= int(answer.headers["Retry-After"]) <= 10
    assert callers.owner.get("/api/servers").status_code == 200
    assert reader.get("/healthz").status_code == 200


# The Unix socket


@pytest.mark.parametrize(
    ("uid", "is_server", "gets_in"),
    [(os.geteuid(), False, True), (0, False, True), (4242, False, False), (0, True, False)],
)
def test_on_the_unix_socket_the_keepers_user_and_root_need_no_token(
    running, uid, is_server, gets_in
):
    app = create_app(with_peers(running.services, lambda pid: is_server and pid == 77))
    answer = app.test_client().get("/api/me", environ_overrides={PEER: Peer(77, uid, 0)})
    assert answer.status_code == (200 if gets_in else 401)
    if gets_in:
        assert answer.json["actor"] == f"user:{pwd.getpwuid(uid).pw_name}"


def test_a_token_takes_precedence_over_the_peer_of_the_unix_socket(callers):
    reader = callers.with_scope("read")
    assert (
        reader.get("/api/me", environ_overrides={PEER: Peer(77, os.geteuid(), 0)}).json["scope"]
        == "read"
    )


def test_headers_cannot_forge_a_peer(callers):
    for header in (PEER, "Labkeeper.Peer", "labkeeper_peer"):
        assert callers.anonymous.get("/api/me", headers={header: "x"}).status_code == 401


# Links


def test_a_one_time_link_opens_a_lab_once(callers):
    server = callers.owner.post(
        "/api/servers", json={"base_url": "/ada", "default_url": "/lab/tree/a:b.ipynb"}
    ).json
    made = callers.owner.post("/api/servers/default/link", json={})
    assert made.status_code == 201
    assert server["token"] not in made.text
    path = made.json["url"].removeprefix("http://localhost")
    assert callers.anonymous.head(path).status_code == 410
    answer = callers.anonymous.get(path)
    assert answer.status_code == 303
    expected = (
        f"{server['lab_url'].partition('/lab')[0]}/login?token={server['token']}"
        "&next=%2Fada%2Flab%2Ftree%2Fa%253Ab.ipynb"
    )
    assert answer.headers["Location"] == expected
    assert (answer.headers["Referrer-Policy"], answer.headers["Cache-Control"]) == (
        "no-referrer",
        "no-store",
    )
    spent = callers.anonymous.get(path)
    assert spent.status_code == 410
    assert "ask for another" in spent.text


@pytest.mark.parametrize("labs", [LabAddresses("port"), LabAddresses("path")])
def test_a_one_time_link_is_valid_as_long_as_the_token_that_made_it(running, labs):
    """Else it would begin a session after the token's were ended."""
    callers = Callers(FakeKeeper(running.keeper, replace(running.services, labs=labs)))
    callers.owner.post("/api/servers", json={})
    ada = callers.with_scope("manage")
    paths = [
        ada.post("/api/servers/default/link", json={"confirm": confirm})
        .json["url"]
        .partition("/open/")[2]
        for confirm in (False, True)
    ]
    (token,) = callers.tokens.all()
    assert callers.owner.delete(f"/api/tokens/{token.name}").status_code == 200
    for path in paths:
        assert callers.anonymous.get(f"/open/{path}").status_code == 410
        assert callers.anonymous.post(f"/open/{path}").status_code == 410
    assert running.services.sessions.all() == []


def test_a_token_that_is_revoked_as_its_link_is_opened_begins_no_session(running, monkeypatch):
    services = replace(running.services, labs=LabAddresses("path"))
    callers = Callers(FakeKeeper(running.keeper, services))
    callers.owner.post("/api/servers", json={})
    # As the backend has launched it for another mode.
    snapshot = running.keeper.get("default")
    endpoint = replace(
        snapshot.endpoint, base_url="/servers/default/", secure=False, behind_edge=True
    )
    monkeypatch.setattr(running.keeper, "get", lambda _: replace(snapshot, endpoint=endpoint))
    ada = callers.with_scope("manage")
    opened, path, late = (
        ada.post("/api/servers/default/link", json={}).json["url"].partition("/open/")[2]
        for _ in range(3)
    )
    at_home = callers.anonymous.get(f"/open/{opened}", base_url="http://localhost:8000")
    assert at_home.headers["Location"] == f"http://127.0.0.1:8000/open/{opened}"
    assert callers.anonymous.post(f"/open/{opened}", base_url="http://localhost").status_code == 410
    assert services.sessions.all() == []
    lab = {"base_url": "http://127.0.0.1:8000"}
    assert callers.anonymous.get(f"/open/{opened}", **lab).status_code == 303
    use, (token,) = services.links.use, callers.tokens.all()

    def use_and_revoke(ticket):
        link = use(ticket)
        assert callers.owner.delete(f"/api/tokens/{token.name}").status_code == 200
        return link

    monkeypatch.setattr(services.links, "use", use_and_revoke)
    assert callers.anonymous.get(f"/open/{path}", **lab).status_code == 410
    assert services.sessions.all() == []
    assert callers.anonymous.get(f"/open/{late}", **lab).status_code == 410


def test_a_one_time_link_is_valid_for_one_generation(callers):
    callers.owner.post("/api/servers", json={})
    paths = [
        callers.owner.post("/api/servers/default/link", json={"page": "/lab/tree/x"})
        .json["url"]
        .removeprefix("http://localhost")
        for _ in range(2)
    ]
    assert "x" in callers.anonymous.get(paths[0]).headers["Location"]
    assert callers.owner.post("/api/servers/default/rotate-token").status_code == 201
    assert callers.anonymous.get(paths[1]).status_code == 410
    callers.owner.post("/api/servers/default/stop")
    for below in ("link", "rotate-token"):
        answer = callers.owner.post(f"/api/servers/default/{below}", json={})
        assert (answer.status_code, "stopped" in answer.json["detail"]) == (409, True)


def test_a_link_requested_over_the_unix_socket_has_the_keepers_url(running):
    services = replace(running.services, url="http://127.0.0.1:4321")
    client = create_app(services).test_client()
    client.environ_base[PEER] = Peer(1, 0, 0)
    client.post("/api/servers", json={})
    assert (
        client.post("/api/servers/default/link")
        .json["url"]
        .startswith("http://127.0.0.1:4321/open/")
    )


def test_the_keepers_log_does_not_contain_tickets(callers):
    callers.owner.post("/api/servers", json={})
    url = callers.owner.post("/api/servers/default/link").json["url"]
    with structlog.testing.capture_logs() as log:
        callers.anonymous.get(url.removeprefix("http://localhost"))
    assert log
    assert url.rpartition("/")[2] not in repr(log)


def test_rotating_a_token_keeps_kernels_on_a_gateway(callers):
    body = {"gateway_url": "http://gateway:8888"}
    before = callers.owner.post("/api/servers", json=body).json
    for process in callers.running.world.living(ServerName("default")):
        process.kernels = (OwnKernel("k-1"),)
    after = callers.owner.post("/api/servers/default/rotate-token").json
    assert after["state"] == "running"
    assert after["token"] != before["token"]
    assert callers.running.world.kernels_ended == set()
