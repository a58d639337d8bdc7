"""Files in a state directory by which clients find its keeper: address, and generated token."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any, Final

from labkeeper.files import write_private

_VERSION: Final = 1
"""Version of the address file; without one it is 1."""


def read_address(state_dir: Path) -> str | None:
    """Return the URL of the keeper that runs or was killed on a state directory, or None."""
    return _said(state_dir, "url")


def runs(state_dir: Path) -> bool:
    """Whether a state directory's keeper runs.

    Its process must live, and belong to the file's owner or to root.
    """
    import psutil  # noqa: PLC0415 - late: 10 ms, for commands without the Unix socket

    try:
        owner = _address(state_dir).stat().st_uid
        return psutil.Process(_found(state_dir).get("pid", -1)).uids().real in {owner, 0}
    except (OSError, TypeError, ValueError, OverflowError, psutil.Error):
        return False


def read_socket(state_dir: Path) -> Path | None:
    """Return the path of that keeper's Unix socket, or None."""
    path = _said(state_dir, "socket")
    return None if path is None else Path(path)


def write_address(state_dir: Path, url: str, socket: Path | None) -> None:
    """Write the address of this process. Raises OSError."""
    said = {
        "version": _VERSION,
        "url": url,
        "socket": None if socket is None else str(socket),
        "pid": os.getpid(),
    }
    write_private(_address(state_dir), json.dumps(said))


def remove_address(state_dir: Path) -> None:
    """Remove the address. Raises OSError."""
    _address(state_dir).unlink(missing_ok=True)


def read_token(state_dir: Path) -> str | None:
    """Return a state directory's generated API token; None if it is missing or unreadable."""
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
    """Return a text from the address file, or None."""
    value = _found(state_dir).get(key)
    return value if isinstance(value, str) else None


def _found(state_dir: Path) -> dict[str, Any]:
    """Return the content of the address file; nothing if it is unreadable or of a newer version."""
    try:
        found = json.loads(_address(state_dir).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    known = isinstance(found, dict) and found.get("version", 1) == _VERSION
    return found if known else {}


def _address(state_dir: Path) -> Path:
    return state_dir / "keeper.json"


def socket_path(state_dir: Path) -> Path:
    """Return the path of a keeper's Unix socket."""
    return state_dir / "keeper.sock"


def _token(state_dir: Path) -> Path:
    return state_dir / "token"
