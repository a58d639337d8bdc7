"""The list of servers, commands to them, and the page of one."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace

import pytest
from werkzeug.datastructures import MultiDict

from harness import until
from labkeeper.core.access import Scope
from labkeeper.core.errors import BackendUnavailable, StoreError
from labkeeper.core.lifecycle import State
from labkeeper.core.messages import Create
from labkeeper.core.server import (
    Exit,
    Failure,
    FailureClass,
    GatewayHealth,
    Kernel,
    Load,
    Sample,
    Usage,
)
from labkeeper.testing.fakes import a_spec
from labkeeper.web.listing import Query
from labkeeper.web.plain import plain
from labkeeper.web.rendering import amount
from labkeeper.web.sparklines import sparkline
from web_pages import a_dashboard

SERVERS = "/dashboard/"
HOSTILE = "<script>alert(1)</script>\"'&\u202e\x1b[31m"


@pytest.fixture
def site(tmp_path):
    with a_dashboard(tmp_path) as made:
        yield made


def start(site, name="lab", **changed):
    site.running.keeper.ask(Create(replace(a_spec(name), **changed)))
    until(lambda: site.running.keeper.get(name).state is State.RUNNING)


def names(page):
    return re.findall(r'<tr id="server-([^"]+)"', page.text)


def test_an_empty_list_teaches_the_first_step(site):
    text = site.browser().get(SERVERS).text
    assert ("Start the first one" in text, "labkeeper start demo" in text) == (True, True)
    assert "Start the first one" not in site.browser(Scope.READ).get(SERVERS).text


def test_servers_are_searched_filtered_and_sorted(site):
    start(site, "lab-a", description="Physics, room 7", labels={"team": "blue"})
    start(site, "lab-b", labels={"team": "red"})
    start(site, "other")
    browser = site.browser()
    browser.get(SERVERS)
    browser.post("/dashboard/servers/other/stop")
    until(lambda: site.running.keeper.get("other").state is State.STOPPED)
    for query, found in {
        "": ["lab-a", "lab-b", "other"],
        "?q=LAB": ["lab-a", "lab-b"],
        "?q=blue+physics": ["lab-a"],
        "?q=team": ["lab-a", "lab-b"],
        "?q=nothing": [],
        "?state=stopped": ["other"],
        "?state=running&q=b": ["lab-a", "lab-b"],
        "?sort=name&order=descending": ["other", "lab-b", "lab-a"],
        "?sort=since": ["lab-a", "lab-b", "other"],
        "?sort=state": ["other", "lab-a", "lab-b"],
        "?sort=used": ["lab-a", "lab-b", "other"],
        "?sort=memory": ["lab-a", "lab-b", "other"],
        "?sort=cpus&order=descending": ["other", "lab-b", "lab-a"],
        "?state=nonsense&sort=x&page=0&page=9": ["lab-a", "lab-b", "other"],
    }.items():
        assert names(browser.get(SERVERS + query)) == found, query
    assert "No server matches" in browser.get(SERVERS + "?q=nothing").text
    counts = re.findall(r"<b>(\d+)</b>", browser.get(SERVERS + "?q=nothing").text)
    assert counts == ["3", "2", "1"]


def test_a_hundred_servers_are_on_a_page(site, monkeypatch):
    start(site, "lab")
    one = site.running.keeper.get("lab")
    many = [replace(one, spec=replace(one.spec, name=f"lab-{at:03}")) for at in range(205)]
    monkeypatch.setattr(site.running.keeper, "all", lambda: many)
    browser = site.browser()
    first, last = browser.get(SERVERS), browser.get(SERVERS + "?page=3")
    assert (len(names(first)), names(last)) == (100, [f"lab-{at:03}" for at in range(200, 205)])
    assert ('rel="prev"' in first.text, 'rel="next"' in first.text) == (False, True)
    assert ('rel="prev"' in last.text, 'rel="next"' in last.text) == (True, False)
    assert "Page 3 of 3, 205 servers" in last.text


def test_the_address_of_a_list_keeps_what_was_chosen():
    query = Query.of(MultiDict({"q": " a b ", "state": "running", "sort": "memory", "page": "2"}))
    assert query.address() == "?q=a+b&state=running&sort=memory&page=2"
    assert query.sorted_by("memory") == "?q=a+b&state=running&sort=memory&order=descending"
    assert query.sorted_by("name") == "?q=a+b&state=running"
    # The largest first, and then the smallest.
    assert query.sorted_by("cpus") == "?q=a+b&state=running&sort=cpus&order=descending"
    most = Query.of(MultiDict({"sort": "cpus", "order": "descending"}))
    assert most.sorted_by("cpus") == "?sort=cpus"
    assert query.address(state=None, page=None) == "?q=a+b&sort=memory"


def test_usage_is_shown(site, monkeypatch):
    start(site, limits=replace(a_spec().limits, memory=2**30))
    usage = Usage(memory=512 * 2**20, cpu_seconds=1.0, processes=2, threads=5)
    sample = Sample(1, 0.0, usage, cpus=0.5, load=Load(kernels=2, connections=1))
    services = replace(site.running.services, usage=lambda _: sample)
    site.running.services = services
    site.__post_init__()
    text = site.browser().get(SERVERS).text
    assert ("512 MiB" in text, "of 1 GiB" in text, "50 %" in text) == (True, True, True)
    text = site.browser().get("/dashboard/servers/lab").text
    assert ("512 MiB of 1 GiB" in text, "2, 5 threads" in text) == (True, True)


def test_what_others_have_written_is_only_text(site):
    site.running.probe.kernels_there = [Kernel("k", HOSTILE, HOSTILE[:30])]
    start(site, "lab", description=HOSTILE, labels={"team": HOSTILE}, root_dir=f"/{HOSTILE}")
    site.running.world.logs["lab"] = [HOSTILE]
    browser = site.browser()
    for path in (SERVERS, "/dashboard/servers/lab", "/dashboard/servers/lab/delete"):
        page = browser.get(path)
        assert (page.status_code, "<script>alert" in page.text) == (200, False), path
        assert "alert(1)" in page.text
    refused = browser.get(f"{SERVERS}servers/{HOSTILE[:40]}")
    assert (refused.status_code, "<script>alert" in refused.text) == (404, False)


def test_a_command_that_ends_kernels_is_confirmed(site):
    start(site)
    site.running.probe.kernels_there = [Kernel("k", "python3", "busy")]
    browser = site.browser()
    for command in ("stop", "restart", "delete"):
        text = browser.get(f"/dashboard/servers/lab/{command}").text
        assert ("One kernel runs" in text, "python3, busy" in text) == (True, True)
        assert "what they hold in memory is lost" in text
    site.running.probe.error = BackendUnavailable("it does not answer")
    assert "Running kernels end" in browser.get("/dashboard/servers/lab/stop").text
    site.running.probe.error, site.running.probe.kernels_there = None, []
    assert "No kernel runs" in browser.get("/dashboard/servers/lab/stop").text
    assert site.running.keeper.get("lab").state is State.RUNNING


def test_commands_are_given(site):
    start(site)
    keeper, browser = site.running.keeper, site.browser()
    browser.get(SERVERS)
    assert browser.post("/dashboard/servers/lab/stop").headers["Location"] == SERVERS
    until(lambda: keeper.get("lab").state is State.STOPPED)
    assert "No kernel runs" in browser.get("/dashboard/servers/lab/delete").text
    started = browser.post("/dashboard/servers/lab/start", headers={"HX-Request": "true"})
    assert started.text.startswith('<hx-partial hx-target="#notices"')
    assert '<p class="notice">Server lab starts.</p>' in started.text
    until(lambda: keeper.get("lab").state is State.RUNNING)
    assert browser.post("/dashboard/servers/lab/restart").status_code == 303
    until(lambda: keeper.get("lab").generation == 3 and keeper.get("lab").endpoint)
    assert browser.post("/dashboard/servers/lab/delete").status_code == 303
    until(lambda: keeper.get("lab") is None)
    assert browser.post("/dashboard/servers/lab/delete").status_code == 404
    events = site.running.services.event_log.latest(limit=100)
    assert {entry.origin.actor for entry in events if entry.server} >= {"token:ada"}


def test_a_command_for_many_is_confirmed_and_says_what_went_wrong(site):
    for name in ("a", "b"):
        start(site, name)
    browser, keeper = site.browser(), site.running.keeper
    browser.get(SERVERS)
    assert browser.post("/dashboard/many/stop").status_code == 422
    question = browser.post("/dashboard/many/stop", name=["a", "b"])
    assert ("Stop 2 servers?" in question.text, 'name="confirmed"' in question.text) == (True, True)
    assert keeper.get("a").state is State.RUNNING
    browser.post("/dashboard/many/stop", name=["a", "b"], confirmed="yes")
    until(lambda: {keeper.get(name).state for name in "ab"} == {State.STOPPED})
    done = browser.post("/dashboard/many/start", name=["a", "b", "gone", "a"])
    assert "Start: 2 of 3 servers." in done.text
    assert "gone" in done.text
    until(lambda: {keeper.get(name).state for name in "ab"} == {State.RUNNING})
    many = [f"x-{at}" for at in range(201)]
    assert "at most 200" in browser.post("/dashboard/many/start", name=many).text


def test_a_server_has_a_page(site):
    start(site, gateway=None, env={"SECRET": "hidden-value"}, idle_timeout=3600.0)
    site.running.probe.kernels_there = [
        Kernel("k-1", "python3", "idle", "", 1, "exec", "another Python")
    ]
    text = site.browser().get("/dashboard/servers/lab").text
    for shown in ("is launched", "is ready", "python3", "another Python", "SECRET", "1 h"):
        assert shown in text, shown
    assert "hidden-value" not in text
    assert "token-of" not in text
    site.running.probe.error = BackendUnavailable("it does not answer")
    assert "Unknown: it does not answer" in site.browser().get("/dashboard/servers/lab").text


def test_a_failure_is_shown_with_its_log_and_the_next_step(site, monkeypatch):
    start(site)
    failure = Failure(
        FailureClass.IMPORT_ERROR, "it cannot import x", Exit(1), ("\x1b[31mTraceback",)
    )
    failed = replace(
        site.running.keeper.get("lab"), state=State.FAILED, failure=failure, endpoint=None
    )
    monkeypatch.setattr(site.running.keeper, "get", lambda _: failed)
    monkeypatch.setattr(site.running.keeper, "all", lambda: [failed])
    text = site.browser().get("/dashboard/servers/lab").text
    assert ("it cannot import x" in text, "<pre>Traceback</pre>" in text) == (True, True)
    assert "Troubleshooting, import-error" in text
    assert "it cannot import x" in site.browser().get(SERVERS).text


@pytest.mark.parametrize("command", ["interrupt", "restart", "end"])
def test_kernels_are_commanded(site, command):
    start(site)
    probe, browser = site.running.probe, site.browser()
    probe.kernels_there = [Kernel("k-1", "python3")]
    browser.get("/dashboard/servers/lab")
    done = browser.post(f"/dashboard/servers/lab/kernels/k-1/{command}")
    assert (done.status_code, done.headers["Location"]) == (303, "/dashboard/servers/lab")
    assert probe.given == [(command, "k-1")]
    assert browser.post(f"/dashboard/servers/lab/kernels/k-2/{command}").status_code == 409
    for method in (browser.get, browser.post):
        assert method("/dashboard/servers/lab/kernels/k-1/explode").status_code == 404
    question = browser.get(f"/dashboard/servers/lab/kernels/k-1/{command}")
    if command == "interrupt":
        assert question.status_code == 404
    else:
        assert "What it holds in memory is lost" in question.text
    piece = browser.post(
        f"/dashboard/servers/lab/kernels/k-1/{command}", headers={"HX-Request": "true"}
    )
    assert "The kernel was" in piece.text
    browser.post("/dashboard/servers/lab/stop")
    until(lambda: site.running.keeper.get("lab").state is State.STOPPED)
    assert browser.post(f"/dashboard/servers/lab/kernels/k-1/{command}").status_code == 409
    assert probe.given == [(command, "k-1")] * 2


def test_culling_is_postponed(site):
    start(site, idle_timeout=3600.0)
    browser = site.browser()
    browser.get("/dashboard/servers/lab")
    assert browser.post("/dashboard/servers/lab/snooze", **{"for": "4h"}).status_code == 303
    assert site.running.keeper.get("lab").snoozed_until is not None
    ended = browser.post(
        "/dashboard/servers/lab/snooze", headers={"HX-Request": "true"}, **{"for": "0"}
    )
    assert "can be idle" in ended.text
    assert site.running.keeper.get("lab").snoozed_until is None
    assert browser.post("/dashboard/servers/lab/snooze", **{"for": "long"}).status_code == 422


def test_a_link_for_someone_else_is_made(site):
    start(site)
    browser = site.browser()
    browser.get("/dashboard/servers/lab")
    page = browser.post("/dashboard/servers/lab/link")
    assert (page.status_code, "/open/" in page.text, "<html" in page.text) == (200, True, True)
    piece = browser.post("/dashboard/servers/lab/link", headers={"HX-Request": "true"})
    assert ("/open/" in piece.text, "<html" in piece.text) == (True, False)


def test_a_signed_in_browser_is_led_to_the_labs_address(site):
    start(site, default_url="/lab/tree/a b.ipynb")
    browser = site.browser()
    url = browser.get("/dashboard/servers/lab/open").headers["Location"]
    assert url == "http://127.0.0.1/servers/lab/lab/tree/a%20b.ipynb"
    ahead = browser.get("/dashboard/servers/lab/open", Sec_Purpose="prefetch")
    assert ahead.status_code == 403


def test_usage_over_time_is_that_of_the_api(site):
    start(site)
    browser = site.browser(Scope.READ)
    answer = browser.get("/dashboard/servers/lab/usage?since=1h")
    assert (answer.status_code, answer.json["memory"]) == (200, [])
    assert browser.get("/dashboard/servers/lab/usage?since=x").status_code == 422


FORM = {"name": "new", "description": "a line", "memory": "0.5", "cpus": "1.5", "processes": "100"}


def test_the_form_starts_a_server(site):
    browser = site.browser()
    assert "Start a server" in browser.get("/dashboard/start").text
    more = {
        "env": "A=1\n\n B = x=y ",
        "labels": "team=blue",
        "idle_timeout": "2h",
        "sleep_after": "",
    }
    answer = browser.post("/dashboard/start", **FORM, **more)
    assert (answer.status_code, answer.headers["Location"]) == (303, "/dashboard/servers/new")
    spec = site.running.keeper.get("new").spec
    assert (spec.env, spec.labels, spec.idle_timeout) == (
        {"A": "1", "B": "x=y"},
        {"team": "blue"},
        7200,
    )
    assert (spec.limits.memory, spec.limits.cpus, spec.limits.processes) == (2**29, 1.5, 100)
    assert (spec.description, spec.gateway) == ("a line", None)


@pytest.mark.parametrize(
    ("fields", "status", "shown"),
    [
        ({"name": "Not A Name"}, 422, "name"),
        ({"memory": "much"}, 422, "must be a number"),
        ({"memory": "0.001"}, 422, "limits.memory"),
        ({"env": "novalue"}, 422, "NAME=value"),
        ({"env": "A=1\nA=2"}, 422, "A"),
        ({"root_dir": "/nowhere"}, 422, "root_dir"),
        ({"gateway.url": "ftp://x"}, 422, "gateway.url"),
        ({"idle_timeout": "soon"}, 422, "idle_timeout"),
        ({"name": "lab", "description": "other"}, 409, "lab"),
    ],
)
def test_a_form_with_a_mistake_says_which_and_loses_nothing(site, fields, status, shown):
    start(site)
    browser = site.browser()
    browser.get("/dashboard/start")
    answer = browser.post("/dashboard/start", **{"description": "kept & <b>", **fields})
    assert (answer.status_code, 'role="alert"' in answer.text) == (status, True)
    assert shown in answer.text
    assert ("kept &amp; &lt;b&gt;" in answer.text) is ("description" not in fields)
    assert [s.name for s in site.running.keeper.all()] == ["lab"]


def test_a_gateway_is_checked(site):
    bad = GatewayHealth(0.0, Failure(FailureClass.GATEWAY_UNREACHABLE, "it does not answer"))
    asked = []

    def check(gateway):
        asked.append(gateway)
        return bad if "bad" in gateway.url else GatewayHealth(0.0, kernelspecs=3)

    site.running.services = replace(site.running.services, check_gateway=check)
    site.__post_init__()
    browser = site.browser()
    browser.get("/dashboard/start")
    path, token = "/dashboard/start/gateway", {"gateway.auth_token": "s3cret"}
    good = browser.post(path, **{"gateway.url": "http://good:8888"}, **token)
    assert ("3 kernelspecs" in good.text, "s3cret" in good.text) == (True, False)
    assert asked[0].auth_token == "s3cret"
    assert "It does not answer" in browser.post(path, **{"gateway.url": "http://bad:1"}).text
    assert "wrong" in browser.post(path, **{"gateway.url": "ftp://x"}).text
    assert browser.post(path).text.strip() == ""
    assert len(asked) == 2


def test_a_list_follows_its_servers(site):
    start(site)
    browser = site.browser()
    browser.get(SERVERS)
    with browser.follow("/dashboard/?q=lab&follow") as events:
        assert next(events) == ("version", site.running.services.version)
        _, whole = next(events)
        assert ('hx-target="#live"' in whole, 'id="server-lab"' in whole) == (True, True)
        browser.post("/dashboard/servers/lab/stop")
        changed = next(data for _, data in events if 'state stopped">stopped' in data)
        # Only the elements that have changed.
        assert ('"#server-lab"' in changed, '"#counts"' in changed) == (True, True)
        assert 'hx-target="#live"' not in changed
        start(site, "lab-2")
        assert 'hx-target="#live"' in next(data for _, data in events if "lab-2" in data)


def test_the_page_of_a_server_follows_its_log_until_it_is_deleted(site):
    start(site)
    site.running.world.logs["lab"] = ["\x1b[32mone\n", "<b>two\n"]
    browser = site.browser()
    browser.get(SERVERS)
    with browser.follow("/dashboard/servers/lab?follow") as events:
        logs = (json.loads(data) for name, data in events if name == "log")
        assert next(logs) == {"again": True, "lines": ["one", "<b>two"]}
        site.running.world.logs["lab"].append("three\n")
        assert next(logs) == {"again": False, "lines": ["three"]}
        browser.post("/dashboard/servers/lab/delete")
        assert "lab" in next(data for name, data in events if name == "ended")
        assert list(events) == []


def test_a_stream_outlives_a_full_disk(site):
    start(site)
    looks = itertools.count()

    def recent(_names, _points):
        if next(looks) == 1:
            raise StoreError("the disk is full")
        return {}

    site.running.services = replace(site.running.services, recent_usage=recent)
    site.__post_init__()
    browser = site.browser()
    browser.get(SERVERS)
    looks = itertools.count()
    with browser.follow("/dashboard/?follow") as events:
        next(events), next(events)
        browser.post("/dashboard/servers/lab/stop")
        assert any("state stopped" in data for _, data in events)
    assert next(looks) > 2


def test_a_stream_ends_with_its_session(site):
    start(site)
    browser = site.browser()
    with browser.follow("/dashboard/?follow") as events:
        next(events), next(events)
        site.running.services.sessions.revoke(browser.session.id)
        assert list(events) == []


def test_too_many_streams_are_refused(site):
    while site.running.services.concurrency.acquire():
        pass
    assert site.browser().get("/dashboard/?follow").status_code == 429


def test_amounts_have_three_digits():
    assert [amount(n) for n in (0, 1023, 1024, 1536, 2**30, 1000 * 2**20, 5 * 2**50)] == [
        "0 B", "1023 B", "1 KiB", "1.5 KiB", "1 GiB", "1000 MiB", "5120 TiB",
    ]  # fmt: skip


def test_small_charts_have_gaps():
    assert sparkline([], 1) == sparkline([None, 1.0], 1) == ""
    drawn = sparkline([0.0, 1.0, None, 0.5, 0.5], 1)
    assert re.findall("[ML]", drawn) == ["M", "L", "M", "L"]
    assert "M0,19.0L18,1.0M54,10.0" in drawn
    assert "M0,19.0L72,19.0" in sparkline([0.0, 0.0], 0)


def test_lines_of_a_log_are_plain():
    assert plain("\x1b[1;31mred\x1b[0m \x1b]0;title\x07\x00tab\there\n") == "red ]0;titletab\there"
    assert len(plain("x" * 10_000)) < 4100
