"""TLS for the WSGI server: certificates that may change at any time, sockets that never wait."""

from __future__ import annotations

import contextlib
import errno
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import structlog

from labkeeper.api import problems
from labkeeper.core.errors import SettingsError
from labkeeper.edge.tls import EncryptedKeyError

_LOOK_EVERY: Final = 1.0
"""Interval in seconds between checks whether the files have changed."""
_OTHERS: Final = 0o077
"""Mode bits that grant access to others than the owner."""
_SPEAKS_TLS: Final = problems.unread(
    400, "Bad Request", "cannot answer plain HTTP: this port speaks TLS; use https://"
)
_REFUSAL: Final = (
    f"HTTP/1.1 400 Bad Request\r\nContent-Type: {problems.MEDIA_TYPE}\r\nConnection: close\r\n"
    f"Content-Length: {len(_SPEAKS_TLS)}\r\n\r\n"
).encode() + _SPEAKS_TLS

_log = structlog.get_logger("labkeeper.api.tls")


class NotYet(Exception):  # noqa: N818 - no error: the loop asks again when the socket is ready
    """Nothing complete has arrived; not an OSError, which makes waitress close the connection."""


class Certificate:
    """A certificate and its key, reloaded from their files. For one thread, except its creation."""

    def __init__(self, cert_file: Path, key_file: Path) -> None:
        """Read both files. Raises SettingsError."""
        self._cert_file, self._key_file = cert_file, key_file
        self._seen = state_of(cert_file, key_file)
        self._context = load(cert_file, key_file)
        self._look_at = time.monotonic() + _LOOK_EVERY
        warn_of_readers(key_file)

    def wrap(self, connection: socket.socket) -> TlsSocket:
        """Return an accepted connection wrapped in TLS. Raises OSError."""
        self._renew()
        return TlsSocket(
            self._context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        )

    def _renew(self) -> None:
        """Reload changed files; while they are unusable, keep the old certificate."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_EVERY
        state = state_of(self._cert_file, self._key_file)
        if state == self._seen:
            return
        self._seen = state
        try:
            self._context = load(self._cert_file, self._key_file)
        except SettingsError as error:
            log_unusable(error)
        else:
            _log.info("the certificate was renewed", file=str(self._cert_file))


def state_of(*paths: Path) -> list[tuple[int, int, int] | None]:
    """Return what differs once one of the files has changed."""
    return [_look(path) for path in paths]


def log_unusable(error: SettingsError) -> None:
    """Log why changed files are not used."""
    _log.warning(
        "the new certificate cannot be used; the previous one stays in use", reason=error.message
    )


def warn_of_readers(key_file: Path) -> None:
    """Log a warning if other users can read the key."""
    with contextlib.suppress(OSError):
        if key_file.stat().st_mode & _OTHERS:
            _log.warning("other users can read the key; run `chmod 600` on it", file=str(key_file))


def _look(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def load(cert_file: Path, key_file: Path, prefix: str = "LABKEEPER_") -> ssl.SSLContext:
    """Return a context for the files of two settings with this prefix. Raises SettingsError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # So that a write never has to wait for a read.
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    with explained(cert_file, key_file, prefix):
        context.load_cert_chain(cert_file, key_file, password=_no_password)
    return context


@contextlib.contextmanager
def explained(cert_file: Path, key_file: Path, prefix: str = "LABKEEPER_") -> Iterator[None]:
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


class TlsSocket:
    """The socket interface that waitress needs, over TLS.

    The loop reads while a thread writes; OpenSSL must not do both for one connection, so each waits
    for its turn, never for the peer. A read takes one record at most and leaves the rest in the
    socket, where poll(2) sees it.
    """

    def __init__(self, connection: ssl.SSLSocket) -> None:
        self._connection = connection
        self._turn = threading.RLock()
        self.greeted = False
        """Whether the handshake is done."""
        self.wants_write = False
        """Whether the last attempt waits until the socket is writable."""

    def recv(self, size: int) -> bytes:
        """Read, after the handshake. Raises NotYet; OSError when the connection is over."""
        with self._turn:
            try:
                self.wants_write = False
                if not self.greeted:
                    self._connection.do_handshake()
                    self.greeted = True
                return self._connection.recv(size)
            except ssl.SSLWantReadError:
                raise NotYet from None
            except ssl.SSLWantWriteError:
                self.wants_write = True
                raise NotYet from None
            except ssl.SSLError as error:
                if error.reason == "HTTP_REQUEST":
                    self._refuse()
                raise ConnectionResetError(errno.ECONNRESET, str(error)) from error

    def send(self, data: bytes) -> int:
        """Write what is possible now, perhaps nothing. Raises OSError at the end."""
        with self._turn:
            try:
                return self._connection.send(data)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return 0
            except ssl.SSLError as error:
                raise ConnectionResetError(errno.ECONNRESET, str(error)) from error

    def close(self) -> None:
        """Send a close notification, if possible without waiting, and close."""
        with self._turn:
            with contextlib.suppress(OSError, ValueError):
                if self.greeted:
                    self._connection.unwrap()
            self._connection.close()

    def setblocking(self, flag: bool) -> None:
        """See `socket.socket`."""
        self._connection.setblocking(flag)

    def fileno(self) -> int:
        """See `socket.socket`."""
        return self._connection.fileno()

    def getsockopt(self, level: int, option: int) -> int:
        """See `socket.socket`."""
        return self._connection.getsockopt(level, option)

    def setsockopt(self, level: int, option: int, value: bytes) -> None:
        """See `socket.socket`."""
        self._connection.setsockopt(level, option, value)

    def shutdown(self, how: int) -> None:
        """End the connection below TLS, without a close notification."""
        socket.socket.shutdown(self._connection, how)

    def _refuse(self) -> None:
        """Tell a caller that speaks plain HTTP to use TLS."""
        with contextlib.suppress(OSError):
            # Unread data would turn the close into a reset, which loses the answer.
            socket.socket.recv(self._connection, 65536)
        with contextlib.suppress(OSError):
            socket.socket.send(self._connection, _REFUSAL)
            socket.socket.shutdown(self._connection, socket.SHUT_WR)
