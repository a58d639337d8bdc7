"""Finding the keeper and its token.

The late imports take most of a command's time; `--help` and `--version` need none of them.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from labkeeper.cli.options import Where
from labkeeper.core.errors import Unreachable
from labkeeper.settings.location import ca_file, certain_state_dir, keeper_url

if TYPE_CHECKING:
    from labkeeper.client import Client
    from labkeeper.settings.model import Settings

_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_UNUSED: Final = ("pygments", "rich")
"""Modules that structlog and httpx import if installed, for output that we do not use."""


@contextmanager
def loading() -> Iterator[None]:
    """Import faster: without garbage collection, and without optional modules that go unused."""
    gc.disable()
    # None means that it cannot be imported.
    hidden: dict[str, Any] = {name: None for name in _UNUSED if name not in sys.modules}
    sys.modules.update(hidden)
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        gc.enable()


@dataclass(frozen=True, slots=True)
class Location:
    """A keeper, and how to authenticate to it."""

    url: str
    is_here: bool
    """Whether it is on this machine."""
    token: str | None = field(repr=False)
    token_if_asked: str | None = field(repr=False)
    """To be sent only if the keeper does not know us without one."""
    socket: str | None = None
    """Path of its Unix socket."""


@contextmanager
def connected(where: Where) -> Iterator[tuple[Client, bool]]:
    """Connect to the keeper; also yield whether it is on this machine. Raises Unreachable."""
    with loading():
        from labkeeper.client import Client  # noqa: PLC0415 - late

    found = locate(where)
    with Client(
        found.url,
        token=found.token,
        token_if_asked=found.token_if_asked,
        socket=found.socket,
        ca_file=ca_file(),
    ) as client:
        yield client, found.is_here


def locate(where: Where) -> Location:
    """Find the keeper and our token. Raises Unreachable, SettingsError."""
    settings = read_settings(where)
    named = where.url or keeper_url()
    is_here = named is None or urlsplit(named).hostname in _LOOPBACK
    unix_socket = _unix_socket(settings) if named is None else None
    url = named or _found_url(settings, unix_socket)
    own = _own_token(settings)
    shown = token_of(settings) if unix_socket is None and _is_ours(settings, url) else own
    # Over its Unix socket the keeper knows us, unless it may mistake us for a leftover of a server.
    if_asked = token_of(settings) if unix_socket is not None and own is None else None
    return Location(url, is_here, shown, if_asked, unix_socket)


def locate_quickly(where: Where) -> Location | None:
    """Find the keeper as `locate` does, without loading the settings; None if that takes them."""
    from labkeeper.discovery import read_address, read_socket, read_token  # noqa: PLC0415 - late

    state_dir = certain_state_dir(where.state_dir) if where.url is None else None
    if state_dir is None:
        return None
    url, path = read_address(state_dir), read_socket(state_dir)
    if url is None or path is None or not path.is_socket():
        return None
    return Location(url, True, None, read_token(state_dir), str(path))


def read_settings(where: Where, **flags: Any) -> Settings:
    """Load the settings; the command line takes precedence."""
    from labkeeper.settings.sources import load  # noqa: PLC0415 - late

    if where.state_dir is not None:
        flags.setdefault("state_dir", where.state_dir)
    return load(**flags)


def _found_url(settings: Settings, unix_socket: str | None) -> str:
    """Return the URL of our state directory's keeper.

    Raises Unreachable if none runs: its port may have been reused.
    """
    from labkeeper.discovery import read_address, runs  # noqa: PLC0415 - late

    url = read_address(settings.state_dir)
    if url is None or (unix_socket is None and not runs(settings.state_dir)):
        raise Unreachable(
            f"cannot find a keeper: none runs on the state directory {settings.state_dir}; "
            "`labkeeper serve` starts one, and --url names one elsewhere"
        )
    return url


def _is_ours(settings: Settings, url: str) -> bool:
    """Whether our state directory's keeper answers there; only it may see its generated token."""
    from labkeeper.discovery import read_address, runs  # noqa: PLC0415 - late

    return url.rstrip("/") == read_address(settings.state_dir) and runs(settings.state_dir)


def _unix_socket(settings: Settings) -> str | None:
    """Return the Unix socket of our state directory's keeper, if it has one."""
    from labkeeper.discovery import read_socket  # noqa: PLC0415 - late

    path = read_socket(settings.state_dir)
    return str(path) if path is not None and path.is_socket() else None


def _own_token(settings: Settings) -> str | None:
    return settings.token.get_secret_value() if settings.token else None


def token_of(settings: Settings) -> str | None:
    """Return the API token of the keeper on this machine, either configured or generated."""
    own = _own_token(settings)
    if own is not None:
        return own
    from labkeeper.discovery import read_token  # noqa: PLC0415 - late

    return read_token(settings.state_dir)
