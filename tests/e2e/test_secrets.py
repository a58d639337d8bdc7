"""Nobody reads a secret who is not to: not in a log, an answer, a command line, an environment or a file."""

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

HOLD_SECRETS = ("token", "labkeeper.sqlite", "jpserver-", "kernel-", "jupyter_cookie_secret")
"""Files that must hold some, by how their names begin."""


class Secrets:
    """What is used, and where any of it is found."""

    def __init__(self):
        self.values = {}

    def make(self, name):
        self.values[name] = f"{name}/{secrets.token_urlsafe(18)}+"
        return self.values[name]

    def within(self, content, *, but=()):
        """Name those that a content has, in any form."""
        raw = content if isinstance(content, bytes) else content.encode()
        wanted = {name: value for name, value in self.values.items() if name not in but}
        return sorted(
            name for name, value in wanted.items() if any(form in raw for form in forms(value))
        )


def forms(value):
    """The ways in which a secret can be written."""
    written = {
        value,
        quote(value),
        quote(value, safe=""),
        json.dumps(value)[1:-1],
        value.encode().hex(),
    }
    # At each place within what is encoded; the characters at its ends depend on what stands beside them.
    for shift in range(3):
        code = base64.b64encode(b"x" * shift + value.encode()).decode()
        written |= {code[4:-4], code[4:-4].translate(str.maketrans("+/", "-_"))}
    return [form.encode() for form in written]


@pytest.fixture
def known():
    return Secrets()


def test_the_search_finds_what_was_planted(known, tmp_path):
    value = known.make("planted")
    for form in (
        value,
        quote(value, safe=""),
        base64.b64encode(f"a:{value}".encode()).decode(),
        json.dumps({"a": value}),
    ):
        assert known.within(f"before {form} after") == ["planted"], form
    assert known.within(f"before {value[:-6]} after") == []
    assert known.within(value, but=["planted"]) == []
    place = tmp_path / "open"
    place.write_text(value)
    place.chmod(0o644)
    assert found_by_others(tmp_path, known) == [(str(place), ["planted"])]
    place.chmod(0o600)
    assert found_by_others(tmp_path, known) == []
    assert names(files_that_hold(tmp_path, known)) == [str(place)]


def files_that_hold(place, known):
    return [found for found in everything_below(place) if known.within(found.content)]


def names(found):
    return [str(each.path) for each in found]


def is_private(found, top):
    """Whether only its owner can read a file, or come to it."""
    ways = [parent for parent in found.path.parents if parent.is_relative_to(top)]
    return found.mode & 0o077 == 0 or any(way.stat().st_mode & 0o077 == 0 for way in ways)


def found_by_others(place, known):
    """What others can read; the place itself is thought to be open."""
    inside = [(found, known.within(found.content)) for found in everything_below(place)]
    return [(str(found.path), what) for found, what in inside if what and found.mode & 0o077]


