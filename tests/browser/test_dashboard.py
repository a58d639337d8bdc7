"""What people do with the dashboard, in a real browser."""

from __future__ import annotations

import re
import sys

import pytest
from axe_playwright_python.sync_playwright import Axe

from gateway_servers import HostileGateway
from harness import start_kernel, until
from pages import notebook, run_cell_in_page

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(sys.platform != "linux", reason="the edge needs Linux"),
]


@pytest.fixture
def keeper(make_keeper):
    return make_keeper(usage_period="0.5").start()


@pytest.fixture
def home(keeper):
    return f"http://localhost:{keeper.port}"


@pytest.fixture
def wrong(page, home):
    """What the browser complains about on pages of the dashboard; nothing, after each test."""
    found = []

    def hear(message):
        if message.type == "error" and message.location["url"].startswith(home):
            found.append(message.text)

    def hear_dialog(dialog):
        # A notebook with changes asks whether it may be left.
        if dialog.type != "beforeunload":
            found.append(dialog.message)
        dialog.accept()

    page.on("console", hear)
    page.on("pageerror", lambda error: found.append(str(error)) if home in page.url else None)
    page.on("dialog", hear_dialog)
    yield found
    assert found == []


def sign_in(keeper, page, token=None):
    """Sign in by a link, with the keyboard."""
    if token is None:
        link = keeper.cli("dashboard", "--print").stdout.strip()
    else:
        headers = {"Authorization": f"Bearer {token}"}
        link = keeper.http.post("/api/me/link", json={}, headers=headers).json()["url"]
    page.goto(link)
    page.get_by_role("button", name="Sign in").press("Enter")
    page.get_by_role("heading", name="Servers", exact=True).wait_for()
    # With its scripts.
    page.wait_for_load_state("load")


def press(page, text):
    """Move the focus by the Tab key to a control, and press Enter."""
    focused = "document.activeElement.textContent.trim()"

    def reached():
        page.keyboard.press("Tab")
        return page.evaluate(focused) == text

    for _ in range(100):
        if reached():
            page.keyboard.press("Enter")
            return
    raise AssertionError(f"no {text!r} was reached")


def test_a_server_is_started_used_and_stopped_with_the_keyboard(keeper, home, page, wrong):
    sign_in(keeper, page)
    code = "x = bytearray(300 * 2**20); print(6 * 7)"
    (keeper.notebook_dir / "big.ipynb").write_text(notebook(code))
    page.keyboard.press("n")
    page.locator("#name:focus").wait_for()
    page.keyboard.type("demo")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="demo").wait_for()
    page.locator("#status .state.running").wait_for()
    charts = page.locator("#charts canvas")
    until(lambda: charts.count() == 2, what="the charts")
    drawn = charts.first.evaluate("canvas => canvas.toDataURL()")
    page.locator("#log", has_text="Jupyter Server").wait_for()
    with page.expect_navigation(url=re.compile("/servers/demo/lab")):
        press(page, "Open")
    assert page.url.startswith(f"http://127.0.0.1:{keeper.port}/servers/demo/lab")
    page.goto(f"http://127.0.0.1:{keeper.port}/servers/demo/lab/tree/big.ipynb?reset")
    until(lambda: run_cell_in_page(page, "42"), what="the output of the cell")
    page.goto(f"{home}/dashboard/servers/demo")
    used = page.locator("#usage dd").first

    def mebibytes():
        number, unit = used.inner_text().split()[:2]
        return float(number) * {"MiB": 1, "GiB": 1024}[unit]

    until(lambda: mebibytes() > 300, what="the memory in the facts")
    until(
        lambda: charts.count() and charts.first.evaluate("c => c.toDataURL()") != drawn,
        what="the memory in the chart",
    )
    page.locator("#kernels").get_by_text("python3").wait_for()
    page.evaluate("window.same = true")
    press(page, "Stop")
    page.locator("dialog[open]").get_by_text("One kernel runs").wait_for()
    page.keyboard.press("Enter")
    page.locator("#status .state.stopped").wait_for()
    page.locator("#kernels").get_by_text("the server does not run").wait_for()
    assert page.evaluate("window.same") is True
    page.keyboard.press("g")
    page.keyboard.press("s")
    page.locator("#server-demo").wait_for()
    press(page, "Delete")
    page.locator("dialog[open] .danger").wait_for()
    page.keyboard.press("Enter")
    page.locator("#server-demo").wait_for(state="detached")
    page.get_by_text("No servers yet").wait_for()


