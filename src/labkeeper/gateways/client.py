"""Client of kernel gateways: health checks, kernel queries and kernel deletion.

It sends what Jupyter would send: the same URL, headers, certificates. Sources of the rules:
jupyter_server 2.x (`gateway/gateway_client.py`), the REST API of Jupyter Kernel Gateway and
Enterprise Gateway, all three read and run.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
from concurrent.futures import Future
from contextlib import ExitStack, closing, suppress
from email.utils import parsedate_to_datetime
from typing import Final
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict

from labkeeper import shortage
from labkeeper.bounded_http import Answer, exchange
from labkeeper.core.errors import BackendUnavailable
from labkeeper.core.ports import Clock
from labkeeper.core.server import Failure, FailureClass, GatewayHealth
from labkeeper.core.spec import Gateway
from labkeeper.files import private_copy, read_named
from labkeeper.scrub import Secrets, of_gateway, scrub

_KERNEL_PATH: Final = "/api/kernels/"
_DELETE_WITHIN: Final = 20.0
"""Seconds in which a gateway must end a kernel, which may be a container in a cluster."""
_NO_TLS: Final = "does not speak TLS; use http:// in gateway_url"
_AT_ONCE: Final = 1.0
"""Timeout in seconds of probes for the wrong protocol."""
_MARGIN: Final = 0.5
"""Seconds added to a request's own timeout, since name resolution has none."""


class _Specs(BaseModel):
    """`GET /api/kernelspecs`, as far as it distinguishes a gateway from other servers."""

    model_config = ConfigDict(defer_build=True)

    kernelspecs: dict[str, object]


class _UnfitError(Exception):
    """The gateway is unusable."""

    def __init__(self, kind: FailureClass, why: str) -> None:
        super().__init__(why)
        self.kind = kind


