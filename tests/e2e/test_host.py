"""Allowed root directories and Jupyter options, with real servers."""

from __future__ import annotations

import http.server
import json
import os
import threading

import httpx
import pytest

from harness import PATIENCE, forked, free_port, give_hands, run_in_server, until


def request_status(server, path):
    """Return the status code of a response of a server."""
    headers = {"Authorization": f"token {server['token']}"}
    return httpx.get(
        f"{server['url']}{path}", headers=headers, timeout=PATIENCE, trust_env=False
    ).status_code


OPTIONS = {
    "ServerApp.terminals_enabled": False,
    "ServerApp.quit_button": False,
    "ServerApp.max_body_size": 2**21,
    "ContentsManager.allow_hidden": True,
    "FileContentsManager.delete_to_trash": False,
    "MappingKernelManager.cull_idle_timeout": 3600,
    "MappingKernelManager.cull_connected": True,
    "ZMQChannelsWebsocketConnection.iopub_data_rate_limit": 1e8,
}
COLLECT_OPTIONS = """
import json
from jupyter_server.serverapp import ServerApp
app = ServerApp.instance()
found = {
    "ServerApp.terminals_enabled": app.terminals_enabled,
    "ServerApp.quit_button": app.quit_button,
    "ServerApp.max_body_size": app.max_body_size,
    "ContentsManager.allow_hidden": app.contents_manager.allow_hidden,
    "FileContentsManager.delete_to_trash": app.contents_manager.delete_to_trash,
    "MappingKernelManager.cull_idle_timeout": app.kernel_manager.cull_idle_timeout,
    "MappingKernelManager.cull_connected": app.kernel_manager.cull_connected,
    "ZMQChannelsWebsocketConnection.iopub_data_rate_limit":
        app.config["ZMQChannelsWebsocketConnection"]["iopub_data_rate_limit"],
}
"""


@pytest.mark.parametrize("launch_by", ["exec", "fork"])
def test_jupyter_options_override_user_configuration_until_removed(make_keeper, launch_by):
    keeper = make_keeper(launch_by=launch_by)
    give_hands(keeper)
    config = keeper.config_dir / "jupyter_server_config.py"
    config.write_text(
        f"{config.read_text()}\nc.ContentsManager.allow_hidden = False\n"
        "c.ServerApp.quit_button = True\n"
    )
    keeper.start()
    (keeper.notebook_dir / ".hidden").touch()
    start = forked if launch_by == "fork" else lambda keeper, **body: keeper.post(**body).json()
    server = start(keeper, jupyter_options=OPTIONS)
    assert (server["jupyter_options"], server["launched_by"]) == (OPTIONS, launch_by)
    seen = keeper.base / "seen.json"
    run_in_server(server, f"{COLLECT_OPTIONS}\nopen({str(seen)!r}, 'w').write(json.dumps(found))")
    assert json.loads(seen.read_text()) == OPTIONS
    assert (
        request_status(server, "api/terminals"),
        request_status(server, "api/contents/.hidden"),
    ) == (404, 200)

    plain = keeper.post("/default/restart", jupyter_options={}).json()
    assert plain["jupyter_options"] == {}
    assert (
        request_status(plain, "api/terminals"),
        request_status(plain, "api/contents/.hidden"),
    ) == (200, 404)


def test_unsupported_jupyter_options_are_rejected(keeper):
    for options in (
        {"ServerApp.token": ""},
        {"ServerApp.quit_button": "x\nc.ServerApp.token = ''"},
        {"--ServerApp.token=": True},
    ):
        answer = keeper.post(jupyter_options=options)
        assert answer.status_code == 422, answer.text
    assert keeper.http.get("/api/servers").json()["servers"] == []


