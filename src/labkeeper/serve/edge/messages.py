"""What keeper and edge tell each other of sessions, visits and routes."""

from __future__ import annotations

from labkeeper import addresses
from labkeeper.core.access import Session
from labkeeper.core.server import Snapshot, Visits
from labkeeper.edge import wire
from labkeeper.edge.routes import Route
from labkeeper.forkserver.identity import key_of
from labkeeper.lab_addresses import LabAddresses


def session_message(session: Session) -> dict[str, object]:
    """Return a session as the edge reads it."""
    return {
        "digest": session.digest,
        "server": session.server,
        "user": session.actor.partition(":")[2] or session.actor,
        "expires_at": session.expires_at,
    }


def visits_of(answer: object) -> Visits:
    """Read an edge's answer. Raises WireError."""
    match answer:
        case {"open": int(open_), "ago": int() | float() | None as ago}:
            return Visits(open_, ago)
    raise wire.WireError("the answer is not about visits")


def route_of(snapshot: Snapshot, labs: LabAddresses, secret: str) -> Route | None:
    """Return the route to a server; None if it does not run, or has an address of its own."""
    endpoint, name = snapshot.endpoint, snapshot.qualified_name
    if endpoint is None or not labs.serves(name, endpoint):
        return None
    host = addresses.from_here(endpoint.hostname)
    key = key_of(secret, name, snapshot.generation)
    return Route(name, snapshot.generation, host, endpoint.port, endpoint.base_url, key)