class GatewayClient:
    """Client of gateways. Thread-safe."""

    def __init__(self, clock: Clock, *, timeout: float) -> None:
        """`timeout` is in seconds, for each request as a whole."""
        self._clock = clock
        self._timeout = timeout

    def check(self, gateway: Gateway) -> GatewayHealth:
        """Return a gateway's health: whether it answers, grants access, and acts as a gateway.

        Raises BackendUnavailable if the keeper lacks a thread or a descriptor to ask.
        """
        try:
            count = self._count_specs(gateway)
        except _UnfitError as error:
            failure = Failure(error.kind, f"the gateway {gateway.url} {error}")
            return GatewayHealth(self._clock.time(), failure)
        return GatewayHealth(self._clock.time(), kernelspecs=count)

    def clock_of(self, gateway: Gateway) -> float | None:
        """Return by how many seconds a gateway's clock is ahead of ours; None if it is unknown.

        A gateway that refuses the caller says what time it is, too.
        """
        try:
            answer = self._ask(gateway, "GET", "/api", self._timeout)
            theirs = parsedate_to_datetime(answer.date).timestamp()
        except (OSError, http.client.HTTPException, BackendUnavailable, ValueError):
            return None
        return theirs - self._clock.time()

    def has_kernel(self, gateway: Gateway, kernel_id: str) -> bool:
        """Whether the gateway has a kernel of this id. Raises BackendUnavailable if unknown."""
        status = self._ask_about(gateway, "GET", kernel_id)
        if status not in {http.client.OK, http.client.NOT_FOUND}:
            raise BackendUnavailable(
                f"cannot ask the gateway {gateway.url} about kernel {kernel_id}: "
                f"it answered {status}"
            )
        return status == http.client.OK

    def end_kernel(self, gateway: Gateway, kernel_id: str) -> bool:
        """End a kernel; it is gone on return. Return whether it existed.

        Raises BackendUnavailable.
        """
        status = self._ask_about(gateway, "DELETE", kernel_id, within=_DELETE_WITHIN)
        if status not in {http.client.OK, http.client.NO_CONTENT, http.client.NOT_FOUND}:
            raise BackendUnavailable(
                f"cannot end kernel {kernel_id} on the gateway {gateway.url}: it answered {status}"
            )
        return status != http.client.NOT_FOUND

    def _ask_about(
        self, gateway: Gateway, method: str, kernel_id: str, within: float | None = None
    ) -> int:
        try:
            return self._ask(
                gateway, method, _KERNEL_PATH + kernel_id, within or self._timeout
            ).status
        except (OSError, http.client.HTTPException) as error:
            why = str(error) or type(error).__name__
            raise BackendUnavailable(
                f"cannot ask the gateway {gateway.url} about kernel {kernel_id}: {why}"
            ) from error

    def _count_specs(self, gateway: Gateway) -> int:
        """Return the number of its kernelspecs. Raises _UnfitError, BackendUnavailable."""
        try:
            answer = self._ask(gateway, "GET", "/api/kernelspecs", self._timeout)
        except (OSError, http.client.HTTPException) as error:
            if shortage.is_ours(error):
                raise BackendUnavailable(
                    f"the keeper cannot ask the gateway {gateway.url}: {error}"
                ) from error
            alert = self._alert(gateway) if isinstance(error, ConnectionError) else None
            raise self._diagnosis(gateway, alert or error) from error
        if answer.status == http.client.BAD_REQUEST and self._speaks_tls(gateway):
            raise _speaks_only_tls()
        if answer.status in {http.client.UNAUTHORIZED, http.client.FORBIDDEN}:
            given = (
                "the token that it was shown" if gateway.auth_token else "a caller without a token"
            )
            raise _UnfitError(
                FailureClass.GATEWAY_REFUSED,
                f"refuses {given} ({answer.status}); "
                "check gateway_auth_token, gateway_auth_scheme and gateway_headers",
            )
        if answer.status >= http.client.INTERNAL_SERVER_ERROR:
            raise _UnfitError(
                FailureClass.GATEWAY_UNREACHABLE,
                f"answers {answer.status}: it is out of order; check it, or try later",
            )
        if answer.location and answer.status != http.client.OK:
            # It may repeat credentials.
            place = scrub(answer.location, Secrets(*of_gateway(gateway)))[:200]
            raise _UnfitError(
                FailureClass.NOT_A_GATEWAY,
                f"redirects to {place!r}; if that is the gateway, use it as gateway_url",
            )
        try:
            if answer.status != http.client.OK:
                raise ValueError(f"status {answer.status}")
            return len(_Specs.model_validate_json(answer.body).kernelspecs)
        except ValueError as error:  # Such as pydantic's ValidationError.
            status = f" ({answer.status})" if answer.status != http.client.OK else ""
            raise _UnfitError(
                FailureClass.NOT_A_GATEWAY,
                f"answers, but not as a Jupyter kernel gateway does{status}; "
                "check the host, port and path of gateway_url",
            ) from error

    def _diagnosis(self, gateway: Gateway, error: Exception) -> _UnfitError:
        """Return an error with the cause of a failed request and its remedy."""
        kind = FailureClass.GATEWAY_UNREACHABLE
        match error:
            case ssl.SSLError():
                kind, why = FailureClass.GATEWAY_TLS, _tls_trouble(error)
            case socket.gaierror():
                why = (
                    f"cannot be found: no host is called {urlsplit(gateway.url).hostname!r} here; "
                    "check gateway_url"
                )
            case TimeoutError() if self._speaks_http(gateway):
                # The gateway does not speak TLS, so the handshake timed out.
                kind, why = FailureClass.GATEWAY_TLS, _NO_TLS
            case TimeoutError():
                kind = FailureClass.GATEWAY_TIMEOUT
                why = (
                    f"did not answer within {self._timeout:g} s; "
                    "look at it, or raise LABKEEPER_GATEWAY_TIMEOUT"
                )
            case ConnectionRefusedError():
                why = (
                    "cannot be reached: the connection was refused; "
                    "start it, or check the port of gateway_url"
                )
            case http.client.InvalidURL():
                why = (
                    f"cannot be asked: {error}; "
                    "check gateway_url, gateway_auth_token and gateway_headers"
                )
            case http.client.HTTPException() | ConnectionError() if self._speaks_tls(gateway):
                return _speaks_only_tls()
            case ConnectionError() | http.client.IncompleteRead():
                why = (
                    "breaks the connection off without a whole answer; "
                    "look at it, or check the port of gateway_url"
                )
            case http.client.HTTPException():
                kind = FailureClass.NOT_A_GATEWAY
                why = f"does not speak HTTP ({type(error).__name__}); check the port of gateway_url"
            case _:
                why = f"cannot be reached: {getattr(error, 'strerror', None) or error}"
        return _UnfitError(kind, why)

    def _speaks_http(self, gateway: Gateway) -> bool:
        """Whether the gateway speaks plain HTTP although the URL is https."""
        parts = urlsplit(gateway.url)
        if parts.scheme == "http":
            return False
        with (
            suppress(OSError),
            socket.create_connection(
                (parts.hostname or "", parts.port or 443), timeout=_AT_ONCE
            ) as plain,
        ):
            plain.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return plain.recv(5).startswith(b"HTTP")
        return False

    def _alert(self, gateway: Gateway) -> ssl.SSLError | None:
        """Return the TLS alert of a refused connection, such as for a missing client certificate.

        In TLS 1.3 it follows the handshake. If a request is on its way by then, the gateway may
        reset the connection, and the alert is lost.
        """
        if urlsplit(gateway.url).scheme != "https":
            return None
        try:
            with _connection(gateway, _AT_ONCE) as connection:
                connection.connect()
                connection.sock.recv(1)
        except ssl.SSLError as error:
            return error
        except OSError:
            return None
        return None

    def _speaks_tls(self, gateway: Gateway) -> bool:
        """Whether the gateway speaks TLS although the URL is http."""
        parts = urlsplit(gateway.url)
        if parts.scheme == "https":
            return False
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with suppress(OSError):
            plain = socket.create_connection(
                (parts.hostname or "", parts.port or 80), timeout=self._timeout
            )
            with plain, context.wrap_socket(plain):
                return True
        return False

    def _ask(self, gateway: Gateway, method: str, path: str, within: float) -> Answer:
        """Return the answer to a request, within `within` seconds including name resolution.

        Raises OSError, HTTPException, BackendUnavailable.
        """
        outcome: Future[Answer] = Future()
        asked: list[socket.socket] = []

        def ask() -> None:
            try:
                with _connection(gateway, within) as connection:
                    connection.connect()
                    asked.append(connection.sock)
                    target = urlsplit(gateway.url).path.rstrip("/") + path
                    headers = _headers(gateway)
                    answer = exchange(connection, method, target, headers=headers, within=within)
                    outcome.set_result(answer)
            except Exception as error:  # noqa: BLE001 - passed to the caller
                outcome.set_exception(error)

        # In a thread that is not joined: name resolution has no timeout and cannot be cancelled.
        shortage.start(threading.Thread(target=ask, name="ask-gateway", daemon=True))
        try:
            return outcome.result(within + _MARGIN)
        except OSError:
            # An answer that trickles in would keep its thread for hours.
            for connected in asked:
                with suppress(OSError):
                    socket.socket.shutdown(connected, socket.SHUT_RDWR)
            raise
        except ValueError as error:
            # The name or a header cannot be encoded; Python's message may contain part of a secret.
            raise http.client.InvalidURL("its name, or a header, cannot be sent") from error


