"""What is changed in Jupyter's own classes, because it offers no other way: each with its reason, and nothing elsewhere.

For each of them `tests/unit/forkserver/test_patches.py` has a test that fails when Jupyter needs it no more.
"""

from __future__ import annotations

import socket
import sys
from typing import Any

_READING = {"GET", "HEAD", "OPTIONS"}


def count_no_reading() -> None:
    """Let no request that only reads count as activity: an open tab asks for the same lists all day, looked at or not.

    Jupyter lets a handler say so of all its requests (`_track_activity`), and a caller of one (`no_track_activity`), but neither
    a site nor an extension of all requests with a method. To add the caller's argument would show it to handlers that pass on
    what they were asked. An identity provider sees each request as well, but with one of ours in its place Jupyter would not do
    any more what it does only for its own ones, which it knows by their very class: it would ignore login handlers of a site.
    """
    from jupyter_server.base.handlers import APIHandler

    count = APIHandler.update_api_activity

    def count_changes(self: Any) -> None:
        if self.request.method not in _READING:
            count(self)

    APIHandler.update_api_activity = count_changes  # type: ignore[method-assign]


def tell_no_page_the_token() -> None:
    """Keep the token out of HTML, where all that runs in a page would read it: a browser is known by its cookie.

    The page template writes it out for who has logged in. It takes it from the identity provider, which has to have it: servers
    are found and asked by what that says. Variables that a site gives to templates must not have the name of one of Jupyter's.
    """
    from jupyter_server.base.handlers import JupyterHandler

    namespace: Any = JupyterHandler.template_namespace
    without = property(lambda self: {**namespace.fget(self), "token": ""})
    JupyterHandler.template_namespace = without  # type: ignore[method-assign, assignment]


def hold_ports() -> None:
    """Keep the ports that Jupyter chooses for kernels from everybody else who asks for a free one.

    A kernel listens a second or so after they were chosen. Where another program has been given one of them meanwhile, the kernel
    ends; jupyter_client (8.10) starts it anew with the same ports, until it gives up: https://github.com/jupyter/jupyter_client/issues/276.
    A provisioner of kernels could choose otherwise, but is found by an entry point only, and each kernelspec may name its own.

    On Linux a socket that is bound, and does not listen, lets whoever sets SO_REUSEADDR bind and listen, as ZeroMQ does;
    elsewhere it would be in the way.
    """
    from jupyter_client.connect import LocalPortCache

    if sys.platform != "linux":
        return

    class HeldPorts(LocalPortCache):  # type: ignore[misc, unused-ignore]
        """As Jupyter's own; each port that is in use has a socket of ours."""

        def __init__(self, **given: Any) -> None:
            super().__init__(**given)
            self.holds: dict[int, socket.socket] = {}

        def find_available_port(self, ip: str) -> int:
            hold = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET)
            try:
                hold.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                hold.bind((ip, 0))
            except OSError:
                hold.close()
                raise
            port = int(hold.getsockname()[1])
            self.currently_used_ports.add(port)
            self.holds[port] = hold
            return port

        def return_port(self, port: int) -> None:
            super().return_port(port)
            if port in self.holds:
                self.holds.pop(port).close()

    LocalPortCache.clear_instance()
    HeldPorts.instance()
