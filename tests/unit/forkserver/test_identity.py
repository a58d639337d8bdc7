"""The header that tells a Lab who uses it."""

from __future__ import annotations

import asyncio
import base64
import json
from types import SimpleNamespace

import pytest
from jupyter_server.auth import IdentityProvider

from labkeeper.forkserver import identity

KEY = identity.key_of("secret", "lab", 3)
NOW = 1_000_000.0


def test_a_signed_user_is_read_until_the_signature_expires():
    value = identity.sign(KEY, "ada", NOW)
    for later in (0, 45, identity.LIFETIME):
        assert identity.read(KEY, value, NOW + later) == "ada"
    for later in (-0.1, identity.LIFETIME + 0.1):
        assert identity.read(KEY, value, NOW + later) is None


@pytest.mark.parametrize(
    "other",
    [
        identity.key_of("secret", "lab", 4),
        identity.key_of("secret", "other", 3),
        identity.key_of("other", "lab", 3),
        "",
    ],
)
def test_a_signature_is_for_one_launch(other):
    assert identity.read(KEY, identity.sign(other, "ada", NOW), NOW) is None


def test_anything_else_is_nobody():
    text, _, mac = identity.sign(KEY, "ada", NOW).partition(".")
    forged = base64.urlsafe_b64encode(json.dumps({"user": "bob", "until": NOW + 9}).encode())
    for value in ("", ".", text, f"{text}.", f".{mac}", f"{forged.decode()}.{mac}", "ä.ö", "\0"):
        assert identity.read(KEY, value, NOW) is None


def handler(value, monkeypatch):
    monkeypatch.setattr(identity.time, "time", lambda: NOW)
    headers = {} if value is None else {identity.HEADER: value}
    return SimpleNamespace(request=SimpleNamespace(headers=headers))


def test_a_provider_knows_the_edges_users_beside_its_own(monkeypatch):
    """Whether it answers at once, as Jupyter allows, or later."""
    at_once, later = IdentityProvider(token="x"), IdentityProvider(token="x")
    at_once.get_user = lambda _handler: "its own"

    async def get_user(_handler):
        return "its own"

    later.get_user = get_user
    for provider in (at_once, later):
        identity.recognize(provider, KEY)
        known = handler(identity.sign(KEY, "ada", NOW), monkeypatch)
        user = asyncio.run(provider.get_user(known))
        assert (user.username, user.display_name, user.initials) == ("ada", "ada", "AD")
        assert user.color.startswith("var(--jp-collaborator-color")
        for value in (None, "", "forged.x"):
            assert asyncio.run(provider.get_user(handler(value, monkeypatch))) == "its own"


def test_the_header_is_not_left_to_handlers_that_forward_their_request(monkeypatch):
    """As those of jupyter-server-proxy do; whoever asks again still learns the user."""
    provider = IdentityProvider(token="x")
    identity.recognize(provider, KEY)
    known = handler(identity.sign(KEY, "ada", NOW), monkeypatch)
    for _ in range(2):
        assert asyncio.run(provider.get_user(known)).username == "ada"
        assert known.request.headers == {}
