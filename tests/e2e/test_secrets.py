"""Secrets are not exposed in logs, responses, command lines, environments or files."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import signal
from pathlib import Path
from urllib.parse import quote

import httpx
import psutil
import pytest

from harness import (
    PATIENCE,
    everything_below,
    give_hands,
    processes_marked,
    processes_where,
    run_in_server,
    start_kernel,
    until,
)

FILES_WITH_SECRETS = ("token", "labkeeper.sqlite", "jpserver-", "kernel-", "jupyter_cookie_secret")
"""Prefixes of the names of files that must contain secrets."""


class Secrets:
    """The secrets in use, and a search for them."""

    def __init__(self):
        self.values = {}

    def make(self, name):
        self.values[name] = f"{name}/{secrets.token_urlsafe(18)}+"
        return self.values[name]

    def within(self, content, *, but=()):
        """Return the names of the secrets that a content contains, in any encoding."""
        raw = content if isinstance(content, bytes) else content.encode()
        wanted = {name: value for name, value in self.values.items() if name not in but}
        return sorted(
            name for name, value in wanted.items() if any(form in raw for form in encodings(value))
        )


def encodings(value):
    """Return the ways in which a secret can be written."""
    written = {
        value,
        quote(value),
        quote(value, safe=""),
        json.dumps(value)[1:-1],
        value.encode().hex(),
    }
    # At every offset in base64; the first and last characters depend on what is beside them.
    for shift in range(3):
        code = base64.b64encode(b"x" * shift + value.encode()).decode()
        written |= {code[4:-4], code[4:-4].translate(str.maketrans("+/", "-_"))}
    return [form.encode() for form in written]


@pytest.fixture
def known_secrets():
    return Secrets()


def test_secret_search_finds_planted_secrets(known_secrets, tmp_path):
    value = known_secrets.make("planted")
    for form in (
        value,
        quote(value, safe=""),
        base64.b64encode(f"a:{value}".encode()).decode(),
        json.dumps({"a": value}),
    ):
        assert known_secrets.within(f"before {form} after") == ["planted"], form
    assert known_secrets.within(f"before {value[:-6]} after") == []
    assert known_secrets.within(value, but=["planted"]) == []
    place = tmp_path / "open"
    place.write_text(value)
    place.chmod(0o644)
    assert readable_by_others(tmp_path, known_secrets) == [(str(place), ["planted"])]
    place.chmod(0o600)
    assert readable_by_others(tmp_path, known_secrets) == []
    assert paths_of(files_containing(tmp_path, known_secrets)) == [str(place)]


def files_containing(place, known_secrets):
    return [found for found in everything_below(place) if known_secrets.within(found.content)]


def paths_of(found):
    return [str(each.path) for each in found]


def is_private(found, top):
    """Return whether only its owner can read a file, or reach it."""
    ways = [parent for parent in found.path.parents if parent.is_relative_to(top)]
    return found.mode & 0o077 == 0 or any(way.stat().st_mode & 0o077 == 0 for way in ways)


def readable_by_others(place, known_secrets):
    """Return the files that others can read, assuming that they can reach the directory itself."""
    inside = [(found, known_secrets.within(found.content)) for found in everything_below(place)]
    return [(str(found.path), what) for found, what in inside if what and found.mode & 0o077]


def exercise_api(keeper, gateway, known_secrets):
    """Use every part of the API, and return all responses."""
    kernel_secret, env_secret, header = (
        known_secrets.make(name) for name in ("kernel_env", "env", "header")
    )
    known_secrets.values["gateway"] = gateway.token
    answers = []

    def request(method, path, **given):
        answer = keeper.http.request(method, path, **given)
        found = (
            json.loads(answer.text)
            if answer.headers.get("Content-Type") == "application/json"
            else {}
        )
        if found.get("token"):
            known_secrets.values[f"server token {len(known_secrets.values)}"] = found["token"]
        answers.append((method, path, answer))
        return answer

    behind = {
        "name": "behind",
        **gateway.options,
        "gateway_headers": {"X-Key": header},
        "env": {"MY_KEY": env_secret},
        "kernel_env": {"KERNEL_KEY": kernel_secret},
        "labels": {"team": "blue"},
    }
    created = request("POST", "/api/servers", json=behind)
    assert created.status_code == 201, created.text
    server = created.json()
    start_kernel(server)
    for path in ("", "/kernels", "/logs", "/events"):
        assert request("GET", f"/api/servers/behind{path}").status_code == 200
    differing = request(
        "POST", "/api/servers", json=behind | {"env": {"MY_KEY": known_secrets.make("other")}}
    )
    assert differing.status_code == 409

    # A server's own output, a crash, and a restart.
    source = (
        f"import sys; print('Authorization: token {gateway.token}', 'password={env_secret}',"
        " file=sys.stderr, flush=True)"
    )
    run_in_server(server, source)
    assert "password=[secret]" in until(
        lambda: logged_password_line(request), what="the password line in the server's log"
    )
    # Wrong tokens in a URL and in a header, sent to the server and to the keeper.
    wrong = known_secrets.make("wrong")
    httpx.get(
        f"{server['url']}api/status", params={"token": wrong}, trust_env=False, timeout=PATIENCE
    )
    for where in (
        {"params": {"token": wrong}, "headers": {"Authorization": ""}},
        {"headers": {"Authorization": f"Bearer {wrong}"}},
    ):
        assert request("GET", "/api/servers", **where).status_code == 401
    os.kill(server["pid"], signal.SIGKILL)
    until(lambda: keeper.get("behind")["restarts"] == 1, what="the restart after the crash")
    request("GET", "/api/servers/behind", params={"wait_for": "running", "wait": PATIENCE})
    assert request(
        "POST", "/api/servers/behind/restart", json={"keep_kernels": True}
    ).status_code in {
        200,
        201,
    }
    assert request("POST", "/api/servers/behind/stop").status_code == 200

    # Malformed and invalid bodies.
    for body in (
        f'{{"name": "{wrong}',
        f'["{wrong}"]',
        json.dumps({"name": "x", "gateway_auth_token": wrong}),
    ):
        answer = request(
            "POST", "/api/servers", content=body, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code in {400, 422}, answer.text
    request(
        "POST", "/api/servers", json={"name": "x", "env": {"A": known_secrets.make("bad") + "\0"}}
    )

    # A gateway that refuses the token, and one that is down.
    refused = request(
        "POST", "/api/servers", json=behind | {"name": "refused", "gateway_auth_token": wrong}
    )
    assert refused.status_code == 502, refused.text
    gateway.stop()
    dead = request("POST", "/api/servers/behind/start")
    assert dead.status_code == 502, dead.text
    assert dead.json()["failure_class"] == "gateway-unreachable"
    for path in (
        "/api/servers",
        "/api/events",
        "/api/orphaned-kernels",
        "/api/webhooks",
        "/metrics",
        "/api/openapi.json",
    ):
        assert request("GET", path).status_code == 200
    assert (
        request(
            "POST", "/api/servers", json={"name": "beside", "env": {"MY_KEY": env_secret}}
        ).status_code
        == 201
    )
    return answers


def logged_password_line(request):
    log = request("GET", "/api/servers/behind/logs").text
    return log if "password=" in log else None


def test_secrets_are_not_exposed_in_responses_logs_processes_or_files(
    make_keeper, gateway, known_secrets
):
    api_token = known_secrets.make("api")
    keeper = make_keeper(
        token=api_token,
        debug="true",
        log_level="debug",
        echo_logs="true",
        gateway_timeout=3,
        stop_grace=4,
        gateway_period=1,
    )
    give_hands(keeper)
    keeper.start()
    answers = exercise_api(keeper, gateway, known_secrets)
    everything = {process.pid for process in processes_marked(keeper.server_dirs)} | {
        keeper.process.pid
    }
    assert len(everything) > 1

    # Everyone can read argument lists. An environment is readable by its owner only,
    # and may contain the server's own variables.
    shown = set()
    for process in processes_where(
        lambda process: everything & {process.pid, *(each.pid for each in process.parents())}
    ):
        with contextlib.suppress(
            psutil.NoSuchProcess, FileNotFoundError
        ):  # The process may have exited.
            assert known_secrets.within("\0".join(process.cmdline())) == [], process
            assert Path(f"/proc/{process.pid}/environ").stat().st_mode & 0o077 == 0
            shown.add(process.pid)
    assert len(shown) > 1
    assert keeper.process.pid in shown

    # A server's token may occur only in responses about that server, in its token and its link.
    servers = [name for name in known_secrets.values if name.startswith("server token")]
    assert len(servers) >= 2
    for method, path, answer in answers:
        tells = (
            path.startswith("/api/servers")
            and answer.headers.get("Content-Type") == "application/json"
        )
        assert known_secrets.within(answer.text, but=servers if tells else ()) == [], (
            method,
            path,
            answer.text[:2000],
        )

    # Files with secrets are private, and only those that must have any.
    assert readable_by_others(keeper.state_dir, known_secrets) == []
    for found in files_containing(keeper.state_dir, known_secrets):
        assert is_private(found, keeper.state_dir), found.path
        # A server's own output is in its log, which belongs to its owner.
        assert found.path.name.startswith(FILES_WITH_SECRETS) or found.path.parent.name == "logs", (
            found.path
        )
    assert (keeper.state_dir / "labkeeper.sqlite").is_file()

    lines = [
        json.loads(line) for line in keeper.log.read_text().splitlines() if line.startswith("{")
    ]
    assert {"labkeeper.api", "labkeeper.servers", "jupyter"} <= {line["logger"] for line in lines}
    assert known_secrets.within(keeper.log.read_bytes()) == []
    assert "[secret]" in keeper.log.read_text()
    about = [
        line
        for line in lines
        if "server" in line and line["logger"].startswith(("jupyter", "labkeeper.servers"))
    ]
    assert about
    assert [line for line in about if not line.get("generation")] == []
    echoed = {
        line["generation"]
        for line in about
        if (line["logger"], line["server"]) == ("jupyter", "behind")
    }
    assert len(echoed) >= 3, "expected the launch, the relaunch and the restart"
    ids = {answer.headers["X-Request-Id"] for _, _, answer in answers}
    assert {line["request_id"] for line in about if "request_id" in line} <= ids
    assert any(line.get("actor") == "token:owner" and line.get("request_id") for line in about)
    assert keeper.stop() == 0
    assert known_secrets.within(keeper.log.read_bytes()) == []


FALSE_SECRETS = (
    "token:owner",
    "a-request-id",
    "labkeeper.servers",
    "starting -> running",
    "prober-1",
    "elsewhere",
)
"""Texts that would be redacted in other logs if a server's variables were searched for there."""


