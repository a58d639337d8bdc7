"""The page of the activity: what it shows to whom, filters, and older events."""

from __future__ import annotations

import re

import pytest

from harness import until
from labkeeper.core.access import Scope, TokenLimits
from labkeeper.core.lifecycle import Event, State
from labkeeper.core.messages import CULLER, Create, HistoryKind, Order, Origin
from labkeeper.testing.fakes import a_spec
from labkeeper.web.activity import KINDS, PAGE
from web_pages import a_dashboard

PATH = "/dashboard/activity"
EVIL = "<script>alert(1)</script>"


@pytest.fixture
def site(tmp_path):
    with a_dashboard(tmp_path) as made:
        yield made


@pytest.fixture
def event_log(site):
    return site.running.services.event_log


def start(site, name, **spec):
    site.running.keeper.ask(Create(a_spec(name, **spec), Origin("token:bob")))
    until(lambda: site.running.keeper.get(name).state is State.RUNNING)


def stop(site, name, origin, event=Event.STOP):
    site.running.keeper.ask(Order(name, event, origin=origin))
    until(lambda: getattr(site.running.keeper.get(name), "state", State.STOPPED) is State.STOPPED)


def shown(page):
    """Return the ids of the events on a page, in its order."""
    return [int(found) for found in re.findall(r'<tr id="event-(\d+)"', page.text)]


def record(event_log, message, server=None, kind=HistoryKind.TOKEN, actor="keeper"):
    event_log.record(kind, server, message, origin=Origin(actor))
    return event_log.last_id


def test_events_are_shown_newest_first_with_who_and_why(site):
    start(site, "lab")
    stop(site, "lab", Origin(CULLER, reason="idle: not used for 2 h"))
    page = site.browser(Scope.READ).get(PATH)
    ids = shown(page)
    assert ids == sorted(ids, reverse=True)
    assert len(ids) == site.running.services.event_log.last_id
    assert '<a href="/dashboard/servers/lab">lab</a>' in page.text
    assert '<span class="state stopped">stopped</span>' in page.text
    for text in ("culler", "token:bob", "idle: not used for 2 h", "is ready after", "signed in"):
        assert text in page.text


def test_a_server_that_is_gone_is_named_without_a_link(site):
    start(site, "lab")
    stop(site, "lab", Origin("token:bob"), Event.DELETE)
    page = site.browser().get(PATH)
    assert ">lab</th>" in page.text
    assert "/dashboard/servers/lab" not in page.text


def test_without_events_the_page_says_what_will_be_there(site):
    browser = site.browser(limits=TokenLimits(("ci-*",)), scope=Scope.READ)
    page = browser.get(PATH)
    assert "Nothing has happened yet" in page.text
    assert "/dashboard/start" not in page.text
    assert (
        "/dashboard/start"
        in site.browser(Scope.MANAGE, limits=TokenLimits(("ci-*",))).get(PATH).text
    )


def test_a_limited_caller_sees_the_events_of_their_servers_only(site):
    for name in ("lab", "ci-1"):
        start(site, name)
    page = site.browser(Scope.READ, limits=TokenLimits(("ci-*",))).get(PATH)
    assert ">ci-1<" in page.text
    assert ">lab<" not in page.text
    assert "signed in" not in page.text
    page = site.browser(Scope.READ, limits=TokenLimits(("ci-*",))).get(f"{PATH}?server=lab")
    assert shown(page) == []


def test_filters_combine_and_are_kept_in_the_form(site, event_log):
    browser = site.browser()
    first = record(event_log, "one", "lab", HistoryKind.SNOOZED, "token:ada")
    record(event_log, "two", "lab", HistoryKind.SNOOZED, "token:bob")
    record(event_log, "three", "lab", HistoryKind.GATEWAY, "token:ada")
    record(event_log, "four", "other", HistoryKind.SNOOZED, "token:ada")
    page = browser.get(f"{PATH}?server=lab&kind=snoozed&actor=n:ad")
    assert shown(page) == [first]
    for text in ('value="lab"', 'value="n:ad"', '<option value="snoozed" selected>'):
        assert text in page.text
    assert "No event matches" in browser.get(f"{PATH}?actor=nobody").text
    # Wrong values count as missing.
    assert len(shown(browser.get(f"{PATH}?kind=none&before=x"))) == event_log.last_id


def test_older_events_are_paged_by_id_and_do_not_follow(site, event_log):
    browser = site.browser()
    for number in range(2 * PAGE):
        record(event_log, f"number {number}", actor="token:many")
    page = browser.get(f"{PATH}?actor=many")
    ids = shown(page)
    assert len(ids) == PAGE
    assert "hx-sse:connect" in page.text
    (older,) = re.findall(r'rel="next" href="([^"]+)"', page.text)
    assert older == f"?actor=many&amp;before={ids[-1]}"
    record(event_log, "meanwhile", actor="token:many")
    page = browser.get(f"{PATH}{older.replace('&amp;', '&')}")
    assert shown(page) == list(range(ids[-1] - 1, ids[-1] - PAGE - 1, -1))
    assert "hx-sse:connect" not in page.text
    assert 'href="?actor=many">To the newest' in page.text
    assert 'rel="next"' not in page.text


def test_the_stream_sends_events_as_they_happen(site, event_log):
    browser = site.browser()
    with browser.follow(f"{PATH}?actor=token:new&follow") as events:
        assert next(data for _, data in events if "No event matches" in data)
        record(event_log, "at last", actor="token:new")
        shown = next(data for _, data in events if "at last" in data)
        assert f'<tr id="event-{event_log.last_id}">' in shown


def test_texts_of_others_are_escaped(site, event_log):
    browser = site.browser()
    event_log.record(HistoryKind.TOKEN, None, EVIL, origin=Origin(EVIL, reason=EVIL))
    page = browser.get(f"{PATH}?actor=%3Cscript&server=")
    assert EVIL not in page.text
    assert page.text.count("&lt;script&gt;alert(1)") == 3
    page = browser.get(f'{PATH}?server="><script>')
    assert "><script>" not in page.text.partition("<body")[2]


def test_an_unreadable_store_is_reported_as_such(site):
    browser = site.browser()
    site.running.store.failing = True
    page = browser.get(PATH)
    assert page.status_code == 503


def test_without_a_session_there_is_no_activity(site):
    browser = site.stranger()
    assert browser.get(PATH).status_code == 401


def test_all_kinds_of_events_have_words():
    assert KINDS.keys() == set(HistoryKind)
