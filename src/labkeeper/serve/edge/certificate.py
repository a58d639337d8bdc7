"""The certificate with which the edge speaks TLS: the keeper reads it, and again when it changes.

The edge of a root keeper could not read it: it has a user of its own.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import structlog

from labkeeper.core.errors import SettingsError
from labkeeper.edge.tls import EncryptedKeyError, context_of

_OTHERS: Final = 0o077
"""Mode bits that grant access to others than the owner."""

_log = structlog.get_logger("labkeeper.serve.edge")


class Certificate:
    """A certificate and its key. Not thread-safe."""

    def __init__(self, cert_file: Path, key_file: Path, *, hsts: bool) -> None:
        """Read both files. Raises SettingsError."""
        self._files = cert_file, key_file
        self._hsts = hsts
        self._seen = [_look(path) for path in self._files]
        self._chain, self._key = self._read()
        if is_readable_by_others(key_file):
            _log.warning("other users can read the key; run `chmod 600` on it", file=str(key_file))

    def message(self) -> dict[str, object]:
        """Return the command that has an edge use it."""
        return {"do": "certificate", "chain": self._chain, "key": self._key, "hsts": self._hsts}

    def renew(self) -> bool:
        """Read changed files; while they are unusable, keep what they were. Return if it is new."""
        state = [_look(path) for path in self._files]
        if state == self._seen:
            return False
        self._seen = state
        try:
            self._chain, self._key = self._read()
        except SettingsError as error:
            _log.warning(
                "the new certificate cannot be used; the previous one stays in use",
                reason=error.message,
            )
            return False
        _log.info("the certificate was renewed", file=str(self._files[0]))
        return True

    def _read(self) -> tuple[str, str]:
        """Return the contents of both files, which an edge can use. Raises SettingsError."""
        with _explained(*self._files):
            chain, key = (path.read_bytes() for path in self._files)
            context_of(chain, key)
            return chain.decode(), key.decode()


def check(cert_file: Path, key_file: Path, prefix: str) -> None:
    """Raise SettingsError unless the files of two settings with this prefix can be used."""
    with _explained(cert_file, key_file, prefix):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert_file, key_file, password=_no_password)


@contextlib.contextmanager
def _explained(cert_file: Path, key_file: Path, prefix: str = "LABKEEPER_") -> Iterator[None]:
    """Raise SettingsError in place of errors of a block that uses the files of two settings."""
    names = f"{prefix}CERT_FILE", f"{prefix}KEY_FILE"
    for path, variable in zip((cert_file, key_file), names, strict=True):
        try:
            path.open("rb").close()
        except OSError as error:
            raise SettingsError(
                f"cannot read the file {path} ({variable}): {error.strerror}"
            ) from error
    try:
        yield
    except EncryptedKeyError as error:
        raise SettingsError(
            f"cannot use the key {key_file} ({names[1]}): it is encrypted; "
            "`openssl pkey -in ... -out ...` writes it in the clear"
        ) from error
    except (ssl.SSLError, UnicodeDecodeError) as error:
        mismatch = getattr(error, "reason", "") == "KEY_VALUES_MISMATCH"
        why = "they do not belong together" if mismatch else "they must be PEM"
        raise SettingsError(
            f"cannot use the certificate {cert_file} ({names[0]}) "
            f"with the key {key_file} ({names[1]}): {why}"
        ) from error


def _no_password() -> str:
    # Otherwise OpenSSL would prompt for it on the terminal.
    raise EncryptedKeyError


def _look(path: Path) -> tuple[int, int, int] | None:
    """Return what differs once a file has changed."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def is_readable_by_others(key_file: Path) -> bool:
    """Whether users other than its owner have access to a key."""
    with contextlib.suppress(OSError):
        return bool(key_file.stat().st_mode & _OTHERS)
    return False
