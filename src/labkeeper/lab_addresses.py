"""Where the edge serves Labs: below a path of its address, each at a host name, or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from labkeeper import addresses
from labkeeper.core.server import Endpoint
from labkeeper.core.spec import QualifiedName
from labkeeper.edge.routes import LABS
from labkeeper.edge.sessions import SESSION, cookie_name

Mode = Literal["path", "host", "port"]


@dataclass(frozen=True, slots=True)
class LabAddresses:
    """The addresses of Labs, as the settings have them."""

    mode: Mode = "port"
    """`port`: the edge serves none, or there is none."""
    domain: str = ""
    """The domain of the host names, with `host`: `lab` is at `lab.labs.example.org`."""

    @property
    def base_path(self) -> str:
        """The path below which a Lab is launched, with its name; none: at the root."""
        return LABS if self.mode == "path" else ""

    def serves(self, name: QualifiedName, endpoint: Endpoint) -> bool:
        """Whether the edge serves a server, which depends on how it was launched."""
        if not endpoint.behind_edge or endpoint.secure or self.mode == "port":
            return False
        return self.mode == "host" or endpoint.base_url.startswith(f"{LABS}{name}/")

    def origin(self, name: QualifiedName, public: str) -> str:
        """Return the URL, without a path, of a Lab; `public` is the one of the edge, likewise.

        On this machine, Labs and keeper have two host names, and thus are two sites for browsers.
        """
        url = urlsplit(public)
        host = url.hostname or ""
        if self.mode == "host":
            host = self.host(name)
        elif host == "localhost":
            host = "127.0.0.1"
        return addresses.url(url.scheme, host, url.port)

    def host(self, name: QualifiedName) -> str:
        """Return the host name of a Lab. Only with `host`."""
        return f"{name}.{self.domain}"

    def home(self, public: str) -> str | None:
        """Return the URL, without a path, of the bare host; `public` as for `origin`.

        None if there is none: a browser's session at a host that also has Labs could be used by
        every page of a Lab. That is so beyond this machine unless Labs have host names.
        """
        url = urlsplit(public)
        if self.mode == "host":
            return addresses.url(url.scheme, self.domain, url.port)
        if self.mode == "path" and addresses.is_loopback(url.hostname or ""):
            return addresses.url(url.scheme, "localhost", url.port)
        return None

    def is_home(self, host: str) -> bool:
        """Whether a host name is that of the bare host."""
        return host == {"host": self.domain, "path": "localhost", "port": None}[self.mode]

    def is_of(self, name: QualifiedName, host: str) -> bool:
        """Whether a host name is the one at which the edge serves a Lab."""
        if self.mode == "host":
            return host == self.host(name)
        return self.mode == "path" and addresses.is_loopback(host) and not self.is_home(host)

    def cookie(self, name: bytes = SESSION, *, secure: bool) -> str:
        """Return the name of a cookie as browsers get it; `secure`: they use TLS."""
        return cookie_name(name, secure=secure, is_host=self.mode == "host").decode()

    def cookie_path(self, name: QualifiedName) -> str:
        """Return the path for which a browser's session is."""
        return "/" if self.mode == "host" else f"{LABS}{name}/"