def test_root_dir_must_be_within_the_allowed_roots(make_keeper, tmp_path):
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
    (tmp_path / "one" / "out").symlink_to(tmp_path / "three")
    keeper = make_keeper(allowed_roots=f"{tmp_path / 'one'}{os.pathsep}{tmp_path / 'two'}").start()
    server = keeper.post(root_dir=str(tmp_path / "two")).json()
    assert (server["root_dir"], server["notebook_dir"]) == (
        str(tmp_path / "two"),
        str(tmp_path / "two"),
    )
    for outside in (
        tmp_path / "three",
        tmp_path / "one" / "out",
        keeper.notebook_dir,
        "../../three",
        tmp_path / "none",
    ):
        answer = keeper.post(name="other", root_dir=str(outside))
        assert answer.status_code == 422, answer.text
        assert (
            f"must be within {tmp_path / 'one'} or {tmp_path / 'two'} (LABKEEPER_ALLOWED_ROOTS)"
            in answer.json()["detail"]
        )


def test_root_dir_replaced_by_a_symbolic_link_is_not_entered(keeper, tmp_path):
    """Neither a start nor a restart enters it, and the error says how to repair it."""
    root, elsewhere = keeper.notebook_dir / "inner", tmp_path / "elsewhere"
    (root / "deep").mkdir(parents=True)
    (elsewhere / "deep").mkdir(parents=True)
    assert keeper.post(root_dir="inner/deep").status_code == 201
    assert keeper.post("/default/stop").status_code == 200
    root.rename(tmp_path / "moved")
    root.symlink_to(elsewhere)
    for what in ("start", "restart"):
        answer = keeper.post(f"/default/{what}")
        assert (answer.status_code, answer.json()["failure_class"]) == (502, "config-error")
        assert (
            f"the root directory {root / 'deep'} leads to another place now"
            in answer.json()["detail"]
        )
    root.unlink()
    (tmp_path / "moved").rename(root)
    assert keeper.post("/default/start").json()["root_dir"] == str(root / "deep")


FALSE_SERVER_INFO = """
from jupyter_server.serverapp import ServerApp
told = ServerApp.server_info
ServerApp.server_info = lambda self: told(self) | {
    "hostname": "evil.example", "port": 1, "base_url": "/evil/", "url": "http://evil.example/",
    "token": "evil",
}
"""


def test_server_cannot_change_the_address_it_is_reached_at(make_keeper):
    """A server runs its user's code, so its own record is not trusted with its address.

    The next keeper uses the address of the launch, too. It does read the token from that record.
    """
    keeper = make_keeper()
    keeper.configure_jupyter(FALSE_SERVER_INFO)
    keeper.start()
    server = keeper.post(base_url="/base/").json()
    assert server["lab_url"] == f"{keeper.url}/servers/default/base/lab"
    place = {
        "url": f"http://127.0.0.1:{keeper.lab_port}/servers/default/base/",
        "hostname": "127.0.0.1",
        "port": keeper.lab_port,
    }
    assert server | place == server
    assert request_status(server, "api/me") == 200
    keeper.configure_jupyter(FALSE_SERVER_INFO.replace('"token": "evil",', ""))
    assert keeper.post("/default/restart").json()["state"] == "running"
    keeper.kill()
    later = keeper.start().wait_for("running")
    assert later | place == later


class RecordingHandler(http.server.BaseHTTPRequestHandler):
    """Answer every request with 200, and record it."""

    def do_GET(self):
        self.server.received.append(f"{self.path} {self.headers}")
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


NEVER_LISTENS = """
from jupyter_server.serverapp import ServerApp
ServerApp._find_http_port = lambda self: None
ServerApp._bind_http_server = lambda self: self.log.warning("it listens, says it")
"""


def test_no_token_is_sent_to_another_process_on_the_servers_port(make_keeper):
    """Another user may listen on the port between its check and the start of the server."""
    keeper = make_keeper(start_timeout=20)
    keeper.configure_jupyter(NEVER_LISTENS)
    keeper.start()
    log = keeper.state_dir / "logs" / "default.log"
    with http.server.HTTPServer(
        ("127.0.0.1", free_port()), RecordingHandler, bind_and_activate=False
    ) as spy:
        spy.received = []
        spy.server_bind()
        assert (
            keeper.http.post(
                "/api/servers", params={"wait": 0}, json={"port": spy.server_port}
            ).status_code
            == 202
        )
        until(log.exists, what="the server's log to be created")
        spy.server_activate()
        threading.Thread(target=spy.serve_forever).start()
        try:
            keeper.wait_for("failed")
        finally:
            spy.shutdown()
    assert "it listens, says it" in log.read_text()
    assert spy.received == []
