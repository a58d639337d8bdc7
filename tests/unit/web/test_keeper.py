"""The page of the keeper: its health, room and setup, and who sees them."""

from __future__ import annotations

import platform
import re
from dataclasses import replace

import pytest

from harness import until
from labkeeper.api.services import SettingInForce
from labkeeper.core.access import Scope, TokenLimits
from labkeeper.core.lifecycle import State
from labkeeper.core.messages import Create, EdgeUse, GatewaySeen, Report, WebhookStatus
from labkeeper.core.policy import Policy
from labkeeper.core.ports import Capacity, Library, Reserve
from labkeeper.core.server import Failure, FailureClass, GatewayHealth, Instance, OrphanedKernel
from labkeeper.core.spec import Gateway
from labkeeper.serve.policies import settings_in_force
from labkeeper.settings.model import Settings
from labkeeper.testing.fakes import a_spec
from labkeeper.web import keeper as page_of_keeper
from web_pages import a_dashboard

PATH = "/dashboard/keeper"
EVIL = "<script>alert(1)</script>"


@pytest.fixture
def site(tmp_path):
    with a_dashboard(tmp_path) as made:
        yield made


def start(site, name, **spec):
    site.running.keeper.ask(Create(replace(a_spec(name), **spec)))


def a_running_server(site, name, **spec):
    start(site, name, **spec)
    until(lambda: site.running.keeper.get(name).state is State.RUNNING)
    return site.running.keeper.get(name)


def shown(page, part):
    """Return the text of one part of the page, without tags."""
    section = page.text.partition(f'<section id="keeper-{part}"')[2].partition("</section>")[0]
    return " ".join(re.sub(r"<[^>]*>", " ", section.partition(">")[2]).split())


def test_a_new_keeper_explains_each_part(site):
    page = site.browser(Scope.READ).get(PATH)
    assert page.status_code == 200
    for part, text in {
        "health": "Ready: it takes commands",
        "capacity": "Memory unknown",
        "queue": "No server waits. Starts at once are limited to 200",
        "gateways": "No active server uses one",
        "launches": "0 forked, 0 executed",
        "edge": "off the keeper listens itself",
        "orphans": "None: every kernel",
        "webhooks": "None. LABKEEPER_WEBHOOK_URL",
        "versions": f"labkeeper 1.2.3 Python {platform.python_version()}",
    }.items():
        assert text in shown(page, part)
    assert "known once a server runs" in shown(page, "versions")


def test_failing_watchers_are_named(tmp_path):
    failing = {"usage": "no room", "culler": EVIL}
    with a_dashboard(tmp_path, failing=lambda: failing) as site:
        page = site.browser().get(PATH)
    assert "not everything is watched: culler :" in shown(page, "health")
    assert "usage : no room" in shown(page, "health")
    assert EVIL not in page.text


def test_a_keeper_without_its_fleet_says_what_to_do(site):
    browser = site.browser()
    site.running.keeper.close()
    assert "takes no commands" in shown(browser.get(PATH), "health")


def test_capacity_is_told_with_what_stays_free(tmp_path):
    policy = Policy(max_servers=7, max_starts=3, min_free=Reserve(share=0.25))
    with a_dashboard(tmp_path, policy=policy) as site:
        a_running_server(site, "lab")
        browser = site.browser()
        site.running.world.capacity = Capacity(2**33, 2**32)
        page = browser.get(PATH)
        assert 'value="50"' in page.text
        capacity = shown(page, "capacity")
        assert "4 GiB of 8 GiB available No server is started below 2 GiB." in capacity
        assert "1 active, of at most 7; 1 known 1 running" in capacity
        assert "0 in progress, of at most 3" in capacity
        site.running.world.capacity = Capacity(2**33, 2**30)
        assert "Memory is low" in shown(browser.get(PATH), "capacity")


def test_the_queue_is_in_order_and_names_no_server_of_another_owner(tmp_path):
    policy = Policy(max_starts=1)
    with a_dashboard(tmp_path, policy=policy) as site:
        site.running.world.temper("first").boots = False
        for name, owner in (("first", "local"), ("b", "local"), ("a", "eve"), ("c", "local")):
            start(site, name, owner=owner)
        page = site.browser().get(PATH)
    queue = shown(page, "queue")
    assert re.findall(r"(\d) (b|c|of another owner)", queue) == [
        ("1", "b"),
        ("2", "of another owner"),
        ("3", "c"),
    ]
    assert '<a href="/dashboard/servers/b">' in page.text
    assert "/dashboard/servers/a" not in page.text
    assert "first" not in queue


def test_gateways_in_use_are_told_with_the_servers_that_find_them_so(site):
    keeper = site.running.keeper
    for name, url in (("a", "http://one"), ("b", "http://one"), ("c", "http://two")):
        a_running_server(site, name, gateway=Gateway(url, "ws://gw"))
    failure = Failure(FailureClass.GATEWAY_UNREACHABLE, f"cannot be reached {EVIL}")
    for name, health in (("a", GatewayHealth(1.0, None, 3)), ("c", GatewayHealth(2.0, failure))):
        keeper._mailbox.post(Report(name, keeper.get(name).generation, GatewaySeen(health)))
        until(lambda name=name, health=health: keeper.get(name).gateway == health)
    page = site.browser().get(PATH)
    gateways = shown(page, "gateways")
    assert re.search(
        r"http://two cannot be reached .* unusable 1970-01-01 00:00:02 UTC c", gateways
    )
    assert "http://one reachable 3 kernelspecs 1970-01-01 00:00:01 UTC a" in gateways
    assert "http://one not known yet b" in gateways
    assert gateways.index("http://two") < gateways.index("http://one")
    assert EVIL not in page.text


