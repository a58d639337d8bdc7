"""Ports are checked before a launch."""

from __future__ import annotations

import os
import socket

import pytest

from harness import low_ports_take_a_right
from labkeeper.backends.local.ports import hold_port
from labkeeper.core.errors import BackendRefused
from labkeeper.core.spec import ServerName, ServerSpec


def spec(port):
    return ServerSpec(ServerName("x"), "/", ip="127.0.0.1", port=port)


@pytest.mark.root
@pytest.mark.skipif(not low_ports_take_a_right(), reason="needs ports that take a right")
def test_a_privileged_port_is_not_reported_as_in_use():
    os.seteuid(65534)
    try:
        with pytest.raises(
            BackendRefused, match=r"no right to listen on port 81 on .*; choose port"
        ) as refused:
            hold_port(spec(81))
    finally:
        os.seteuid(0)
    assert refused.value.details["failure_class"] == "config-error"


def test_a_port_in_use_is_refused():
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(BackendRefused, match="in use") as refused,
    ):
        hold_port(spec(taken.getsockname()[1]))
    assert refused.value.details["failure_class"] == "port-in-use"
