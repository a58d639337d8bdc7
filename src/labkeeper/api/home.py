"""Signing in to Labs from a session at the bare host, and signing out of all of them.

Only these pages and the dashboard accept the cookie of that session: the API does not, so no other
site's page can use it.
"""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Final

from flask import Blueprint, Response, request
from werkzeug.exceptions import NotFound

from labkeeper.api.auth import PUBLIC, Rule
from labkeeper.api.browser import needs_own_page
from labkeeper.api.handlers import sign_in
from labkeeper.api.pages import page
from labkeeper.api.services import Services
from labkeeper.core.spec import QualifiedName, parse_qualified_name

SIGN_OUT: Final = "/session/end"
RULES: Final[dict[str, Rule]] = dict.fromkeys(("home.issue", "home.sign_out"), PUBLIC)
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


def pages(services: Services) -> Blueprint:
    """Return the pages."""
    made = Blueprint("home", "labkeeper.home")

    @made.before_request
    def check_host() -> None:
        if not sign_in.is_at(services, None):
            raise NotFound

    def issue() -> Response:
        name, below, nonce = (request.args.get(part, "") for part in ("lab", "page", "nonce"))
        try:
            parse_qualified_name(name)
        except ValueError:
            raise NotFound from None
        if not _DIGEST.fullmatch(nonce):
            raise NotFound
        return sign_in.issue(services, QualifiedName(name), below, nonce)

    def sign_out() -> Response:
        needs_own_page("sign out")
        sign_in.sign_out(services, sign_in.session_of(services, None))
        shown = page(HTTPStatus.OK, "You are signed out", "Of all Labs that you signed in to here.")
        sign_in.delete_session(services, shown, None)
        return shown

    made.add_url_rule(sign_in.ISSUE, "issue", issue)
    made.add_url_rule(SIGN_OUT, "sign_out", sign_out, methods=["POST"])
    return made
