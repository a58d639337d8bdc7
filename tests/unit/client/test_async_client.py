"""The asyncio client: the same calls as `Client`, against a keeper served over TCP."""

from __future__ import annotations

import asyncio
import inspect
import socket
from contextlib import closing

import httpx
import pytest

from fake_keeper import TOKEN, fake_keeper
from labkeeper.api.app import create_app
from labkeeper.api.wsgi import WsgiServer
from labkeeper.client import AsyncClient, Client
from labkeeper.core.errors import ServerNotFound, SettingsError, Unreachable
from labkeeper.core.lifecycle import State
from labkeeper.core.server import Kernel


@pytest.fixture
def url(tmp_path):
    with fake_keeper(tmp_path) as made, socket.create_server(("127.0.0.1", 0)) as listener:
        made.probe.kernels_there = [Kernel("k", "python3", launched_by="fork")]
        server = WsgiServer(create_app(made.services), [listener], threads=8, max_body=2**20)
        server.start()
        with closing(server):
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def methods(client):
    return {
        name: member
        for name, member in vars(client).items()
        if not name.startswith("_") and callable(member)
    }


def test_it_has_the_same_methods_as_the_synchronous_client():
    ours, theirs = methods(AsyncClient), methods(Client)
    assert ours.keys() == theirs.keys()
    for name, member in ours.items():
        assert (
            inspect.signature(member).parameters.keys()
            == inspect.signature(theirs[name]).parameters.keys()
        )
        assert inspect.iscoroutinefunction(member) or inspect.isasyncgenfunction(member)


def test_methods_cover_the_life_of_a_server(url):
    async def whole_life():
        async with AsyncClient(url, token=TOKEN) as client:
            assert (await client.create(name="a")).state is State.RUNNING
            await client.create(name="b")
            assert [server.name async for server in client.list()] == ["a", "b"]
            assert [server.name async for server in client.list(state=["stopped"])] == []
            assert [server.name async for server in client.list(owner="ada")] == []
            assert [kernel.launched_by for kernel in await client.kernels("a")] == ["fork"]
            follower = client.follow("a")
            first = await anext(follower)
            assert (await client.stop("a")).state is State.STOPPED
            rest = [line async for line in follower]
            assert [first, *rest] == (await client.logs("a")).splitlines()
            assert [
                event.server async for event in _some(client.follow_events("a", after=0), 2)
            ] == ["a", "a"]
            await client.delete("a")
            with pytest.raises(ServerNotFound):
                await client.get("a")
            assert await client.healthy()

    asyncio.run(whole_life())


async def _some(items, count):
    """Yield some items, and close the iterator."""
    async for item in items:
        yield item
        count -= 1
        if not count:
            await items.aclose()
            return


def test_calls_can_run_concurrently(url):
    async def create_five():
        async with AsyncClient(url, token=TOKEN) as client:
            made = await asyncio.gather(*(client.create(name=f"s{number}") for number in range(5)))
            return [server.name for server in made]

    assert asyncio.run(create_five()) == [f"s{number}" for number in range(5)]


def test_lists_cover_all_pages(url):
    async def names():
        async with AsyncClient(url, token=TOKEN) as client:
            names = [f"s{number:03}" for number in range(120)]
            await client.start_many(names)
            return [server.name async for server in client.list()] == names

    assert asyncio.run(names())


def test_errors_equal_those_of_the_synchronous_client():
    async def ask():
        async with AsyncClient("http://127.0.0.1:1") as client:
            await client.version()

    with pytest.raises(Unreachable, match="labkeeper serve"):
        asyncio.run(ask())
    with pytest.raises(SettingsError, match="cannot use"):
        AsyncClient("ftp://keeper")


def test_an_error_response_to_a_stream_raises():
    transport = httpx.MockTransport(
        lambda _: httpx.Response(404, json={"code": "server_not_found", "detail": "cannot find it"})
    )

    async def follow():
        async with AsyncClient("http://keeper", transport=transport) as client:
            return [line async for line in client.follow("x")]

    with pytest.raises(ServerNotFound, match="cannot find it"):
        asyncio.run(follow())