def test_each_log_redacts_only_the_secrets_of_its_own_server(
    make_keeper,
):
    """A server cannot verify guesses of secrets by logging them, nor redact text of others."""
    owners, others, key, password = (secrets.token_urlsafe(18) for _ in range(4))
    keeper = make_keeper(token=owners, echo_logs="true").start()
    keeper.http.headers["X-Request-Id"] = "a-request-id"
    env = {f"V{number}": value for number, value in enumerate(FALSE_SECRETS)}
    env |= {
        "PEM": f"-----BEGIN KEY-----\n{key}\n-----END KEY-----\n",
        "DB_PASSWORD": f"/{password}",
    }
    for name, variables in (("other", {"KEY": others}), ("prober-1", env)):
        assert keeper.post("?wait=0", name=name, env=variables).status_code == 202
    servers = [keeper.wait_for("running", name) for name in ("other", "prober-1")]
    for server in servers:
        with httpx.Client(
            base_url=server["url"],
            params={"token": server["token"]},
            timeout=PATIENCE,
            trust_env=False,
        ) as http:
            for word in (others, owners, key, password, "prober-1", "last"):
                http.get(f"elsewhere//{word}")
    in_other, in_prober = (
        until(
            lambda url=f"/api/servers/{server['name']}/logs": if_last_seen(
                keeper.http.get(url).text
            ),
            what="the last request in the server's log",
        )
        for server in servers
    )
    assert others not in in_other
    assert all(f"/elsewhere//{word}" in in_other for word in (owners, key, password, "prober-1"))
    assert key not in in_prober
    assert f"/{password}" not in in_prober
    assert all(f"/{word}" in in_prober for word in (others, owners))

    keeper_log = until(
        lambda: if_last_seen(keeper.log.read_text(), times=2), what="both last requests in the log"
    )
    assert owners not in keeper_log
    lines = [json.loads(line) for line in keeper_log.splitlines() if line.startswith("{")]
    assert not [line for line in lines if line.get("server") == "other" and others in line["event"]]
    started = [line for line in lines if line["event"] == "starting -> running"]
    assert sorted(
        (line["server"], line["actor"], line["request_id"], line["logger"]) for line in started
    ) == [
        (name, "token:owner", "a-request-id", "labkeeper.servers") for name in ("other", "prober-1")
    ]


