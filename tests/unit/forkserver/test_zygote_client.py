"""A server's connection to a zygote that ends while it is asked."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from contextlib import closing

import pytest

from labkeeper.forkserver import wire
from labkeeper.forkserver.wire import KernelLaunch
from labkeeper.forkserver.zygote_client import NoZygoteError, Zygote
from launches import launch_in

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forking needs Linux")

LAUNCH = launch_in("/nowhere")


def receive(connection):
    """Return the next message, without the files that come with it."""
    message, files = wire.receive(connection)
    for file in files:
        os.close(file)
    return message


@pytest.mark.parametrize("moment", ["before it is ready", "while it is asked"])
def test_kernel_is_not_forked_by_a_zygote_that_is_given_up_meanwhile(moment):
    """A pool gives a zygote up when it sees its process end, whoever waits for its answer."""

    async def give_up_meanwhile():
        ours, its = socket.socketpair()
        with closing(its):
            zygote = Zygote(ours, LAUNCH)
            zygote.introduce()
            receive(its)
            if moment == "while it is asked":
                wire.send(its, {"pid": os.getpid(), "read": [], "given": {}, "libraries": {}})
            asking = asyncio.ensure_future(zygote.fork(KernelLaunch([], {}, "/", again=False)))
            await asyncio.sleep(0)
            if moment == "while it is asked":
                assert receive(its)["do"] == "kernel"
            zygote.give_up("the zygote has ended")
            with pytest.raises(NoZygoteError, match="the zygote has ended"):
                await asking
            assert zygote.lost
            assert ours.fileno() == -1

    asyncio.run(give_up_meanwhile())
