"""Custom Jupyter classes of a site keep working, and their kernels are recorded."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import httpx
import pytest

from gateway_servers import KernelGateway, stopped_or_left
from harness import PATIENCE, forked, run_cell, until

SITE_CLASSES = """
from jupyter_server.auth.identity import PasswordIdentityProvider, User
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
from jupyter_server.services.sessions.sessionmanager import SessionManager
from traitlets import Unicode


class OwnKernels(AsyncMappingKernelManager):
    greeting = Unicode("none", config=True)

    async def start_kernel(self, **given):
        env = {**given["env"], "GREETING": self.greeting}
        kernel_id = await super().start_kernel(**{**given, "env": env})
        self.log.warning("own kernels: started %s", kernel_id)
        return kernel_id


class OwnSessions(SessionManager):
    async def save_session(self, session_id, **given):
        self.log.warning("own sessions: saved %s", given["path"])
        return await super().save_session(session_id, **given)


class OwnUsers(PasswordIdentityProvider):
    async def get_user(self, handler):
        known = await super().get_user(handler)
        return known and User(username="somebody", name="Somebody")


c.ServerApp.kernel_manager_class = OwnKernels
c.ServerApp.session_manager_class = OwnSessions
c.ServerApp.identity_provider_class = OwnUsers
c.OwnKernels.greeting = "hello"
"""


def jupyter_request(server, method, path, **given):
    headers = {"Authorization": f"token {server['token']}"}
    answer = httpx.request(
        method,
        f"{server['url']}{path}",
        headers=headers,
        timeout=PATIENCE,
        trust_env=False,
        **given,
    )
    answer.raise_for_status()
    return answer


def open_notebook(server, path="own.ipynb"):
    """Open a notebook, and return the id of its kernel."""
    body = {"path": path, "name": path, "type": "notebook", "kernel": {"name": "python3"}}
    return jupyter_request(server, "POST", "api/sessions", json=body).json()["kernel"]["id"]


def kernel_record(keeper):
    return json.loads((keeper.server_dirs / "default" / "jupyter" / "kernels.json").read_text())


@pytest.mark.parametrize("launch_by", ["fork", "exec"])
def test_custom_manager_and_identity_classes_of_a_site_are_used(make_keeper, launch_by):
    keeper = make_keeper(launch_by=launch_by)
    keeper.configure_jupyter(SITE_CLASSES)
    keeper.start()
    server = forked(keeper) if launch_by == "fork" else keeper.post().json()
    assert jupyter_request(server, "GET", "api/me").json()["identity"]["username"] == "somebody"
    kernel = open_notebook(server)
    assert run_cell(server, kernel, "import os; print(os.environ['GREETING'])") == "hello\n"
    log = keeper.http.get("/api/servers/default/logs").text
    assert f"own kernels: started {kernel}" in log
    assert "own sessions: saved own.ipynb" in log
    (session,) = kernel_record(keeper)["sessions"]
    assert (kernel_record(keeper)["kernels"], session["path"], session["kernel_id"]) == (
        [kernel],
        "own.ipynb",
        kernel,
    )
    assert server["token"] not in jupyter_request(server, "GET", "lab").text
    jupyter_request(server, "DELETE", f"api/kernels/{kernel}")
    assert kernel_record(keeper)["kernels"] == []


SITE_GATEWAY_CLASSES = """
from jupyter_server.gateway.managers import (
    GatewayKernelManager,
    GatewayMappingKernelManager,
    GatewaySessionManager,
)

class OwnKernel(GatewayKernelManager):
    async def refresh_model(self, model=None):
        self.log.warning("own kernel: refreshed")
        return await super().refresh_model(model)

class OwnKernels(GatewayMappingKernelManager):
    async def shutdown_kernel(self, kernel_id, now=False, restart=False):
        self.log.warning("own kernels: ends %s", kernel_id)
        await super().shutdown_kernel(kernel_id, now, restart)

class OwnSessions(GatewaySessionManager):
    pass
"""
SITE_GATEWAY_CONFIG = """
c.ServerApp.kernel_manager_class = "own_gateway.OwnKernels"
c.ServerApp.session_manager_class = "own_gateway.OwnSessions"
c.GatewayMappingKernelManager.kernel_manager_class = "own_gateway.OwnKernel"
"""


@pytest.fixture
def gateway(tmp_path):
    running = KernelGateway(tmp_path / "gateway").start()
    yield running
    running.stop()


@pytest.mark.gateways
def test_custom_gateway_manager_classes_of_a_site_are_used(make_keeper, gateway):
    keeper = make_keeper(launch_by="exec")
    package = keeper.base / "own"
    package.mkdir()
    (package / "own_gateway.py").write_text(SITE_GATEWAY_CLASSES)
    keeper.variables["PYTHONPATH"] = os.pathsep.join(
        [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    keeper.configure_jupyter(SITE_GATEWAY_CONFIG)
    keeper.start()
    server = keeper.post(**gateway.options).json()
    kernel = open_notebook(server)
    assert [found["id"] for found in jupyter_request(server, "GET", "api/kernels").json()] == [
        kernel
    ]
    assert (kernel_record(keeper)["kernels"], gateway.kernels()) == ([kernel], {kernel})
    log = keeper.http.get("/api/servers/default/logs").text
    assert "own kernel: refreshed" in log
    assert ", args: " not in log
    report = keeper.post("/default/stop").json()["stop_report"]
    assert stopped_or_left(report) == {kernel}
    until(lambda: gateway.kernels() == set(), what="the kernel to be ended")
    assert f"own kernels: ends {kernel}" in keeper.http.get("/api/servers/default/logs").text


def test_page_asks_about_a_build_only_if_one_may_be_needed(make_keeper, tmp_path):
    keeper = make_keeper().start()
    for name in ("static", "schemas", "themes"):
        (tmp_path / name).symlink_to(Path(sys.prefix) / "share/jupyter/lab" / name)
    asks = []
    for env in ({}, {"JUPYTERLAB_DIR": str(tmp_path)}):
        server = keeper.post(name=f"lab{len(env)}", env=env).json()
        asks.append('"buildCheck": true' in jupyter_request(server, "GET", "lab").text)
    assert asks == [False, True]


@pytest.mark.parametrize("base_url", ["/", "/deep/er/"])
def test_browsers_keep_bundles_of_extensions(keeper, base_url):
    server = keeper.post(name="bundles", base_url=base_url).json()
    page = jupyter_request(server, "GET", "lab").text
    config = json.loads(
        re.search(r'id="jupyter-config-data"[^>]*>(.*?)</script>', page, re.DOTALL)[1]
    )
    (first, *_) = config["federated_extensions"]
    answer = jupyter_request(server, "GET", f"lab/extensions/{first['name']}/{first['load']}")
    assert answer.status_code == 200
    assert "immutable" in answer.headers["cache-control"]


def test_error_while_setting_up_page_protection_fails_the_start(make_keeper):
    """A failure of any other extension is only logged."""
    keeper = make_keeper(launch_by="exec")
    keeper.configure_jupyter("c.ServerApp.tornado_settings = {'headers': 5}")
    problem = keeper.start().post().json()
    assert (problem["failure_class"], problem["exit"]["code"]) == ("other", 1)
    assert any("AttributeError" in line for line in problem["log_tail"])