def test_secrets_of_a_deleted_server_are_removed_from_the_disk(keeper, known_secrets):
    """Those of an earlier spec, too, and while the keeper is still running."""
    secret, kernels = known_secrets.make("env"), known_secrets.make("kernel env")
    spec = {"name": "forgotten", "env": {"KEY": secret}, "kernel_env": {"KERNEL_KEY": kernels}}
    assert keeper.post(**spec).status_code == 201
    assert keeper.post("/forgotten/restart", idle_timeout="1h").status_code in {200, 201}
    assert any(
        found.path.name.startswith("labkeeper.sqlite")
        for found in files_containing(keeper.state_dir, known_secrets)
    )
    assert keeper.delete("forgotten").status_code == 200
    until(
        lambda: not files_containing(keeper.state_dir, known_secrets),
        what=lambda: f"no secrets in {paths_of(files_containing(keeper.state_dir, known_secrets))}",
    )


def if_last_seen(text, times=1):
    return text if text.count("/last") >= times else None


PAGES = (
    "lab",
    "lab/tree/x",
    "lab/workspaces/a",
    "doc/tree/x",
    "tree",
    "login",
    "logout",
    "nowhere",
    "files/x",
)
API_PATHS = tuple(f"api/{what}" for what in ("me", "status", "contents", "kernelspecs", "sessions"))
API_PATHS += tuple(f"lab/api/{what}" for what in ("settings", "workspaces", "translations"))


