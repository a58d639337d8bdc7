"""Finding the keeper, and the token to show it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from labkeeper.cli.options import Where

if TYPE_CHECKING:
    from labkeeper.client import Client
    from labkeeper.settings import Settings

_WILDCARDS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared, not bound
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})


@contextmanager
def connected(where: Where) -> Iterator[tuple[Client, bool]]:
    """Find the keeper and speak to it; also say whether it is the one of this machine."""
    from labkeeper.client import Client  # noqa: PLC0415 - late
    from labkeeper.settings import ca_file, keeper_url  # noqa: PLC0415 - late

    settings = read_settings(where)
    named = where.url or keeper_url()
    url = named or _found_url(settings)
    is_here = named is None or urlsplit(named).hostname in _LOOPBACK
    door = _door(settings) if named is None else None
    # The generated token belongs to the keeper of this machine: it is not shown to any other. Over its Unix socket it knows us.
    shown = token_of(settings) if is_here and door is None else _own_token(settings)
    with Client(url, token=shown, socket=door, ca_file=ca_file()) as client:
        yield client, is_here


def read_settings(where: Where, **flags: Any) -> Settings:
    """Read the settings; what the command line says wins."""
    from labkeeper.settings import load  # noqa: PLC0415 - late

    if where.state_dir is not None:
        flags.setdefault("state_dir", where.state_dir)
    return load(**flags)


def _found_url(settings: Settings) -> str:
    from labkeeper.statedir import read_address  # noqa: PLC0415 - late

    host = _WILDCARDS.get(settings.host, settings.host)
    host = f"[{host}]" if ":" in host else host
    scheme = "http" if settings.certificate is None else "https"
    return read_address(settings.state_dir) or f"{scheme}://{host}:{settings.port}"


def _door(settings: Settings) -> str | None:
    """Give the path of the Unix socket of the keeper over our state directory, where it has one."""
    from labkeeper.statedir import read_socket  # noqa: PLC0415 - late

    path = read_socket(settings.state_dir)
    return str(path) if path is not None and path.is_socket() else None


def _own_token(settings: Settings) -> str | None:
    return settings.token.get_secret_value() if settings.token else None


def token_of(settings: Settings) -> str | None:
    """Give the API token of the keeper on this machine: the one that was set, or the one that it generated."""
    own = _own_token(settings)
    if own is not None:
        return own
    from labkeeper.statedir import read_token  # noqa: PLC0415 - late

    return read_token(settings.state_dir)
