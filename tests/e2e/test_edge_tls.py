"""TLS at the public address: the keeper reads the certificate, the edge uses it."""

from __future__ import annotations

import json
import subprocess
import sys

import httpx
import pytest
import websocket

from certificates import DOMAIN, Authority, Resolved
from harness import (
    PATIENCE,
    alive,
    edges_of,
    everything_below,
    execute,
    kernel_websocket,
    run_cell,
    start_kernel,
    until,
)

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(sys.platform != "linux", reason="the edge needs Linux"),
]
PAGE = {"Accept": "text/html,*/*", "Sec-Fetch-Mode": "navigate"}


@pytest.fixture
def authority(tmp_path, monkeypatch):
    made = Authority(tmp_path)
    monkeypatch.setenv("WEBSOCKET_CLIENT_CA_BUNDLE", str(made.file))
    return made


@pytest.fixture
def make_tls_keeper(make_keeper, authority):
    """Create keepers whose edge speaks TLS."""

    def make(**settings):
        keeper = make_keeper(**authority.issue() | settings)
        keeper.verify = authority.context()
        keeper.variables["LABKEEPER_CA_FILE"] = authority.file
        return keeper

    return make


@pytest.fixture
def browse(authority):
    """Make browsers, as far as cookies go."""
    made = []

    def make():
        transport = Resolved(verify=authority.context())
        browser = httpx.Client(transport=transport, follow_redirects=True, timeout=PATIENCE)
        made.append(browser)
        return browser

    yield make
    for browser in made:
        browser.close()


def serial(keeper, context):
    """Return the serial number of the certificate that a new connection gets."""
    with (
        httpx.Client(verify=context, trust_env=False, timeout=PATIENCE) as client,
        client.stream("GET", f"{keeper.url}/edge/healthz") as reply,
    ):
        tls = reply.extensions["network_stream"].get_extra_info("ssl_object")
        return tls.getpeercert()["serialNumber"]


@pytest.mark.promise
def test_api_and_labs_speak_tls_at_one_address(make_tls_keeper, authority):
    """Labs need no certificate of their own."""
    keeper = make_tls_keeper().start()
    assert keeper.url.startswith("https:")
    server = keeper.post(name="lab").json()
    assert server["lab_url"] == f"{keeper.url}/servers/lab/lab"
    assert server["url"].startswith("http:")
    lab = server | {"url": f"{keeper.url}/servers/lab/"}
    with httpx.Client(verify=authority.context(), trust_env=False, timeout=PATIENCE) as client:
        headers = {"Authorization": f"token {server['token']}"}
        url = f"{lab['url']}api/kernels"
        answer = client.post(url, headers=headers, json={"name": "python3"})
        assert answer.status_code == 201
        content = bytes(range(256)) * 2**16
        sent = {"type": "file", "format": "text", "content": content.hex()}
        file = f"{lab['url']}api/contents/large.txt"
        assert client.put(file, headers=headers, json=sent).status_code == 201
        assert client.get(f"{lab['url']}files/large.txt", headers=headers).text == content.hex()
    with kernel_websocket(lab, answer.json()["id"]) as opened:
        assert execute(opened, "6 * 7") == "42"
    # The command line finds the keeper by its socket, and by its URL.
    printed = keeper.cli("open", "lab", "--print")
    assert printed.stdout.startswith(f"{keeper.url}/open/"), printed.stderr
    assert keeper.cli("ls", "--url", keeper.url).returncode == 0


