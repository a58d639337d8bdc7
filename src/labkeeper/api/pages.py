"""The keeper's few pages for people: plain HTML, without scripts or styles."""

from __future__ import annotations

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
_BUTTON: Final = '<form method="post"><button autofocus>{label}</button></form>'


def page(status: HTTPStatus, title: str, *paragraphs: str) -> Response:
    """Return a page of text."""
    content = "\n".join(f"<p>{escape(paragraph)}</p>" for paragraph in paragraphs)
    return _response(status, title, content)


def button(title: str, paragraph: str, label: str, *, leads_to: str) -> Response:
    """Return a page with a button that posts to the page's own address.

    The browser may be redirected from there to the origin `leads_to`.
    """
    content = f"<p>{escape(paragraph)}</p>\n{_BUTTON.format(label=escape(label))}"
    shown = _response(HTTPStatus.OK, title, content)
    shown.headers["Content-Security-Policy"] = (
        f"default-src 'none'; form-action 'self' {leads_to}; frame-ancestors 'none'"
    )
    # Without a referrer, browsers would post with the origin `null`, as pages of other sites may.
    shown.headers["Referrer-Policy"] = "same-origin"
    return shown


def _response(status: HTTPStatus, title: str, content: str) -> Response:
    text = _PAGE.format(title=escape(title), content=content)
    return Response(text, status, content_type="text/html; charset=utf-8")
