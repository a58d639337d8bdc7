"""Pages at the bare host, for browsers that are signed in there, or are to be.

These are the only ones that accept the cookie of that session: the API does not, so no other site's
page can use it.
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
from labkeeper.api.pages import button, page
from labkeeper.api.services import Services
from labkeeper.core.durations import format_time
from labkeeper.core.spec import QualifiedName, parse_qualified_name

RULES: Final[dict[str, Rule]] = dict.fromkeys(("home.show", "home.issue", "home.sign_out"), PUBLIC)
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


def pages(services: Services) -> Blueprint:
    """Return the pages."""
    made = Blueprint("home", "labkeeper.home")

    @made.before_request
    def check_host() -> None:
        if not sign_in.is_at(services, None):
            raise NotFound

    def show() -> Response:
        session = sign_in.session_of(services, None)
        if session is None:
            return page(
                HTTPStatus.UNAUTHORIZED,
                "You are not signed in",
                "Where the keeper runs, `labkeeper session link` prints a link that signs you in.",
            )
        return button(
            "You are signed in",
            f"This browser has the permissions of {session.actor} until "
            f"{format_time(session.expires_at)}: the addresses of their Labs open in it.",
            label="Sign out",
            posts_to=f"{sign_in.HOME}/end",
        )

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

    made.add_url_rule(sign_in.HOME, "show", show)
    made.add_url_rule(sign_in.ISSUE, "issue", issue)
    made.add_url_rule(f"{sign_in.HOME}/end", "sign_out", sign_out, methods=["POST"])
    return made