@pytest.mark.promise
def test_wildcard_certificate_serves_each_lab_at_a_host_of_its_own(make_tls_keeper, browse):
    keeper = make_tls_keeper(lab_domain=DOMAIN).start()
    server = keeper.post(name="lab").json()
    keeper.post(name="other")
    site = f"https://lab.{DOMAIN}:{keeper.port}"
    assert server["lab_url"] == f"{site}/lab"
    browser = browse()
    link = keeper.http.post("/api/servers/lab/link", json={}).json()["url"]
    assert link.startswith(f"{site}/open/")
    page = browser.get(link, headers=PAGE)
    assert (page.status_code, str(page.url)) == (200, f"{site}/lab")
    assert page.headers["strict-transport-security"] == "max-age=15552000"
    (cookie,) = [c for c in browser.cookies.jar if "session" in c.name]
    # What the prefix demands (RFC 6265bis): Secure, no domain, and the path /.
    assert cookie.name == "__Host-labkeeper-session"
    assert (cookie.secure, cookie.path, cookie.domain_specified) == (True, "/", False)
    other = f"https://other.{DOMAIN}:{keeper.port}"
    assert browse().get(f"{other}/lab", headers=PAGE).status_code == 401
    # The bare name has the API.
    bare = f"https://{DOMAIN}:{keeper.port}"
    headers = {"Authorization": f"Bearer {keeper.token}"}
    assert len(browser.get(f"{bare}/api/servers", headers=headers).json()["servers"]) == 2
    opened = kernel_through_page(keeper, browser, site)
    assert execute(opened, "6 * 7") == "42"
    opened.close()
    for name in ("labkeeper-session", "__Secure-labkeeper-session"):
        sent = {"Cookie": f"{name}={cookie.value}"}
        assert browse().get(f"{site}/api/me", headers=sent).status_code == 401
    assert "You are signed out" in browser.get(f"{site}/logout", headers=PAGE).text
    assert not [c for c in browser.cookies.jar if "session" in c.name]


def kernel_through_page(keeper, browser, site):
    """Open a websocket to a new kernel, as the page of a Lab does."""
    xsrf = {"X-XSRFToken": browser.cookies["_xsrf"]}
    made = browser.post(f"{site}/api/kernels", json={"name": "python3"}, headers=xsrf)
    assert made.status_code == 201, made.text
    cookies = "; ".join(f"{cookie.name}={cookie.value}" for cookie in browser.cookies.jar)
    return websocket.create_connection(
        f"wss://127.0.0.1:{keeper.port}/api/kernels/{made.json()['id']}/channels",
        host=site.removeprefix("https://"),
        cookie=cookies,
        origin=site,
        timeout=PATIENCE,
    )


def test_in_path_mode_the_cookie_is_secure_and_for_one_lab(make_tls_keeper, browse):
    keeper = make_tls_keeper().start()
    keeper.post(name="lab")
    browser = browse()
    link = keeper.http.post("/api/servers/lab/link", json={}).json()["url"]
    assert browser.get(link, headers=PAGE).status_code == 200
    (cookie,) = [c for c in browser.cookies.jar if "session" in c.name]
    assert cookie.name == "__Secure-labkeeper-session"
    assert (cookie.secure, cookie.path) == (True, "/servers/lab/")
    sent = {"Cookie": f"labkeeper-session={cookie.value}"}
    assert browse().get(f"{keeper.url}/servers/lab/api/me", headers=sent).status_code == 401
    at_localhost = f"https://localhost:{keeper.port}/servers/lab/lab"
    reply = browse().get(at_localhost, headers=PAGE, follow_redirects=False)
    assert reply.headers["location"] == f"{keeper.url}/servers/lab/lab"


@pytest.mark.promise
def test_changed_certificate_is_used_without_cutting_a_connection(make_tls_keeper, authority):
    keeper = make_tls_keeper().start()
    server = keeper.post(name="lab").json()
    lab = server | {"url": f"{keeper.url}/servers/lab/"}
    context = authority.context()
    kernel = start_kernel(server)
    with kernel_websocket(lab, kernel) as opened:
        before = serial(keeper, context)
        authority.issue()
        until(lambda: serial(keeper, context) != before, what="the new certificate")
        assert execute(opened, "6 * 7") == "42"
        renewed = serial(keeper, context)
        authority.cert_file.write_text("nonsense")
        log = keeper.log
        until(lambda: "stays in use" in log.read_text(), what="the refusal of the certificate")
        assert serial(keeper, context) == renewed
        # Another edge begins with the one that is in use.
        (edge,) = edges_of(keeper)
        edge.kill()
        until(lambda: edges_of(keeper) not in ([], [edge]), what="another edge")
        assert serial(keeper, context) == renewed
    (edge,) = edges_of(keeper)
    keeper.kill()
    assert serial(keeper, context) == renewed
    # The next keeper brings what the files have by then.
    authority.issue()
    keeper.start()
    assert edges_of(keeper) == [edge]
    until(lambda: serial(keeper, context) != renewed, what="the newer certificate")


