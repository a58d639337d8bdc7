"""Scrubbing: secrets are recognized by form, by name and by value; other text is unchanged."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from urllib.parse import quote

import pytest

from labkeeper import scrub
from labkeeper.core.lifecycle import Event, Goal, State
from labkeeper.core.messages import Change
from labkeeper.core.server import Snapshot
from labkeeper.core.spec import Gateway
from labkeeper.testing.fakes import a_spec

SERVER_TOKEN = "0a" * scrub.TOKEN_BYTES
LAB = Snapshot(a_spec("lab"), State.RUNNING, Goal.UP, since=0.0, created_at=0.0)


@pytest.fixture
def servers():
    """The subscriber that learns secrets of servers; they are forgotten after the test."""
    listener = scrub.SecretsOfServers()
    yield listener
    for name in list(scrub._servers):
        listener.changed(change(state=State.STOPPED, goal=Goal.ABSENT, spec=a_spec(name)))


def change(event=Event.READY, **fields):
    return Change(event, LAB, replace(LAB, **fields), 0.0)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"at {SERVER_TOKEN}.", "at [secret]."),
        ("http://h:1/lab?token=abc&x=1", "http://h:1/lab?token=[secret]&x=1"),
        ("/lab?a=1&token%3Dabc", "/lab?a=1&token%3D[secret]"),
        (
            "--ServerApp.password='x' password=hunter2, next",
            "--ServerApp.password='x' password=[secret], next",
        ),
        (
            '{"gateway_auth_token": "a b", "name": "x"}',
            '{"gateway_auth_token": "[secret]", "name": "x"}',
        ),
        ("{'secret': 'abc'}", "{'secret': '[secret]'}"),
        (r"{\"token\": \"abc\"}", r"{\"token\": \"[secret]\"}"),
        ("Authorization: Bearer abcdefgh", "Authorization: Bearer [secret]"),
        ("{'authorization': 'token abcdefgh'}", "{'authorization': 'token [secret]'}"),
        ("Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic [secret]"),
        ("sent bearer abc.def-ghi", "sent bearer [secret]"),
        ("at http://me:hunter2@gateway:8888/x", "at http://[secret]@gateway:8888/x"),
    ],
)
def test_text_that_looks_like_a_secret_is_hidden(text, left):
    assert scrub.scrub(text) == left
    assert scrub.scrub(left) == left


@pytest.mark.parametrize(
    "text",
    [
        (
            "cannot answer without a valid token: send 'Authorization: Bearer TOKEN';"
            " `labkeeper token` shows it"
        ),
        "server 'demo' is ready after 0.105 s",
        "http://127.0.0.1:8888/lab and 5f1c92c4443a8d924169b107b99b4112",
        "/tmp/state/token was not found",
        "",
    ],
)
def test_other_text_is_unchanged(text):
    assert scrub.scrub(text) == text


@pytest.mark.parametrize(
    "name", ["token", "auth_token", "X-Api-Key", "Authorization", "password", "webhook_secret"]
)
def test_names_of_secrets_are_recognized(name):
    assert scrub.is_secret(name)


@pytest.mark.parametrize("name", ["event", "tokens_seen", "server", "authorized"])
def test_other_names_are_not_secret(name):
    assert not scrub.is_secret(name)


def test_a_known_secret_is_hidden_in_every_encoding():
    secret = "p/ss wörd+1"
    known = scrub.Secrets(secret, "short")
    for form in (
        secret,
        quote(secret, safe=""),
        base64.b64encode(secret.encode()).decode().rstrip("="),
    ):
        assert scrub.scrub(f"<{form}>", known) == "<[secret]>"
    assert scrub.scrub("a short one", known) == "a short one"
    known.learn(tuple)
    assert scrub.scrub(secret, known) == secret


def test_variables_and_gateway_credentials_of_a_server_are_hidden(servers):
    gateway = Gateway(
        "http://g",
        "ws://g",
        auth_token="first-token",
        headers={"Authorization": "Custom its-own-secret"},
    )
    variables = {
        "env": {"KEY": "variable-one", "HOME": "/home/somebody"},
        "kernel_env": {"KERNEL_KEY": "variable-two"},
    }
    spec = replace(a_spec("lab"), gateway=gateway, **variables)
    servers.changed(change(spec=spec))
    lab = scrub.of_server("lab")
    assert scrub.scrub("first-token its-own-secret", lab) == "[secret] [secret]"
    assert (
        scrub.scrub("variable-one variable-two /home/somebody", lab)
        == "[secret] [secret] /home/somebody"
    )
    revised = replace(spec, gateway=replace(gateway, auth_token="second-token"))
    servers.changed(change(Event.RESTART, spec=spec, revised=revised))
    assert scrub.scrub("first-token second-token", lab) == "[secret] [secret]"


KEY_FILE = (
    "-----BEGIN KEY-----\r\nMIIEvQIBADANBgkq\r\n  hkiG9w0BAQEFAASC\r\nQ==\r\n-----END KEY-----\r\n"
)


def test_each_line_of_a_multiline_secret_is_hidden():
    """Logs usually contain single lines. Lines too short to be secrets are hidden within the
    whole.
    """
    known = scrub.Secrets(KEY_FILE)
    for line in KEY_FILE.split()[2:4]:
        assert scrub.scrub(f"key: {line}", known) == "key: [secret]"
    assert scrub.scrub(f"{{{json.dumps(KEY_FILE)}}}", known) == '{"[secret]"}'
    assert scrub.scrub(KEY_FILE, known) == "[secret]"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DB_PASSWORD", "/correcthorse"),
        ("PGPASSWORD", "/correct/horse"),
        ("AWS_SECRET_ACCESS_KEY", "/tmp/k/Xy9Hk2mQ"),
        ("SALT", "/Xy9Hk2mQ"),
        ("SALT", "/xy9hk2mq"),
        ("SALT", "/etc/a+b=="),
        ("SALT", "/usr/bin:Xy9Hk2mQ"),
    ],
)
def test_a_secret_may_begin_like_a_path(servers, name, value):
    servers.changed(change(spec=replace(LAB.spec, env={name: value})))
    assert scrub.scrub(f"<{value}>", scrub.of_server("lab")) == "<[secret]>"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HOME", "/home/somebody"),
        ("DATA", "/data1/a b/x-2.csv"),
        ("NOTEBOOKS", "/Users/ada/Notebooks 2/"),
        ("PATH", "/usr/local/bin:/usr/bin:/bin"),
        ("DB_PASSWORD_FILE", "/run/secrets/db"),
        ("SSH_AUTH_SOCK", "/tmp/ssh-Xy9Hk2mQ/agent.42"),
    ],
)
def test_a_path_is_not_a_secret(servers, name, value):
    servers.changed(change(spec=replace(LAB.spec, env={name: value})))
    assert scrub.scrub(f"<{value}>", scrub.of_server("lab")) == f"<{value}>"


def test_a_deleted_servers_secrets_stay_hidden_for_those_who_read_its_log(servers):
    """A new server of the same name has its own secrets; only readers that begin later know
    them.
    """
    servers.changed(change(spec=replace(LAB.spec, env={"A": "variable-one"})))
    reader = scrub.of_server("lab")
    servers.changed(change(Event.DELETE, state=State.STOPPED, goal=Goal.ABSENT))
    assert scrub.scrub("variable-one", scrub.of_server("lab")) == "variable-one"
    servers.changed(change(spec=replace(LAB.spec, env={"A": "variable-two"})))
    assert scrub.scrub("variable-one variable-two", reader) == "[secret] variable-two"
    assert (
        scrub.scrub("variable-one variable-two", scrub.of_server("lab")) == "variable-one [secret]"
    )


class Untouchable(dict):
    """Variables that must not be read."""

    def items(self):
        raise AssertionError("the variables were read")

    values = items


def test_only_the_secrets_of_the_server_in_question_are_read(
    servers,
):
    for name in ("one", "two"):
        servers.changed(change(spec=replace(a_spec(name), env=Untouchable({"A": "others-secret"}))))
    servers.changed(change(spec=replace(LAB.spec, env={"A": "its-own-secret"})))
    assert (
        scrub.scrub("its-own-secret others-secret", scrub.of_server("lab"))
        == "[secret] others-secret"
    )
    with pytest.raises(AssertionError, match="were read"):
        scrub.of_server("one").hide("a text")


def test_a_secret_is_found_at_any_position():
    """At each offset from the positions that are searched first, whatever precedes or follows
    it.
    """
    known = scrub.Secrets("kE7f-abc", "longer-than-that-one")
    for at in range(12):
        assert scrub.scrub("-" * at + "kE7f-abc", known) == "-" * at + "[secret]"
        assert scrub.scrub("-" * at + "longer-than-that-one.", known) == "-" * at + "[secret]."


def test_adjacent_and_overlapping_secrets_are_found():
    known = scrub.Secrets("kE7f-abc", "kE7f-abcdefgh", "abcdefgh-xyz", "defg-beside")
    assert scrub.scrub("<kE7f-abcdefgh-xyz>", known) == "<[secret]>"
    assert scrub.scrub("<kE7f-abcdefg->", known) == "<[secret]defg->"
    assert scrub.scrub("<kE7f-abcdefg-beside>", known) == "<[secret]>"


@pytest.mark.parametrize("size", [8, 15, 16, 17, 31, 32, 63, 64, 65, 128, 1000, 100_000])
def test_a_long_secret_is_hidden_as_a_whole(size):
    secret = "".join(f"{number:x}." for number in range(size))[:size]
    assert scrub.scrub(f"<{secret}>", scrub.Secrets(secret)) == "<[secret]>"


@pytest.mark.parametrize(
    "piece", ["token", "a-", "://a:", "bearer ", "0a", 'token"', "://", 'secret\\"', ":"]
)
def test_scrubbing_hostile_text_takes_linear_time(piece):
    """Text that is nearly a secret, in front of one."""
    # More than a few steps per character would exceed the test's timeout.
    text = piece * (2**21 // len(piece))
    assert scrub.scrub(f"{text} token=abc") == f"{text} token=[secret]"


def test_scrubbing_a_long_secret_takes_linear_time():
    """As above, where all of the text is hidden."""
    assert scrub.scrub("authorization:" * 2**17) == "authorization:[secret]"


MANY = ["A" * 8 + f"{number:05}" for number in range(20_000)] + [
    "A" * size for size in range(8, 700)
]


@pytest.mark.parametrize(
    ("line", "scrubbed"),
    [
        ("A" * 79 + "z", "[secret]z" * (2**18 // 80)),
        ("A" * 1000, "[secret]"),
        ("AAAAAAAA19999", "[secret]"),
    ],
)
def test_scrubbing_with_many_secrets_takes_linear_time(line, scrubbed):
    """As above, even if all secrets share a prefix and the text consists of such prefixes."""
    assert scrub.scrub(line * (2**18 // len(line)), scrub.Secrets(*MANY)) == scrubbed
