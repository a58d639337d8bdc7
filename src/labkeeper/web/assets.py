"""The files that the pages load: ours, and vendored ones, which are served as they were published.

`static/vendored/SHA256SUMS` pins the latter; the tests compare them.
"""

from __future__ import annotations

import functools
import hashlib
import io
from importlib import resources
from typing import Final

from flask import Response, request
from werkzeug.exceptions import NotFound
from werkzeug.wsgi import wrap_file

_TYPES: Final = {
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
"""The media types, by the ends of the names; other files are not served."""
_FOREVER: Final = "public, max-age=31536000, immutable"


def address_of(name: str) -> str:
    """Return the path of a file, which changes with its content."""
    return f"/dashboard/static/{_tag(name)}/{name}"


def serve(tag: str, name: str) -> Response:
    """Return a file. Raises NotFound."""
    content = _files().get(name)
    if content is None:
        raise NotFound
    # Served from shared memory: a slow reader holds neither an open file nor a copy.
    answer = Response(wrap_file(request.environ, io.BytesIO(content)), direct_passthrough=True)
    answer.content_type = _TYPES[name.rpartition(".")[2]]
    answer.content_length = len(content)
    # A page of another version may ask for a file that has changed since.
    answer.headers["Cache-Control"] = _FOREVER if tag == _tag(name) else "no-store"
    return answer


@functools.cache
def _files() -> dict[str, bytes]:
    root = resources.files("labkeeper.web") / "static"
    directories = {"": root, "vendored/": root / "vendored"}
    return {
        f"{prefix}{path.name}": path.read_bytes()
        for prefix, directory in directories.items()
        for path in directory.iterdir()
        if path.name.rpartition(".")[2] in _TYPES
    }


@functools.cache
def _tag(name: str) -> str:
    return hashlib.sha256(_files()[name]).hexdigest()[:12]