def test_tls_is_turned_on_and_off_at_the_same_address(make_tls_keeper, authority):
    """Nothing is served in the clear once it is on, and open connections end by themselves."""
    keeper = make_tls_keeper(on_exit="leave").start()
    lab = keeper.post(name="lab").json()
    (secure,) = edges_of(keeper)
    files = {name: keeper.settings.pop(name) for name in ("cert_file", "key_file")}
    assert keeper.stop() == 0
    keeper.start()
    assert keeper.url.startswith("http:")
    until(lambda: not alive(secure.pid), what="the edge that speaks TLS to end")
    assert keeper.wait_for("running", "lab")["lab_url"] == f"{keeper.url}/servers/lab/lab"
    (plain,) = edges_of(keeper)
    keeper.settings |= files | {"on_exit": "stop"}
    assert keeper.stop() == 0
    keeper.start()
    until(lambda: not alive(plain.pid), what="the edge that speaks plain HTTP to end")
    refused = httpx.get(keeper.url.replace("https", "http"), trust_env=False)
    assert (refused.status_code, "HTTPS" in refused.json()["detail"]) == (400, True)
    keeper.wait_for("running", "lab")
    assert run_cell(lab, start_kernel(lab), "1 + 1") == "2"


def test_key_is_in_no_file_log_environment_or_argument(make_tls_keeper, authority):
    keeper = make_tls_keeper().start()
    keeper.post(name="lab")
    authority.issue()
    context = authority.context()
    before = serial(keeper, context)
    authority.issue()
    until(lambda: serial(keeper, context) != before, what="the new certificate")
    (edge,) = edges_of(keeper)
    lines = authority.key_file.read_text().splitlines()[1:-1]
    seen = str(edge.environ()) + str(edge.cmdline())
    for found in everything_below(keeper.base):
        seen += found.content.decode(errors="replace")
    assert not any(line in seen for line in lines)


def test_key_that_others_can_read_is_reported(make_tls_keeper, authority):
    keeper = make_tls_keeper()
    authority.key_file.chmod(0o644)
    keeper.start()
    entries = [json.loads(line) for line in keeper.log.read_text().splitlines() if "chmod" in line]
    assert [entry["level"] for entry in entries] == ["warning"]


def test_unusable_certificate_is_reported_in_one_line_and_leaves_no_edge(
    make_tls_keeper, authority
):
    for content, why in (("nonsense", "they must be PEM"), (None, "cannot read the file")):
        keeper = make_tls_keeper()
        if content is None:
            authority.cert_file.unlink()
        else:
            authority.cert_file.write_text(content)
        ended = keeper.cli("serve")
        assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
        assert why in ended.stderr
        assert not edges_of(keeper)


def test_serve_start_works_with_a_certificate_for_another_name(make_tls_keeper, authority):
    keeper = make_tls_keeper()
    authority.issue("notebooks.example.org")
    with keeper.log.open("ab") as log:
        keeper.process = subprocess.Popen(
            keeper.command("serve", "--start"), env=keeper.environment, stdout=log, stderr=log
        )
    until(lambda: "JupyterLab is ready" in keeper.log.read_text(), what="the server to be ready")
    keeper.process.terminate()
    assert keeper.process.wait(PATIENCE) == 0


def test_browsers_may_use_plain_http_at_the_ports_of_labs(make_tls_keeper, browse):
    """Else they would refuse to: the policy is for all ports of a host."""
    keeper = make_tls_keeper(lab_address="port", allowed_hosts=DOMAIN).start()
    reply = browse().get(f"https://{DOMAIN}:{keeper.port}/healthz")
    assert reply.status_code == 200
    assert "strict-transport-security" not in reply.headers
