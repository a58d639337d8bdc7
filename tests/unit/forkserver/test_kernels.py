"""A server records its kernels, and ends them as its keeper wrote, in versions that both know."""

from __future__ import annotations

import asyncio
import json
import logging
from types import SimpleNamespace

import pytest

from labkeeper.backends.local.server_dir import ServerDir
from labkeeper.core.server import OwnKernel
from labkeeper.forkserver.kernels import Kernels
from labkeeper.jupyter.records import read_kernels


class Manager:
    """Kernels on a gateway that ends each at once."""

    def __init__(self):
        self.kernels = ["k-1", "k-2"]

    def list_kernel_ids(self):
        return list(self.kernels)

    async def shutdown_kernel(self, kernel_id):
        self.kernels.remove(kernel_id)


@pytest.fixture
def server_dir(tmp_path, monkeypatch):
    made = ServerDir(tmp_path)
    made.jupyter.mkdir()
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(made.jupyter))
    return made


@pytest.fixture
def manager():
    return Manager()


@pytest.fixture
def kernels(server_dir, manager):
    app = SimpleNamespace(
        gateway_config=SimpleNamespace(gateway_enabled=True),
        kernel_manager=manager,
        log=logging.getLogger("test_kernels"),
    )
    return Kernels(app, str(server_dir.path), {})


def test_the_record_has_a_version_and_is_what_the_keeper_reads(kernels, server_dir):
    kernels.record()
    assert json.loads(server_dir.kernels.read_text())["version"] == 1
    assert read_kernels(server_dir.kernels) == (OwnKernel("k-1"), OwnKernel("k-2"))


def test_kernels_are_kept_as_the_keeper_requests(kernels, manager, server_dir):
    server_dir.write_stop_request(keep_kernels=True, within=2.0)
    asyncio.run(kernels.end(None))
    assert manager.kernels == ["k-1", "k-2"]


def test_a_request_without_a_version_is_of_the_first(kernels, manager, server_dir):
    """It is from a keeper that wrote none."""
    (server_dir.path / "stop.json").write_text('{"keep_kernels": true, "within": 2.0}')
    asyncio.run(kernels.end(None))
    assert manager.kernels == ["k-1", "k-2"]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"version": 2, "keep_kernels": {"all": true}, "within": "2 s"}']
)
def test_after_a_request_that_it_cannot_read_a_server_ends_its_kernels(
    kernels, manager, server_dir, caplog, text
):
    (server_dir.path / "stop.json").write_text(text)
    asyncio.run(kernels.end(None))
    assert manager.kernels == []
    assert ("cannot read stop.json of version 2" in caplog.text) == ("version" in text)