def test_launches_are_counted_with_what_is_preloaded(site):
    site.running.world.libraries = (
        Library("numpy", loaded=True),
        Library("pandas", loaded=None),
        Library("torch", loaded=False, reason="it starts threads"),
    )
    launches = shown(site.browser().get(PATH), "launches")
    assert "numpy loaded pandas not known yet torch not loaded it starts threads" in launches


def test_launches_are_counted_with_the_reasons_why_servers_were_executed(site, monkeypatch):
    snapshots = [
        replace(a_running_server(site, name), instance=Instance(name, 1, by, reason))
        for name, by, reason in (
            ("a", "fork", None),
            ("b", "exec", "it has an environment of its own"),
            ("c", "exec", EVIL),
            ("d", "exec", EVIL),
        )
    ]
    monkeypatch.setattr(site.running.keeper, "all", lambda: snapshots)
    page = site.browser().get(PATH)
    launches = shown(page, "launches")
    assert "1 forked, 3 executed 2 executed: &lt;script&gt;" in launches
    assert "1 executed: it has an environment of its own" in launches
    assert EVIL not in page.text


def test_the_edge_webhooks_and_orphans_are_told(tmp_path):
    use = EdgeUse(4, 3, 0, 0, 2, 1, {})
    orphans = [
        OrphanedKernel(f"k{n}", Gateway("http://gw", "ws://gw"), "lab", 1.0) for n in range(101)
    ]
    hook = WebhookStatus("https://hook", 5, 1, 2, f"refused {EVIL}")
    with a_dashboard(
        tmp_path,
        edge_use=lambda: use,
        orphans=lambda: orphans,
        webhooks=lambda: [hook],
        url="https://labs.example.org",
    ) as site:
        page = site.browser(Scope.READ).get(PATH)
    edge = shown(page, "edge")
    for text in ("https://labs.example.org TLS", "4 and 3 websockets", "Refused 2", "Restarts 1"):
        assert text in edge
    assert "below /servers/NAME/" in edge
    orphans = shown(page, "orphans")
    assert "k99 http://gw lab 1970-01-01 00:00:01 UTC and 1 more" in orphans
    assert "k100" not in orphans
    assert "5 delivered, 2 to be posted, 1 given up" in shown(page, "webhooks")
    assert EVIL not in page.text


def test_settings_are_shown_to_administrators_without_secrets(tmp_path):
    chosen = Settings.model_validate(
        {
            "token": "a-token-that-is-secret",
            "notebook_dir": f"/{EVIL}",
            "webhook_url": "http://s/x",
        },
        context={"token": "flag", "notebook_dir": "flag", "webhook_url": "settings file"},
    )
    with a_dashboard(tmp_path, settings=settings_in_force(chosen)) as site:
        page = site.browser().get(PATH)
        others = [site.browser(scope).get(PATH) for scope in (Scope.READ, Scope.MANAGE)]
    settings = shown(page, "settings")
    assert "LABKEEPER_TOKEN set flag" in settings
    assert "LABKEEPER_WEBHOOK_URL set settings file" in settings
    assert "LABKEEPER_PORT 8000 default" in settings
    assert settings.index("LABKEEPER_WEBHOOK_URL") < settings.index("LABKEEPER_PORT")
    assert "All others have their defaults" in settings
    for secret in ("a-token-that-is-secret", "http://s/x", EVIL):
        assert secret not in page.text
    for other in others:
        assert other.status_code == 200
        assert 'id="keeper-settings"' not in other.text
        assert "LABKEEPER_TOKEN" not in other.text


def test_without_chosen_settings_all_have_their_defaults(tmp_path):
    settings = [SettingInForce("LABKEEPER_PORT", "8000", "default", is_default=True)]
    with a_dashboard(tmp_path, settings=settings) as site:
        page = site.browser().get(PATH)
    assert "All settings have their defaults" in shown(page, "settings")


def test_a_limited_caller_has_no_page_of_the_keeper(site):
    browser = site.browser(Scope.MANAGE, limits=TokenLimits(("ci-*",)))
    assert f'href="{PATH}"' not in browser.get("/dashboard/").text
    assert browser.get(PATH).status_code == 403


def test_the_stream_sends_a_part_that_has_changed(site, monkeypatch):
    monkeypatch.setattr(page_of_keeper.platform, "release", lambda: "an older one")
    with site.browser().follow(f"{PATH}?follow") as events:
        assert next(data for _, data in events if "an older one" in data)
        a_running_server(site, "lab")
        changes = next(data for _, data in events if "keeper-capacity" in data)
    assert "keeper-webhooks" not in changes


def test_running_servers_tell_the_versions_of_jupyter(site, monkeypatch):
    snapshot = a_running_server(site, "lab")
    endpoint = replace(snapshot.endpoint, version="2.17.0")
    monkeypatch.setattr(
        site.running.keeper, "all", lambda: [replace(snapshot, endpoint=endpoint)] * 2
    )
    assert "2.17.0 in 2 servers" in shown(site.browser().get(PATH), "versions")