PAGES = {
    "servers": "/dashboard/",
    "start": "/dashboard/start",
    "server": "/dashboard/servers/lab",
    "question": "/dashboard/servers/lab/stop",
    "activity": "/dashboard/activity",
    "access": "/dashboard/access",
    "keeper": "/dashboard/keeper",
    "nothing": "/dashboard/servers/nothing",
}


def test_nothing_keeps_people_from_using_a_page(keeper, home, page):
    keeper.post(
        name="lab", labels={"team": "blue"}, description="A lab for tests", idle_timeout="2h"
    )
    page.goto(f"{home}/dashboard/")
    found = violations(page, "signed-out")
    sign_in(keeper, page)
    for scheme in ("light", "dark"):
        for width in (320, 1160, 1280):
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": width, "height": 800})
            for name, path in PAGES.items():
                page.goto(f"{home}{path}")
                if name in {"servers", "server"}:
                    page.locator(".state.running").first.wait_for()
                found += violations(page, f"{name} {scheme} {width}")
                wider = page.evaluate("document.documentElement.scrollWidth - innerWidth")
                assert wider <= 0, (name, width)
    assert found == []


def violations(page, where):
    """Return what axe-core finds serious or critical."""
    result = Axe().run(page)
    return [
        (where, one["id"], [node["html"][:200] for node in one["nodes"]])
        for one in result.response["violations"]
        if one["impact"] in {"serious", "critical"}
    ]


EVIL = "<img src=x onerror=alert(1)>\"'\u202e"


def test_what_others_have_written_does_nothing(keeper, home, page, wrong):
    (keeper.notebook_dir / EVIL).mkdir()
    keeper.post(name="lab", description=EVIL, labels={"team": EVIL}, root_dir=EVIL)
    sign_in(keeper, page)
    shown = EVIL.removesuffix("\u202e")
    page.locator("#server-lab").get_by_text(shown).first.wait_for()
    page.goto(f"{home}/dashboard/servers/lab")
    page.locator("#log", has_text=shown).wait_for()
    page.get_by_text(shown).first.wait_for()
    page.goto(f"{home}/dashboard/?q={EVIL}")
    page.goto(f"{home}/dashboard/activity?server={EVIL}")
    assert page.locator("main img").count() == 0


@pytest.mark.parametrize("mode", ["markup", "html", "redirect", "garbage", "endless"])
def test_what_a_gateway_answers_does_nothing(home, keeper, page, wrong, mode):
    sign_in(keeper, page)
    page.goto(f"{home}/dashboard/start")
    with HostileGateway(mode) as gateway:
        page.get_by_text("Kernels elsewhere").click()
        page.get_by_label("URL").fill(gateway.url)
        page.get_by_role("button", name="Check it").click()
        page.locator("#gateway .wrong").wait_for()
        page.get_by_label("Name").fill("lab")
        page.get_by_role("button", name="Start").last.click()
        page.locator("#status .state.failed").wait_for()
        page.get_by_text("gateway").first.wait_for()
        for where in ("/dashboard/servers/lab", "/dashboard/", "/dashboard/activity"):
            page.goto(f"{home}{where}")
            assert page.locator("main img").count() == 0
            assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def test_a_kernel_with_an_odd_name_does_nothing(home, keeper, page, wrong):
    with HostileGateway() as gateway:
        start_kernel(keeper.post(name="lab", **gateway.options).json())
        for kernel in gateway.kernels.values():
            kernel["name"] = EVIL + "x" * 10_000
        sign_in(keeper, page)
        page.goto(f"{home}/dashboard/servers/lab")
        page.locator("#kernels", has_text="<img src").wait_for()
        assert page.locator("main img").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def test_a_page_recovers_when_the_keeper_comes_back(keeper, home, page):
    keeper.post(name="lab")
    sign_in(keeper, page)
    page.locator("#server-lab .state.running").wait_for()
    page.evaluate("window.same = true")
    keeper.kill()
    page.locator("#connection", has_text="does not answer").wait_for()
    keeper.start()
    until(lambda: page.locator("#connection").inner_text() == "", what="the stream to begin again")
    keeper.http.post("/api/servers/lab/stop")
    page.locator("#server-lab .state.stopped").wait_for()
    assert page.evaluate("window.same") is True


