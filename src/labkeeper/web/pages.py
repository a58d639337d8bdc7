"""What a page is: a template with parts that can change while somebody looks at it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final

from flask import Response, g, request
from markupsafe import Markup

from labkeeper.api.handlers import sign_in
from labkeeper.api.handlers.common import caller
from labkeeper.api.home import SIGN_OUT
from labkeeper.api.services import Services
from labkeeper.core.access import Scope
from labkeeper.identity.tokens import digest_of
from labkeeper.web.rendering import render

POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
"""What the pages may load and do (w3.org/TR/CSP3)."""

_PARTIAL: Final = Markup('<hx-partial hx-target="#{}" hx-swap="{}">{}</hx-partial>')


@dataclass(frozen=True, slots=True)
class Content:
    """What a page shows at one time."""

    title: str
    template: str
    """Arranges the parts."""
    parts: Mapping[str, Markup] = field(default_factory=dict)
    """The elements that can change on their own, by their ids."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """What else the template needs."""
    top: str | None = None
    """The template of what stands above and does not change, such as a search."""
    charts: bool = False
    """Whether it has charts, whose library other pages do not load."""

    @property
    def text(self) -> Markup:
        """The page's changing part as a whole."""
        return render(self.template, {"parts": self.parts, **self.given, **of_session()})


def whole(services: Services, content: Content, follow: str | None = None) -> Markup:
    """Return the text of a whole page; `follow` is the address of the stream of its changes."""
    given = {"version": services.version, "content": content, "follow": follow, **of_session()}
    return render("page.html", given)


def html(text: str, status: HTTPStatus = HTTPStatus.OK) -> Response:
    """Return a page, or a piece of one, with its policy."""
    answer = Response(text, status, content_type="text/html; charset=utf-8")
    answer.headers["Content-Security-Policy"] = POLICY
    # Without a referrer, browsers would post with the origin `null`, as pages of other sites may.
    answer.headers["Referrer-Policy"] = "same-origin"
    return answer


def redirect(path: str) -> Response:
    """Return an answer that leads to another page."""
    return Response(status=HTTPStatus.SEE_OTHER, headers={"Location": path})


def csrf_token() -> str:
    """Return what forms of this session must send; empty without access control."""
    session = g.get("session")
    # The digest is in no page, and of no use as a cookie.
    return "" if session is None else digest_of(f"csrf {session.digest}")


def of_session() -> dict[str, object]:
    """Return what all templates know of who looks."""
    who = caller()
    return {
        "csrf": csrf_token(),
        "who": who,
        "may_manage": who.scope.covers(Scope.MANAGE),
        "may_administer": who.scope.covers(Scope.ADMIN) and who.limits.unlimited,
        "may_see_keeper": who.limits.unlimited,
        "sign_out": SIGN_OUT if "session" in g else None,
        "path": request.path,
        "home": sign_in.HOME,
    }


def wants_piece() -> bool:
    """Whether a script asks, which shows pieces of pages."""
    return "HX-Request" in request.headers


def ask(
    services: Services,
    question: str,
    losses: Sequence[str],
    *,
    verb: str,
    back: str,
    stays: bool = False,
) -> Response:
    """Return a question whose button, with a verb, posts to the path that is asked for.

    `losses` are sentences; `back` is the page that it leads back to. `stays`: with scripts, the
    page from which somebody asks stays, since it follows what happens.
    """
    given = {"question": question, "losses": losses, "verb": verb, "back": back, "stays": stays}
    return html(whole(services, Content(question, "question.html", given=given)))


def partial(element: str, content: Markup, swap: str) -> Markup:
    """Return content for the element with an id, for which a script has not asked or not alone."""
    return _PARTIAL.format(element, swap, content)


def notices(services: Services, done: str, wrong: Sequence[str] = ()) -> Response:
    """Return what has come of a command: a piece for a script, else a page."""
    given = {"done": done, "wrong": wrong}
    if wants_piece():
        # Also if a question was asked for, say, which would be shown elsewhere.
        return html(partial("notices", render("notices.html", given), "innerHTML"))
    return html(
        whole(services, Content("Done" if done else "Not done", "outcome.html", given=given))
    )
