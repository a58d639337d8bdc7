"""Websockets of kernels that do not wait longer than they must.

Jupyter leaves TCP's own delay on (Nagle's algorithm): a browser sees the end of each cell about
40 ms late, because the last of several small messages waits until the browser has acknowledged
those before it. And before the first cell of a new kernel it looks only every 50 ms whether the
kernel has told its state.
"""

from __future__ import annotations

import asyncio
from typing import Any

from .classes import derived

_FIRST_STATUS_SECONDS = 5.0
"""Seconds to wait here for a new kernel's first status; then Jupyter waits in its own way."""
_ASK_EVERY = 0.02
"""Seconds between two requests for that status."""


def prompt(kind: Any) -> Any:
    """Derive a websocket connection class without these delays, from the site's or Jupyter's."""

    def connect(connection: Any) -> Any:
        # None if the browser has left meanwhile: a lost connection to a gateway is made again.
        if connection.websocket_handler.ws_connection is not None:
            connection.websocket_handler.set_nodelay(True)
        return kind.connect(connection)

    async def prepare(connection: Any) -> None:
        await kind.prepare(connection)
        await _first_status(connection)

    # Connections to a gateway have nothing to prepare, and no state to wait for.
    preparing = {"prepare": prepare} if hasattr(kind, "prepare") else {}
    return derived(kind, {"connect": connect, **preparing})


async def _first_status(connection: Any) -> None:
    """Wait until the server has received a new kernel's first status.

    The kernel has sent one already, but perhaps before the server received its broadcasts. Until
    then the server does not see that a kernel is busy, so cells must not run before. Each request
    makes the kernel send one more.
    """
    kernel = connection.kernel_manager
    if not kernel.has_trait("execution_state") or kernel.execution_state != "starting":
        return
    received = asyncio.get_running_loop().create_future()

    def receive(_: Any) -> None:
        if not received.done():
            received.set_result(None)

    kernel.observe(receive, "execution_state")
    channel = kernel.connect_shell()
    try:
        for _ in range(round(_FIRST_STATUS_SECONDS / _ASK_EVERY)):
            connection.session.send(channel, "kernel_info_request")
            await asyncio.wait({received}, timeout=_ASK_EVERY)
            if received.done():
                break
    finally:
        kernel.unobserve(receive, "execution_state")
        channel.close()