def test_lab_pages_expose_neither_the_token_nor_a_referrer(make_keeper, known_secrets):
    keeper = make_keeper(launch_by="exec").start()
    (keeper.notebook_dir / "x").write_text("x")
    first = keeper.post().json()
    known_secrets.values["token"] = first["token"]
    assert len(bytes.fromhex(first["token"])) * 8 >= 192
    with httpx.Client(base_url=first["url"], trust_env=False, timeout=PATIENCE) as browser:
        opened = browser.get("lab", params={"token": first["token"]})
        assert opened.status_code == 200
        assert known_secrets.within(opened.content) == []
        # From here on the cookie identifies the browser; scripts cannot read it.
        cookie = next(line for line in opened.headers.get_list("set-cookie") if "username-" in line)
        assert "HttpOnly" in cookie
        assert known_secrets.within(cookie) == []
        for path in [*PAGES, *API_PATHS]:
            # `logout` ends the session, so each page is requested in a new one.
            browser.get("lab", params={"token": first["token"]})
            answer = browser.get(path, headers={"Referer": f"{first['url']}lab"})
            assert answer.status_code in {200, 302, 404}, (path, answer.status_code)
            assert known_secrets.within(answer.content + repr(answer.headers).encode()) == [], path
            assert answer.headers["Referrer-Policy"] == "same-origin", path
            assert "frame-ancestors 'self'" in answer.headers["Content-Security-Policy"], path
    assert keeper.post("/default/restart").json()["token"] != first["token"]


def test_custom_headers_of_a_site_are_kept(make_keeper):
    keeper = make_keeper(launch_by="exec")
    keeper.configure_jupyter(
        "c.ServerApp.tornado_settings = "
        "{'headers': {'Referrer-Policy': 'no-referrer', 'X-Own': '1'}}"
    )
    server = keeper.start().post().json()
    headers = httpx.get(f"{server['url']}login", trust_env=False, timeout=PATIENCE).headers
    assert (headers["Referrer-Policy"], headers["X-Own"]) == ("no-referrer", "1")
