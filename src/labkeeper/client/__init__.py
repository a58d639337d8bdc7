"""The Python client: one method per route, typed answers, the errors of `labkeeper.core.errors`.

    with Client("http://127.0.0.1:8000", token="...") as keeper:
        server = keeper.create(name="demo", gateway={"url": "http://gateway:8888"})
        print(server.lab_url)

No exception of httpx or pydantic leaves this package. They are translated in two places:
`connection.Translated` for transport errors, `reading.checked` for answers.
"""

from labkeeper.client.calls import LONGEST_WAIT
from labkeeper.client.clients import TIMEOUT, AsyncClient, Client
from labkeeper.schema.answers.access import Caller, Link, NewToken, Session, Token
from labkeeper.schema.answers.culling import Holder, Idle, IdleRule
from labkeeper.schema.answers.events import Event, Webhook
from labkeeper.schema.answers.keeper import Library, OrphanedKernel
from labkeeper.schema.answers.servers import (
    BulkResult,
    Exit,
    Failure,
    Gateway,
    Kernel,
    Limit,
    Server,
    StopOrder,
    StopReport,
    Usage,
)

__all__ = [
    "LONGEST_WAIT",
    "TIMEOUT",
    "AsyncClient",
    "BulkResult",
    "Caller",
    "Client",
    "Event",
    "Exit",
    "Failure",
    "Gateway",
    "Holder",
    "Idle",
    "IdleRule",
    "Kernel",
    "Library",
    "Limit",
    "Link",
    "NewToken",
    "OrphanedKernel",
    "Server",
    "Session",
    "StopOrder",
    "StopReport",
    "Token",
    "Usage",
    "Webhook",
]