def _tls_trouble(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"shows a certificate that is not trusted ({error.verify_message}); "
            "name its authority by gateway_ca_certs"
        )
    # An SSLError raised in Python, not in OpenSSL, has no reason.
    reason = getattr(error, "reason", None)
    if reason in {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"}:
        return _NO_TLS
    return (
        f"cannot agree on TLS ({reason or error}); check gateway_client_cert and gateway_ca_certs"
    )


def _speaks_only_tls() -> _UnfitError:
    return _UnfitError(FailureClass.GATEWAY_TLS, "speaks TLS; use https:// in gateway_url")


def _headers(gateway: Gateway) -> dict[str, str]:
    """Return the headers that Jupyter would send."""
    if gateway.auth_token is None:
        return dict(gateway.headers)
    return {
        **gateway.headers,
        "Authorization": f"{gateway.auth_scheme or 'token'} {gateway.auth_token}",
    }


def _connection(gateway: Gateway, timeout: float) -> closing[http.client.HTTPConnection]:
    parts = urlsplit(gateway.url)
    if parts.scheme == "http":
        return closing(
            http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
        )
    return closing(
        http.client.HTTPSConnection(
            parts.hostname or "", parts.port, timeout=timeout, context=_context(gateway)
        )
    )


def _context(gateway: Gateway) -> ssl.SSLContext:
    """Return the TLS context; its files are read once, safely, and OpenSSL gets copies.

    Raises SSLError.
    """
    context = ssl.create_default_context()
    try:
        with ExitStack() as copies:
            if gateway.ca_certs is not None:
                context.load_verify_locations(
                    copies.enter_context(private_copy(read_named(gateway.ca_certs)))
                )
            mine = [
                read_named(file, gateway.user)
                for file in (gateway.client_cert, gateway.client_key)
                if file is not None
            ]
            shown = [copies.enter_context(private_copy(content)) for content in mine]
            if shown:
                # Without a password, OpenSSL would prompt on the terminal. A certificate file may
                # hold its key.
                context.load_cert_chain(shown[0], shown[-1], password="")
    except ssl.SSLError:
        raise
    except OSError as error:
        raise ssl.SSLError(0, f"its files cannot be read: {error.strerror}") from error
    if not gateway.validate_cert:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context
