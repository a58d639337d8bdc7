"""The certificate with which the edge speaks TLS: the keeper reads it, and again when it changes.

The edge of a root keeper could not read it: it has a user of its own.
"""

from __future__ import annotations

from pathlib import Path

import structlog

from labkeeper.api import tls
from labkeeper.core.errors import SettingsError
from labkeeper.edge.tls import context_of

_log = structlog.get_logger("labkeeper.serve.edge")


class Certificate:
    """A certificate and its key. Not thread-safe."""

    def __init__(self, cert_file: Path, key_file: Path, *, hsts: bool) -> None:
        """Read both files. Raises SettingsError."""
        self._files = cert_file, key_file
        self._hsts = hsts
        self._seen = tls.state_of(*self._files)
        self._chain, self._key = self._read()
        tls.warn_of_readers(key_file)

    def message(self) -> dict[str, object]:
        """Return the command that has an edge use it."""
        return {"do": "certificate", "chain": self._chain, "key": self._key, "hsts": self._hsts}

    def renew(self) -> bool:
        """Read changed files; while they are unusable, keep what they were. Return if it is new."""
        state = tls.state_of(*self._files)
        if state == self._seen:
            return False
        self._seen = state
        try:
            self._chain, self._key = self._read()
        except SettingsError as error:
            tls.log_unusable(error)
            return False
        _log.info("the certificate was renewed", file=str(self._files[0]))
        return True

    def _read(self) -> tuple[str, str]:
        """Return the contents of both files, which an edge can use. Raises SettingsError."""
        with tls.explained(*self._files):
            chain, key = (path.read_bytes() for path in self._files)
            context_of(chain, key)
            return chain.decode(), key.decode()