def use_everything(keeper, gateway, known):
    """Do all that the API can do; give each answer."""
    kernel_secret, env_secret, header = (
        known.make(name) for name in ("kernel_env", "env", "header")
    )
    known.values["gateway"] = gateway.token
    answers = []

    def ask(method, path, **given):
        answer = keeper.http.request(method, path, **given)
        found = (
            json.loads(answer.text)
            if answer.headers.get("Content-Type") == "application/json"
            else {}
        )
        if found.get("token"):
            known.values[f"server token {len(known.values)}"] = found["token"]
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
    created = ask("POST", "/api/servers", json=behind)
    assert created.status_code == 201, created.text
    server = created.json()
    start_kernel(server)
    for path in ("", "/kernels", "/logs", "/events"):
        assert ask("GET", f"/api/servers/behind{path}").status_code == 200
    differing = ask("POST", "/api/servers", json=behind | {"env": {"MY_KEY": known.make("other")}})
    assert differing.status_code == 409

    # What a server says of itself, a crash, and a restart.
    said = f"import sys; print('Authorization: token {gateway.token}', 'password={env_secret}', file=sys.stderr, flush=True)"
    run_in_server(server, said)
    assert "password=[secret]" in until(lambda: _said(ask), what="the server's words in its log")
    # Wrong tokens, in a URL and in a header, at the server and at the keeper.
    wrong = known.make("wrong")
    httpx.get(
        f"{server['url']}api/status", params={"token": wrong}, trust_env=False, timeout=PATIENCE
    )
    for where in (
        {"params": {"token": wrong}, "headers": {"Authorization": ""}},
        {"headers": {"Authorization": f"Bearer {wrong}"}},
    ):
        assert ask("GET", "/api/servers", **where).status_code == 401
    os.kill(server["pid"], signal.SIGKILL)
    until(lambda: keeper.get("behind")["restarts"] == 1, what="the restart after a crash")
    ask("GET", "/api/servers/behind", params={"wait_for": "running", "wait": PATIENCE})
    assert ask("POST", "/api/servers/behind/restart", json={"keep_kernels": True}).status_code in {
        200,
        201,
    }
    assert ask("POST", "/api/servers/behind/stop").status_code == 200

    # Bodies that are none, or wrong.
    for body in (
        f'{{"name": "{wrong}',
        f'["{wrong}"]',
        json.dumps({"name": "x", "gateway_auth_token": wrong}),
    ):
        answer = ask(
            "POST", "/api/servers", content=body, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code in {400, 422}, answer.text
    ask("POST", "/api/servers", json={"name": "x", "env": {"A": known.make("bad") + "\0"}})

    # A gateway that refuses, and one that is dead.
    refused = ask(
        "POST", "/api/servers", json=behind | {"name": "refused", "gateway_auth_token": wrong}
    )
    assert refused.status_code == 502, refused.text
    gateway.stop()
    dead = ask("POST", "/api/servers/behind/start")
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
        assert ask("GET", path).status_code == 200
    assert (
        ask(
            "POST", "/api/servers", json={"name": "beside", "env": {"MY_KEY": env_secret}}
        ).status_code
        == 201
    )
    return answers


def _said(ask):
    log = ask("GET", "/api/servers/behind/logs").text
    return log if "password=" in log else None


def test_a_secret_is_read_nowhere_by_who_is_not_to(make_keeper, gateway, known):
    api_token = known.make("api")
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
    answers = use_everything(keeper, gateway, known)
    everything = {process.pid for process in processes_marked(keeper.server_dirs)} | {
        keeper.process.pid
    }
    assert len(everything) > 1

    # Argument lists are everybody's; an environment is its owner's, and is where a server's own variables belong.
    shown = set()
    for process in processes_where(
        lambda process: everything & {process.pid, *(each.pid for each in process.parents())}
    ):
        with contextlib.suppress(
            psutil.NoSuchProcess, FileNotFoundError
        ):  # It has ended meanwhile.
            assert known.within("\0".join(process.cmdline())) == [], process
            assert Path(f"/proc/{process.pid}/environ").stat().st_mode & 0o077 == 0
            shown.add(process.pid)
    assert len(shown) > 1
    assert keeper.process.pid in shown

    # A server's token is in what is told of that server alone: its token, its link.
    servers = [name for name in known.values if name.startswith("server token")]
    assert len(servers) >= 2
    for method, path, answer in answers:
        tells = (
            path.startswith("/api/servers")
            and answer.headers.get("Content-Type") == "application/json"
        )
        assert known.within(answer.text, but=servers if tells else ()) == [], (
            method,
            path,
            answer.text[:2000],
        )

    # Files: private, and only those that must have any.
    assert found_by_others(keeper.state_dir, known) == []
    for found in files_that_hold(keeper.state_dir, known):
        assert is_private(found, keeper.state_dir), found.path
        # A server's own words are in its own log, which is its owner's.
        assert found.path.name.startswith(HOLD_SECRETS) or found.path.parent.name == "logs", (
            found.path
        )
    assert (keeper.state_dir / "labkeeper.sqlite").is_file()

    lines = [
        json.loads(line) for line in keeper.log.read_text().splitlines() if line.startswith("{")
    ]
    assert {"labkeeper.api", "labkeeper.servers", "jupyter"} <= {line["logger"] for line in lines}
    assert known.within(keeper.log.read_bytes()) == []
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
    assert len(echoed) >= 3, "the first launch, the one after the crash, the restart"
    ids = {answer.headers["X-Request-Id"] for _, _, answer in answers}
    assert {line["request_id"] for line in about if "request_id" in line} <= ids
    assert any(line.get("actor") == "token:owner" and line.get("request_id") for line in about)
    assert keeper.stop() == 0
    assert known.within(keeper.log.read_bytes()) == []


BLANKING = (
    "token:owner",
    "a-request-id",
    "labkeeper.servers",
    "starting -> running",
    "prober-1",
    "elsewhere",
)
"""What a server would blank in the keeper's log, or in those of others, if its own secrets were looked for there."""


def test_a_log_hides_the_secrets_of_its_own_server_and_tells_nothing_of_those_of_others(
    make_keeper,
):
    """A server that writes its guesses into its log learns from none of them, and blanks nothing that others have written."""
    owners, others, key, password = (secrets.token_urlsafe(18) for _ in range(4))
    keeper = make_keeper(token=owners, echo_logs="true").start()
    keeper.http.headers["X-Request-Id"] = "a-request-id"
    env = {f"V{number}": value for number, value in enumerate(BLANKING)}
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
            lambda url=f"/api/servers/{server['name']}/logs": _if_last(keeper.http.get(url).text),
            what="the last words",
        )
        for server in servers
    )
    assert others not in in_other
    assert all(f"/elsewhere//{word}" in in_other for word in (owners, key, password, "prober-1"))
    assert key not in in_prober
    assert f"/{password}" not in in_prober
    assert all(f"/{word}" in in_prober for word in (others, owners))

    told = until(lambda: _if_last(keeper.log.read_text(), times=2), what="both in the keeper's log")
    assert owners not in told
    lines = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    assert not [line for line in lines if line.get("server") == "other" and others in line["event"]]
    begun = [line for line in lines if line["event"] == "starting -> running"]
    assert sorted(
        (line["server"], line["actor"], line["request_id"], line["logger"]) for line in begun
    ) == [
        (name, "token:owner", "a-request-id", "labkeeper.servers") for name in ("other", "prober-1")
    ]


