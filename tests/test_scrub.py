"""Secrets are taken out of text, by their looks and by name; what is none stays."""

from __future__ import annotations

import base64
import sys
import time
from dataclasses import replace
from urllib.parse import quote

import pytest

from labkeeper import scrub
from labkeeper.core.lifecycle import Event, Goal, State
from labkeeper.core.model import Change, Gateway, Snapshot
from labkeeper.testing.fakes import a_spec

SERVER_TOKEN = "0a" * scrub.TOKEN_BYTES
LAB = Snapshot(a_spec("lab"), State.RUNNING, Goal.UP, since=0.0, created_at=0.0)


@pytest.fixture(autouse=True)
def _forgotten():
    yield
    for owner in list(scrub._known):
        scrub.learn(owner, ())


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"at {SERVER_TOKEN}.", "at [secret]."),
        ("http://h:1/lab?token=abc&x=1", "http://h:1/lab?token=[secret]&x=1"),
        ("/lab?a=1&token%3Dabc", "/lab?a=1&token%3D[secret]"),
        ("--ServerApp.password='x' password=hunter2, next", "--ServerApp.password='x' password=[secret], next"),
        ('{"gateway_auth_token": "a b", "name": "x"}', '{"gateway_auth_token": "[secret]", "name": "x"}'),
        ("{'secret': 'abc'}", "{'secret': '[secret]'}"),
        (r"{\"token\": \"abc\"}", r"{\"token\": \"[secret]\"}"),
        ("Authorization: Bearer abcdefgh", "Authorization: Bearer [secret]"),
        ("{'authorization': 'token abcdefgh'}", "{'authorization': 'token [secret]'}"),
        ("Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic [secret]"),
        ("sent bearer abc.def-ghi", "sent bearer [secret]"),
        ("at http://me:hunter2@gateway:8888/x", "at http://[secret]@gateway:8888/x"),
    ],
)
def test_what_looks_like_a_secret_is_hidden(text, left):
    assert scrub.scrub(text) == left
    assert scrub.scrub(left) == left


@pytest.mark.parametrize(
    "text",
    [
        "cannot answer without a valid token: send 'Authorization: Bearer TOKEN'; `labkeeper token` shows it",
        "server 'demo' is ready after 0.105 s",
        "http://127.0.0.1:8888/lab and 5f1c92c4443a8d924169b107b99b4112",
        "/tmp/state/token was not found",
        "",
    ],
)
def test_what_is_none_stays(text):
    assert scrub.scrub(text) == text


@pytest.mark.parametrize("name", ["token", "auth_token", "X-Api-Key", "Authorization", "password", "webhook_secret"])
def test_a_name_says_that_a_value_is_secret(name):
    assert scrub.is_secret(name)


@pytest.mark.parametrize("name", ["event", "tokens_seen", "server", "authorized"])
def test_another_name_does_not(name):
    assert not scrub.is_secret(name)


def test_what_is_known_is_hidden_however_it_is_written():
    secret = "p/ss wörd+1"
    scrub.learn("keeper", [secret, "short"])
    for form in (secret, quote(secret, safe=""), base64.b64encode(secret.encode()).decode().rstrip("=")):
        assert scrub.scrub(f"<{form}>") == "<[secret]>"
    assert scrub.scrub("a short one") == "a short one"
    scrub.learn("keeper", [secret])
    scrub.learn("keeper", [])
    assert scrub.scrub(secret) == secret


def test_what_servers_were_given_is_known_as_long_as_they_are():
    gateway = Gateway("http://g", "ws://g", auth_token="first-token", headers={"Authorization": "Custom its-own-secret"})
    variables = {"env": {"KEY": "variable-one", "HOME": "/home/somebody"}, "kernel_env": {"KERNEL_KEY": "variable-two"}}
    behind = replace(LAB, spec=replace(a_spec("lab"), gateway=gateway, **variables))
    listener = scrub.SecretsOfServers()
    listener.changed(Change(Event.READY, None, behind, 0.0))
    assert scrub.scrub("first-token its-own-secret") == "[secret] [secret]"
    assert scrub.scrub("variable-one variable-two /home/somebody") == "[secret] [secret] /home/somebody"
    revised = replace(behind.spec, gateway=replace(gateway, auth_token="second-token"))
    listener.changed(Change(Event.RESTART, behind, replace(behind, revised=revised), 0.0))
    assert scrub.scrub("first-token second-token") == "[secret] [secret]"
    gone = replace(behind, state=State.STOPPED, goal=Goal.ABSENT)
    listener.changed(Change(Event.DELETE, behind, gone, 0.0))
    assert scrub.scrub("first-token") == "first-token"


def test_a_secret_is_found_wherever_it_stands():
    """At each distance from the places that are looked at first, whatever is before and behind."""
    scrub.learn("keeper", ["kE7f-abc", "longer-than-that-one"])
    for at in range(12):
        assert scrub.scrub("-" * at + "kE7f-abc") == "-" * at + "[secret]"
        assert scrub.scrub("-" * at + "longer-than-that-one.") == "-" * at + "[secret]."


def test_lines_without_secrets_cost_a_part_of_what_the_rule_itself_does():
    """Most lines of a log are such, and a token for reading can have them read again and again."""
    scrub.learn("keeper", ["kE7f-abcdefghijklmnopqrstuvwxyz0123456789"])
    lines = [
        "[I 2026-11-23 22:19:20.559 ServerApp] 101 GET /api/kernels/5f1c92c4-443a/channels?session_id=abc (127.0.0.1) 3.5ms"
    ] * 2000

    def cost(of):
        # What counts coverage follows our lines, and not those of the rule.
        tracer = sys.gettrace()
        sys.settrace(None)
        try:
            begun = time.thread_time()
            for line in lines:
                of(line)
            return time.thread_time() - begun
        finally:
            sys.settrace(tracer)

    assert min(cost(scrub.scrub) for _ in range(5)) < min(cost(scrub._LOOKS.search) for _ in range(5)) / 2


@pytest.mark.parametrize("piece", ["token", "a-", "://a:", "authorization:", "bearer ", "0a", 'token"', "://", 'secret\\"', ":"])
def test_a_hostile_line_costs_little(piece):
    line = piece * (2**16 // len(piece))
    begun = time.thread_time()
    scrub.scrub(line)
    assert time.thread_time() - begun < 1.0
