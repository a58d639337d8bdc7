"""Who may call what. Each route carries one rule; a route without one does not exist (see `routes.ROUTES`)."""

from __future__ import annotations

import hmac
from enum import StrEnum

from flask import request

from labkeeper.core.errors import NotAuthenticated


class Access(StrEnum):
    """Rules for routes."""

    PUBLIC = "public"
    """Anybody: it tells nothing about servers."""
    TOKEN = "token"  # noqa: S105 - a rule's name
    """Whoever shows the API token."""


def check(rule: Access, token: str | None) -> None:
    """Let the present request through, or raise NotAuthenticated. A `token` of None means that access control is off."""
    if rule is Access.PUBLIC or token is None:
        return
    scheme, _, shown = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(shown.strip().encode(), token.encode()):
        raise NotAuthenticated(
            "cannot answer without a valid token: send 'Authorization: Bearer TOKEN'; "
            "`labkeeper token` shows it on the keeper's machine"
        )
