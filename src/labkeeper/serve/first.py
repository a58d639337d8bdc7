"""Starts a first server together with the keeper, through the keeper's own API."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from labkeeper.core.errors import LabkeeperError
from labkeeper.serve.process import Ended

if TYPE_CHECKING:
    from labkeeper.client import Client


def own_client(url: str, path: Path | None, token: str | None) -> Client:
    """Return a client of this keeper, over the Unix socket if there is one.

    The keeper's certificate may be for another name.
    """
    from labkeeper.client import Client  # noqa: PLC0415 - late: 30 ms, and few keepers start one

    return Client(url, token=token) if path is None else Client(url, socket=str(path))


def start_first(
    connect: Callable[[], Client], announce: Callable[[str], None], ended: Ended, at_terminal: bool
) -> None:
    """Start the default server as any client would, and announce its link or its failure."""
    announce("starting JupyterLab ...")
    try:
        with connect() as client:
            server = client.create()
            if at_terminal:
                from labkeeper.client.opening import opening_url  # noqa: PLC0415 - late, as above

                announce(f"JupyterLab is ready: {opening_url(client, server)}")
            else:
                announce("JupyterLab is ready: `labkeeper open --print` gives its link")
    except LabkeeperError as error:
        if ended.is_set():
            return
        announce(f"no first server: {error.message}")
        for line in error.details.get("log_tail", ()):
            announce(f"  {line}")
    announce("Ctrl-C stops everything.")
