"""What stands in a state directory for others to find: where its keeper answers, and the token that was generated for it."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

from labkeeper.files import write_private


def read_address(state_dir: Path) -> str | None:
    """Return the URL of the keeper that runs over a state directory, or was killed over it; None when there is none."""
    return _said(state_dir, "url")


def runs(state_dir: Path) -> bool:
    """Whether the keeper that a state directory tells of is there: its process lives, and is of who wrote that, or of root."""
    import psutil  # noqa: PLC0415 - late: few who look for a keeper need it

    try:
        owner = _address(state_dir).stat().st_uid
        return psutil.Process(_found(state_dir).get("pid", -1)).uids().real in {owner, 0}
    except (OSError, TypeError, ValueError, OverflowError, psutil.Error):
        return False


def read_socket(state_dir: Path) -> Path | None:
    """Return the path of the Unix socket of such a keeper; None when there is none."""
    path = _said(state_dir, "socket")
    return None if path is None else Path(path)


def write_address(state_dir: Path, url: str, socket: Path | None) -> None:
    """Return where this process answers. Raises OSError."""
    said = {"url": url, "socket": None if socket is None else str(socket), "pid": os.getpid()}
    write_private(_address(state_dir), json.dumps(said))


def remove_address(state_dir: Path) -> None:
    """Return that nobody answers any more."""
    _address(state_dir).unlink(missing_ok=True)


def read_token(state_dir: Path) -> str | None:
    """Return the API token that was generated into a state directory; None when there is none, or it is not ours to read."""
    try:
        return _token(state_dir).read_text(encoding="ascii").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def make_token(state_dir: Path) -> str:
    """Generate an API token of 256 bits into a state directory. Raises OSError."""
    token = secrets.token_urlsafe(32)
    write_private(_token(state_dir), token + "\n")
    return token


def _said(state_dir: Path, key: str) -> str | None:
    """Return a text that a keeper has written into its address."""
    value = _found(state_dir).get(key)
    return value if isinstance(value, str) else None


def _found(state_dir: Path) -> dict[str, Any]:
    try:
        found = json.loads(_address(state_dir).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _address(state_dir: Path) -> Path:
    return state_dir / "keeper.json"


def socket_path(state_dir: Path) -> Path:
    """Return where a keeper makes its Unix socket."""
    return state_dir / "keeper.sock"


def _token(state_dir: Path) -> Path:
    return state_dir / "token"
