"""Checks of certificates: whether they can be used, and until when.

Python's `ssl` shows the content of certificates only of peers, so it is read by a handshake in
memory.
"""

from __future__ import annotations

import shlex
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from labkeeper import addresses
from labkeeper.core.errors import SettingsError
from labkeeper.doctor.case import Case
from labkeeper.doctor.findings import Finding, ok, problem, setting, warning
from labkeeper.edge.tls import EncryptedKeyError
from labkeeper.serve.edge import certificate

_SOON: Final = 14 * 86400.0
"""Seconds before its end in which a certificate should have been renewed."""
_API: Final = "LABKEEPER_"
"""Prefix of the settings that name the certificate of the API."""
_CERTBOT: Final = Path("/etc/letsencrypt")

_NO_CHECK_TIME: Final = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which Python has no name for."""
_ROUNDS: Final = 4
"""More than a handshake takes."""


@dataclass(frozen=True, slots=True)
class Validity:
    """What a certificate says of itself; times in seconds since the epoch."""

    begins: float
    ends: float
    names: tuple[str, ...]
    """Host names and addresses."""


def tls(case: Case) -> Iterator[Finding]:
    """Whether the certificates of the API and of JupyterLab can be used, and for how long."""
    chosen = case.settings
    if chosen.certificate is not None:
        yield _pair(case, _API, *chosen.certificate)
    if chosen.lab_certificate is not None:
        yield _pair(case, "LABKEEPER_LAB_", *chosen.lab_certificate)
    if chosen.certificate is not None:
        return
    if addresses.is_loopback(chosen.host):
        yield ok("TLS", "the API does without it, and only this machine reaches it")
    else:
        yield warning(
            "TLS",
            f"the API listens on {chosen.host} without TLS: whoever intercepts the traffic can "
            "read tokens, unless a proxy in front speaks TLS",
            setting("host", "127.0.0.1"),
        )


def _pair(case: Case, prefix: str, cert_file: Path, key_file: Path) -> Finding:
    """Judge the files of a certificate and its key, which two settings with a prefix name."""
    try:
        if prefix == _API:
            certificate.Certificate(cert_file, key_file, hsts=False)
        else:
            certificate.check(cert_file, key_file, prefix)
        valid = validity(cert_file, key_file)
    except SettingsError as error:
        why = error.message.partition("; ")[0]
        return problem("TLS", why, _mend(case, error.__cause__, prefix, cert_file, key_file))
    except (OSError, ValueError) as error:
        return problem("TLS", f"clients would refuse {cert_file}: {error}", _renew(cert_file))
    if certificate.is_readable_by_others(key_file) and prefix == _API:
        why = f"other users can read the key {key_file}"
        return warning("TLS", why, f"chmod 600 {_quoted(key_file)}")
    return _in_time(valid, cert_file)


def _in_time(valid: Validity, cert_file: Path) -> Finding:
    """Judge the time for which a certificate is valid."""
    now, begins, ends = time.time(), _moment(valid.begins), _moment(valid.ends)
    if valid.ends < now:
        return problem("TLS", f"{cert_file} expired at {ends}", _renew(cert_file))
    if valid.begins > now:
        return problem("TLS", f"{cert_file} is not valid before {begins}", _renew(cert_file))
    if valid.ends < now + _SOON:
        return warning("TLS", f"{cert_file} expires soon, at {ends}", _renew(cert_file))
    names = ", ".join(valid.names)
    return ok("TLS", f"{cert_file} is valid until {ends}, for {names}")


def _moment(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def _mend(
    case: Case, cause: BaseException | None, prefix: str, cert_file: Path, key_file: Path
) -> str:
    """Return what mends files that cannot be used. Never replaces a certificate that is there."""
    match cause:
        case FileNotFoundError() if not cert_file.exists() and not key_file.exists():
            return _self_signed(case, cert_file, key_file)
        case FileNotFoundError():
            return f"write both {cert_file} and {key_file}, which belong together"
        case PermissionError():
            return f"sudo chown $(id -u) {_quoted(cert_file)} {_quoted(key_file)}"
        case EncryptedKeyError():
            clear = key_file.with_name(f"{key_file.name}.clear")
            use = f"export {prefix}KEY_FILE={_quoted(clear)}"
            return f"openssl pkey -in {_quoted(key_file)} -out {_quoted(clear)} && {use}"
    return f"write a certificate to {cert_file} and its key to {key_file}, both as PEM"


def _self_signed(case: Case, cert_file: Path, key_file: Path) -> str:
    """Return the command that makes a certificate, which clients have to be told to trust."""
    name = case.settings.lab_domain or case.settings.advertised_host or "localhost"
    subject = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name},DNS:*.{name}"]
    kind = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "90"]
    files = ["-out", str(cert_file), "-keyout", str(key_file)]
    return shlex.join(["openssl", "req", *kind, *subject, *files])


def _renew(cert_file: Path) -> str:
    if cert_file.resolve().is_relative_to(_CERTBOT):
        return "sudo certbot renew"
    return f"have its authority renew it, and write the new one to {cert_file}: it is read at once"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def validity(cert_file: Path, key_file: Path) -> Validity:
    """Return the validity of a certificate, whose key is not encrypted. Raises OSError, ValueError.

    That includes ssl.SSLError.
    """
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(cert_file, key_file)
    found = _shown(server, cert_file.read_text(encoding="utf-8"))
    return Validity(
        ssl.cert_time_to_seconds(found["notBefore"]),
        ssl.cert_time_to_seconds(found["notAfter"]),
        tuple(name for _, name in found.get("subjectAltName", ())),
    )


def _shown(server: ssl.SSLContext, trusted: str) -> dict[str, Any]:
    """Return the certificate that a server shows to a client who trusts it. Raises SSLError."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.load_verify_locations(cadata=trusted)
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VerifyFlags(_NO_CHECK_TIME)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(to_client, to_server)
    theirs = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(_ROUNDS):
        for side in (ours, theirs):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return dict(ours.getpeercert() or {})
