"""Certificates for the names of Labs, and a browser for which these names exist."""

from __future__ import annotations

import ssl

import httpx
import trustme

DOMAIN = "labs.example.org"
NAMES = (DOMAIN, f"*.{DOMAIN}", "localhost", "127.0.0.1")


class Authority:
    """An authority, and the files of a certificate that it has issued."""

    def __init__(self, directory):
        self._ca = trustme.CA()
        self.directory = directory
        self.file = directory / "ca.pem"
        self._ca.cert_pem.write_to_path(self.file)
        self.cert_file, self.key_file = directory / "cert.pem", directory / "key.pem"
        self.issue()

    def issue(self, *names):
        """Write a certificate and its key, as certbot does; return its settings."""
        leaf = self._ca.issue_cert(*(names or NAMES))
        for path, pem in (
            (self.key_file, leaf.private_key_pem),
            (self.cert_file, leaf.cert_chain_pems[0]),
        ):
            fresh = path.with_suffix(".new")
            fresh.write_bytes(b"")
            fresh.chmod(0o600)
            pem.write_to_path(fresh)
            fresh.replace(path)
        return {"cert_file": self.cert_file, "key_file": self.key_file}

    def context(self):
        return ssl.create_default_context(cafile=self.file)


class Resolved(httpx.HTTPTransport):
    """Reaches every host name at this machine, and checks it against the certificate."""

    def handle_request(self, request):
        return super().handle_request(
            httpx.Request(
                request.method,
                request.url.copy_with(host="127.0.0.1"),
                headers=request.headers,
                stream=request.stream,
                extensions=request.extensions | {"sni_hostname": request.url.host},
            )
        )
