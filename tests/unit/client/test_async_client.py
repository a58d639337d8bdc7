"""The client for asyncio: the same calls as those of `Client`, against a keeper that is served over TCP."""

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


@pytest.fixture
def url(tmp_path):
    with fake_keeper(tmp_path) as made, socket.create_server(("127.0.0.1", 0)) as listener:
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


def test_it_has_the_methods_of_the_other_one():
    ours, theirs = methods(AsyncClient), methods(Client)
    assert ours.keys() == theirs.keys()
    for name, member in ours.items():
        assert (
            inspect.signature(member).parameters.keys()
            == inspect.signature(theirs[name]).parameters.keys()
        )
        assert inspect.iscoroutinefunction(member) or inspect.isasyncgenfunction(member)


def test_a_server_lives_through_its_methods(url):
    async def life():
        async with AsyncClient(url, token=TOKEN) as client:
            assert (await client.create(name="a")).state is State.RUNNING
            await client.create(name="b")
            assert [server.name async for server in client.list()] == ["a", "b"]
            assert [server.name async for server in client.list(state=["stopped"])] == []
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

    asyncio.run(life())


async def _some(items, count):
    """Yield so many, and let the others be."""
    async for item in items:
        yield item
        count -= 1
        if not count:
            await items.aclose()
            return


def test_calls_may_run_at_the_same_time(url):
    async def create_five():
        async with AsyncClient(url, token=TOKEN) as client:
            made = await asyncio.gather(*(client.create(name=f"s{number}") for number in range(5)))
            return [server.name for server in made]

    assert asyncio.run(create_five()) == [f"s{number}" for number in range(5)]


def test_pages_are_asked_for_one_by_one(url):
    async def names():
        async with AsyncClient(url, token=TOKEN) as client:
            names = [f"s{number:03}" for number in range(120)]
            await client.start_many(names)
            return [server.name async for server in client.list()] == names

    assert asyncio.run(names())


def test_errors_are_those_of_the_other_client():
    async def ask():
        async with AsyncClient("http://127.0.0.1:1") as client:
            await client.version()

    with pytest.raises(Unreachable, match="labkeeper serve"):
        asyncio.run(ask())
    with pytest.raises(SettingsError, match="cannot use"):
        AsyncClient("ftp://keeper")


def test_what_is_no_stream_is_an_error_too():
    transport = httpx.MockTransport(
        lambda _: httpx.Response(404, json={"code": "server_not_found", "detail": "cannot find it"})
    )

    async def follow():
        async with AsyncClient("http://keeper", transport=transport) as client:
            return [line async for line in client.follow("x")]

    with pytest.raises(ServerNotFound, match="cannot find it"):
        asyncio.run(follow())
