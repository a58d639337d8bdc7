"""The keeper's few pages for people: plain HTML, without scripts or styles."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from http import HTTPStatus
from typing import Final

from flask import Response

_PAGE: Final = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<h1>{title}</h1>
{content}
</html>
"""
_BUTTON: Final = '<form method="post"{action}><button autofocus>{label}</button></form>'


def page(status: HTTPStatus, title: str, *paragraphs: str) -> Response:
    """Return a page of text."""
    return _response(status, title, _text(paragraphs))


def button(
    title: str,
    *paragraphs: str,
    label: str,
    status: HTTPStatus = HTTPStatus.OK,
    posts_to: str = "",
    leads_to: str = "",
    quoted: Sequence[str] = (),
) -> Response:
    """Return a page with a button that posts to the path `posts_to`, or the page's own address.

    The browser may be redirected from there to the origin `leads_to`. The lines `quoted`, such as
    of a log, are shown below.
    """
    action = f' action="{escape(posts_to)}"' if posts_to else ""
    content = f"{_text(paragraphs)}\n{_BUTTON.format(action=action, label=escape(label))}"
    if quoted:
        content += f"\n<pre>{escape(chr(10).join(quoted))}</pre>"
    shown = _response(status, title, content)
    targets = f"'self' {leads_to}".rstrip()
    shown.headers["Content-Security-Policy"] = (
        f"default-src 'none'; form-action {targets}; frame-ancestors 'none'"
    )
    # Without a referrer, browsers would post with the origin `null`, as pages of other sites may.
    shown.headers["Referrer-Policy"] = "same-origin"
    return shown


def _text(paragraphs: Sequence[str]) -> str:
    return "\n".join(f"<p>{escape(paragraph)}</p>" for paragraph in paragraphs)


def _response(status: HTTPStatus, title: str, content: str) -> Response:
    text = _PAGE.format(title=escape(title), content=content)
    return Response(text, status, content_type="text/html; charset=utf-8")