def test_a_page_is_live_although_a_script_of_it_comes_late(keeper, home, page, wrong):
    def answer_late(route):
        page.wait_for_timeout(500)
        route.continue_()

    page.route("**/vendored/hx-sse*", answer_late)
    sign_in(keeper, page)
    keeper.post(name="lab")
    page.locator("#server-lab .state.running").wait_for()


def test_a_question_about_what_is_gone_is_answered(keeper, home, page, wrong):
    keeper.post(name="lab")
    sign_in(keeper, page)
    # As if the stream had not told it yet.
    page.locator("#stream").evaluate("stream => stream.remove()")
    keeper.delete("lab")
    page.locator("#server-lab").get_by_text("Stop", exact=True).click()
    page.locator("#notices", has_text="lab").get_by_role("alert").wait_for()
    assert page.locator("dialog[open]").count() == 0


STOP = """
url => fetch(url, {method: 'POST', credentials: 'include', mode: 'no-cors',
                   body: new URLSearchParams({csrf: ''})})
    .then(answer => answer.type, error => error.name)
"""


def test_no_page_of_a_lab_acts_on_the_dashboard(keeper, home, page):
    keeper.post(name="lab")
    sign_in(keeper, page)
    page.goto(f"{home}/dashboard/servers/lab/open")
    page.locator(".jp-LauncherCard").first.wait_for()
    page.evaluate(STOP, f"{home}/dashboard/servers/lab/stop")
    assert keeper.http.get("/api/servers/lab").json()["goal"] == "up"
    # Nor is a Lab where the dashboard is.
    page.goto(f"{home}/servers/lab/lab")
    assert page.url.startswith(f"http://127.0.0.1:{keeper.port}/servers/lab/lab")


def test_a_reader_looks_without_a_control_that_would_be_refused(keeper, home, page, wrong):
    keeper.post(name="lab")
    token = keeper.cli("token", "create", "reader", "--scope", "read").stdout.strip()
    sign_in(keeper, page, token)
    page.locator("#server-lab .state.running").wait_for()
    buttons = page.locator("button:visible").all_inner_texts()
    assert buttons == ["Sign out"]
    page.goto(f"{home}/dashboard/servers/lab")
    page.locator("#log", has_text="Jupyter Server").wait_for()
    assert page.locator("a:not(.skip):visible").all_inner_texts() == [
        "labkeeper", "Servers", "Activity", "Keeper", "Servers", "All events of this server", "API",
    ]  # fmt: skip
    for gone in (f"{home}/dashboard/access", f"{home}/dashboard/servers/lab/stop"):
        # The page says why; the browser tells of the status.
        assert page.goto(gone).status == 403
    wrong.clear()


def test_without_scripts_all_but_what_is_live_works(keeper, home, page):
    keeper.post(name="lab")
    sign_in(keeper, page)
    context = page.context.browser.new_context(
        java_script_enabled=False, storage_state=page.context.storage_state()
    )
    plain = context.new_page()
    plain.goto(f"{home}/dashboard/?q=lab")
    plain.locator("#server-lab").get_by_text("Stop", exact=True).click()
    plain.get_by_role("button", name="Stop").click()
    until(
        lambda: plain.goto(f"{home}/dashboard/") and plain.locator(".state.stopped").count() == 2,
        what="the server to stop",
    )
    plain.locator("#server-lab").get_by_role("button", name="Start").click()
    plain.get_by_role("link", name="Start a server").click()
    plain.get_by_label("Name").fill("Bad Name")
    plain.get_by_role("button", name="Start").last.click()
    plain.get_by_role("alert").wait_for()
    plain.get_by_label("Name").fill("other")
    plain.get_by_role("button", name="Start").last.click()
    plain.get_by_role("heading", name="other").wait_for()