def test_of_a_server_that_is_deleted_no_secret_stays_on_the_disk(keeper, known):
    """Nor of what its spec was before a change. The keeper goes on: what it would do when it ends does not count."""
    secret, kernels = known.make("env"), known.make("kernel env")
    asked = {"name": "forgotten", "env": {"KEY": secret}, "kernel_env": {"KERNEL_KEY": kernels}}
    assert keeper.post(**asked).status_code == 201
    assert keeper.post("/forgotten/restart", idle_timeout="1h").status_code in {200, 201}
    assert any(
        found.path.name.startswith("labkeeper.sqlite")
        for found in files_that_hold(keeper.state_dir, known)
    )
    assert keeper.delete("forgotten").status_code == 200
    until(
        lambda: not files_that_hold(keeper.state_dir, known),
        what=lambda: str(names(files_that_hold(keeper.state_dir, known))),
    )


def _if_last(text, times=1):
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
ASKED = tuple(f"api/{what}" for what in ("me", "status", "contents", "kernelspecs", "sessions"))
ASKED += tuple(f"lab/api/{what}" for what in ("settings", "workspaces", "translations"))


def test_no_page_of_the_lab_holds_its_token_and_no_address_goes_to_other_sites(make_keeper, known):
    keeper = make_keeper(launch_by="exec").start()
    (keeper.notebook_dir / "x").write_text("x")
    first = keeper.post().json()
    known.values["token"] = first["token"]
    assert len(bytes.fromhex(first["token"])) * 8 >= 192
    with httpx.Client(base_url=first["url"], trust_env=False, timeout=PATIENCE) as browser:
        opened = browser.get("lab", params={"token": first["token"]})
        assert opened.status_code == 200
        assert known.within(opened.content) == []
        # From here on it is known by its cookie, which is not for scripts.
        cookie = next(line for line in opened.headers.get_list("set-cookie") if "username-" in line)
        assert "HttpOnly" in cookie
        assert known.within(cookie) == []
        for path in [*PAGES, *ASKED]:
            # `logout` ends the session, so each page is asked for with one of its own.
            browser.get("lab", params={"token": first["token"]})
            answer = browser.get(path, headers={"Referer": f"{first['url']}lab"})
            assert answer.status_code in {200, 302, 404}, (path, answer.status_code)
            assert known.within(answer.content + repr(answer.headers).encode()) == [], path
            assert answer.headers["Referrer-Policy"] == "same-origin", path
            assert "frame-ancestors 'self'" in answer.headers["Content-Security-Policy"], path
    assert keeper.post("/default/restart").json()["token"] != first["token"]


def test_a_referrer_policy_and_other_headers_of_the_sites_own_stay(make_keeper):
    keeper = make_keeper(launch_by="exec")
    keeper.configure_jupyter(
        "c.ServerApp.tornado_settings = {'headers': {'Referrer-Policy': 'no-referrer', 'X-Own': '1'}}"
    )
    server = keeper.start().post().json()
    headers = httpx.get(f"{server['url']}login", trust_env=False, timeout=PATIENCE).headers
    assert (headers["Referrer-Policy"], headers["X-Own"]) == ("no-referrer", "1")
