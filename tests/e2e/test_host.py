"""Real servers in roots that are allowed, with options of Jupyter that are in force."""

from __future__ import annotations

import http.server
import json
import os
import threading

import httpx
import pytest

from harness import PATIENCE, forked, free_port, give_hands, run_in_server, until


def asked(server, path):
    """Ask a server something; give the status of its answer."""
    known = {"Authorization": f"token {server['token']}"}
    return httpx.get(
        f"{server['url']}{path}", headers=known, timeout=PATIENCE, trust_env=False
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
LOOK = """
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


@pytest.mark.parametrize("how", ["exec", "fork"])
def test_options_are_in_force_over_those_of_the_user_until_a_restart_takes_them_away(
    make_keeper, how
):
    keeper = make_keeper(launch_by=how)
    give_hands(keeper)
    config = keeper.config_dir / "jupyter_server_config.py"
    config.write_text(
        f"{config.read_text()}\nc.ContentsManager.allow_hidden = False\nc.ServerApp.quit_button = True\n"
    )
    keeper.start()
    (keeper.notebook_dir / ".hidden").touch()
    start = forked if how == "fork" else lambda keeper, **body: keeper.post(**body).json()
    server = start(keeper, jupyter_options=OPTIONS)
    assert (server["jupyter_options"], server["launched_by"]) == (OPTIONS, how)
    seen = keeper.base / "seen.json"
    run_in_server(server, f"{LOOK}\nopen({str(seen)!r}, 'w').write(json.dumps(found))")
    assert json.loads(seen.read_text()) == OPTIONS
    assert (asked(server, "api/terminals"), asked(server, "api/contents/.hidden")) == (404, 200)

    plain = keeper.post("/default/restart", jupyter_options={}).json()
    assert plain["jupyter_options"] == {}
    assert (asked(plain, "api/terminals"), asked(plain, "api/contents/.hidden")) == (200, 404)


def test_an_option_that_is_none_of_the_table_starts_nothing(keeper):
    for options in (
        {"ServerApp.token": ""},
        {"ServerApp.quit_button": "x\nc.ServerApp.token = ''"},
        {"--ServerApp.token=": True},
    ):
        answer = keeper.post(jupyter_options=options)
        assert answer.status_code == 422, answer.text
    assert keeper.http.get("/api/servers").json()["servers"] == []


def test_a_server_works_in_any_allowed_root_and_in_no_other(make_keeper, tmp_path):
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


def test_a_root_that_has_become_a_link_since_is_not_entered(keeper, tmp_path):
    """Neither by a new start nor by a restart; and the way out is told."""
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


LIES = """
from jupyter_server.serverapp import ServerApp
told = ServerApp.server_info
ServerApp.server_info = lambda self: told(self) | {
    "hostname": "evil.example", "port": 1, "base_url": "/evil/", "url": "http://evil.example/", "token": "evil",
}
"""


def test_a_server_has_no_say_in_where_it_is_reached(make_keeper):
    """It runs its user's own code. A later keeper, too, goes by what the launch asked for; of the token it has no record."""
    keeper = make_keeper()
    keeper.configure_jupyter(LIES)
    keeper.start()
    server = keeper.post(base_url="/base/").json()
    assert (
        server["lab_url"] == f"http://127.0.0.1:{keeper.lab_port}/base/lab?token={server['token']}"
    )
    place = {
        "url": f"http://127.0.0.1:{keeper.lab_port}/base/",
        "hostname": "127.0.0.1",
        "port": keeper.lab_port,
    }
    assert server | place == server
    assert asked(server, "api/me") == 200
    keeper.configure_jupyter(LIES.replace('"token": "evil",', ""))
    assert keeper.post("/default/restart").json()["state"] == "running"
    keeper.kill()
    later = keeper.start().wait_for("running")
    assert later | place == later


class Spy(http.server.BaseHTTPRequestHandler):
    """Says yes to everything, and notes what it was told."""

    def do_GET(self):
        self.server.told.append(f"{self.path} {self.headers}")
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


def test_no_token_is_sent_to_who_listens_in_the_place_of_a_server(make_keeper):
    """As another user of the machine might, between the check of the port and the start."""
    keeper = make_keeper(start_timeout=20)
    keeper.configure_jupyter(NEVER_LISTENS)
    keeper.start()
    log = keeper.state_dir / "logs" / "default.log"
    with http.server.HTTPServer(("127.0.0.1", free_port()), Spy, bind_and_activate=False) as spy:
        spy.told = []
        spy.server_bind()
        assert (
            keeper.http.post(
                "/api/servers", params={"wait": 0}, json={"port": spy.server_port}
            ).status_code
            == 202
        )
        until(log.exists, what="the port was checked")
        spy.server_activate()
        threading.Thread(target=spy.serve_forever).start()
        try:
            keeper.wait_for("failed")
        finally:
            spy.shutdown()
    assert "it listens, says it" in log.read_text()
    assert spy.told == []
