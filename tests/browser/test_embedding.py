"""The example application, in a real browser: a Lab inside the page of another program."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from harness import free_port, until
from pages import notebook, run_cell_in_page

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(sys.platform != "linux", reason="the edge needs Linux"),
]

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "embed"


@pytest.fixture
def origin():
    return f"http://127.0.0.1:{free_port()}"


@pytest.fixture
def keeper(make_keeper, origin):
    """A keeper whose Labs the application may show in a frame."""
    keeper = make_keeper()
    policy = {"Content-Security-Policy": f"frame-ancestors 'self' {origin}"}
    (keeper.config_dir / "jupyter_server_config.json").write_text(
        json.dumps({"ServerApp": {"tornado_settings": {"headers": policy}}})
    )
    return keeper.start()


@pytest.fixture
def application(keeper, origin, tmp_path):
    made = keeper.http.post(
        "/api/tokens", json={"name": "platform", "scope": "manage", "servers": ["lab-*"]}
    )
    env = keeper.environment | {
        "LABKEEPER_URL": keeper.url,
        "LABKEEPER_TOKEN": made.json()["token"],
    }
    port = origin.rpartition(":")[2]
    command = [sys.executable, "-m", "flask", "--app", EXAMPLE / "app", "run", "--port", port]
    with (tmp_path / "application.log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=tmp_path)

    def answers():
        try:
            return httpx.get(origin, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    try:
        until(answers, what="the application to answer")
        yield origin
    finally:
        process.terminate()
        process.wait()


def sign_in(page, application, user="ada"):
    page.goto(application)
    page.get_by_label("Your name").fill(user)
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Sign out").wait_for()


def test_a_lab_works_inside_the_page_of_an_application(keeper, application, page):
    (keeper.notebook_dir / "sum.ipynb").write_text(notebook("print(6 * 7)"))
    sign_in(page, application)
    page.get_by_role("button", name="Start JupyterLab").click()
    lab = page.frame_locator("iframe")
    lab.get_by_role("listitem", name="sum.ipynb").dblclick()
    until(lambda: run_cell_in_page(page, "42", lab), what="the output of the cell")
    secrets = (keeper.token, keeper.http.get("/api/servers/lab-ada").json()["token"])
    assert not [secret for secret in secrets if secret in page.content()]

    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Your JupyterLab is stopped.").wait_for()
    assert keeper.http.get("/api/servers/lab-ada").json()["state"] == "stopped"
    # The same button starts it again.
    page.get_by_role("button", name="Start JupyterLab").click()
    lab.locator("#jp-main-dock-panel").wait_for()


def test_no_page_of_a_lab_acts_on_the_application(keeper, application, page):
    keeper.post(name="other")
    sign_in(page, application)
    page.goto(keeper.post("/other/link").json()["url"])
    # It shares the site of the application, so that the browser sends the session along.
    page.evaluate(
        "url => fetch(url, {method: 'POST', credentials: 'include', mode: 'no-cors'})",
        f"{application}/lab/start",
    )
    assert [server["name"] for server in keeper.http.get("/api/servers").json()["servers"]] == [
        "other"
    ]


def test_a_start_that_fails_is_explained(keeper, application, page):
    (keeper.config_dir / "jupyter_server_config.py").write_text("raise RuntimeError('out of luck')")
    sign_in(page, application)
    page.get_by_role("button", name="Start JupyterLab").click()
    page.get_by_role("heading", name="This did not work").wait_for()
    assert "out of luck" in page.locator("pre").inner_text()
