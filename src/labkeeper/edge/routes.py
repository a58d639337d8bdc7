"""Routes: where a request goes, by its host name or the beginning of its path."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

LABS: Final = "/servers/"
"""The path below which Labs are."""
_NAME: Final = r"[a-z0-9](?:[a-z0-9.-]{0,126}[a-z0-9])?"
_PATH: Final = re.compile(rb"/servers/(" + _NAME.encode() + rb")(/.*)?", re.DOTALL)


class RouteError(ValueError):
    """A message is not a route."""


@dataclass(frozen=True, slots=True)
class Route:
    """One running server."""

    server: str
    """Its qualified name, which is the segment of the path after `/servers/`."""
    generation: int
    host: str
    """The address that it listens on, as this machine reaches it."""
    port: int
    base_url: str
    key: str = field(repr=False)
    """The key that signs who uses it."""

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        return self.host, self.port

    @classmethod
    def parse(cls, message: object) -> Route:
        """Read a route from a message's object. Raises RouteError."""
        match message:
            case {
                "server": str(server),
                "generation": int(generation),
                "host": str(host),
                "port": int(port),
                "base_url": str(base_url),
                "key": str(key),
            } if re.fullmatch(_NAME, server) and 0 < port < 2**16:
                return cls(server, generation, host, port, base_url, key)
        raise RouteError("a route does not fit")


class RouteTable:
    """The routes to all running servers."""

    def __init__(self) -> None:
        self._routes: dict[str, Route] = {}
        self.domain = ""
        """The domain of the Labs' host names; empty: they are below a path."""

    def replace(self, routes: list[Route], kept: Mapping[str, object]) -> None:
        """Replace all routes, except those to servers in `kept` with the generations there."""
        before = self._routes.items()
        taken = {route.address for route in routes}
        stay = {
            name: route
            for name, route in before
            if kept.get(name) == route.generation and route.address not in taken
        }
        self._routes = stay | {route.server: route for route in routes}

    def set(self, route: Route) -> None:
        """Add a route, or replace that of an earlier launch.

        One server listens at an address: another one that had it has ended, though the keeper has
        not noticed yet.
        """
        others = self._routes.items()
        self._routes = {name: other for name, other in others if other.address != route.address}
        self._routes[route.server] = route

    def remove(self, server: str) -> None:
        """Remove the route to a server, if there is one."""
        self._routes.pop(server, None)

    def find(self, server: str) -> Route | None:
        """Return the route to a server, or None."""
        return self._routes.get(server)

    def __contains__(self, server: object) -> bool:
        return server in self._routes

    def __len__(self) -> int:
        return len(self._routes)


class Place(NamedTuple):
    """A Lab's address, as found in a request."""

    server: str
    is_host: bool
    """Whether the Lab has the whole host; else it has a path of it."""
    is_bare: bool = False
    """Whether the path is only the server's name, without a slash after it."""


def place_of(host: bytes, path: bytes, domain: str) -> Place | None:
    """Return the Lab's address that a request is for; None: it is the keeper's.

    With a domain, Labs have host names; else they are below `/servers/NAME/`.
    """
    if not domain:
        found = _PATH.fullmatch(path)
        return None if found is None else Place(found[1].decode(), False, found[2] is None)
    name, dot, rest = host.decode().lower().partition(":")[0].rstrip(".").partition(".")
    # The name of another owner's server has a dot.
    while dot and rest != domain:
        label, dot, rest = rest.partition(".")
        name = f"{name}.{label}"
    return Place(name, True) if dot and re.fullmatch(_NAME, name) else None
