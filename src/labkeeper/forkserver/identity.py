"""Who uses a Lab, by a header that the edge signs.

The edge and a server share a key for one launch. A token in its place would switch off Jupyter's
checks of the origin and of forged requests (XSRF); a user that an identity provider recognizes does
not.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from typing import Any

HEADER = "X-Labkeeper-Identity"
LIFETIME = 90.0
"""Seconds for which a header is valid; the clock is that of one machine."""
_COLORS = 7
"""JupyterLab has so many colours for collaborators."""


def key_of(secret: str, server: str, generation: int) -> str:
    """Return the key for one launch of a server, from a secret of the keeper and its edges."""
    return _mac(secret, f"{server} {generation}")


def sign(key: str, user: str, now: float) -> str:
    """Return the header's value for a user at a time in seconds since the epoch."""
    told = json.dumps({"user": user, "until": now + LIFETIME})
    text = base64.urlsafe_b64encode(told.encode()).decode()
    return f"{text}.{_mac(key, text)}"


def read(key: str, value: str, now: float) -> str | None:
    """Return the user in a header's value; None unless it was signed with the key, lately."""
    text, _, mac = value.partition(".")
    if not hmac.compare_digest(mac.encode(), _mac(key, text).encode()):
        return None
    told = json.loads(base64.urlsafe_b64decode(text))
    # A header from the future has been signed by a clock that jumped back since.
    return str(told["user"]) if 0 <= told["until"] - now <= LIFETIME else None


def _mac(key: str, text: str) -> str:
    return hmac.new(key.encode(), text.encode(), hashlib.sha256).hexdigest()


def recognize(provider: Any, key: str) -> None:
    """Make an identity provider, the site's or Jupyter's, accept the users that the edge signs.

    Its class stays as it is: Jupyter treats some classes in their own way.
    """
    others = provider.get_user

    async def get_user(handler: Any) -> Any:
        headers = handler.request.headers
        signed = headers.get(HEADER)
        if signed is not None:
            # An app behind jupyter-server-proxy, which gets the others, must not.
            del headers[HEADER]
            handler.user_at_edge = read(key, signed, time.time())
        user = getattr(handler, "user_at_edge", None)
        if user is not None:
            return _jupyter_user(user)
        found = others(handler)
        return await found if hasattr(found, "__await__") else found

    provider.get_user = get_user


def _jupyter_user(name: str) -> Any:
    from jupyter_server.auth import User

    number = int(hashlib.sha256(name.encode()).hexdigest(), 16) % _COLORS + 1
    return User(
        username=name,
        initials=name[:2].upper(),
        color=f"var(--jp-collaborator-color{number})",
    )
