"""Threads that end with their owner; one that cannot be started has begun nothing, and no watcher stops watching for it."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest
import structlog

from harness import until
from labkeeper.core.errors import BackendUnavailable
from labkeeper.threads import Crew


@pytest.fixture
def crew():
    with closing(Crew()) as crew:
        yield crew


def test_where_no_thread_can_be_started_the_error_says_what_to_do(crew, no_threads):
    with no_threads(), pytest.raises(BackendUnavailable, match="ulimit -u"):
        crew.start("one", print)
    with no_threads(), pytest.raises(BackendUnavailable), crew.standing_by("one"):
        pytest.fail("nothing may be begun")  # pragma: no cover


def test_another_error_of_a_thread_is_none_of_this(crew, monkeypatch):
    def broken(thread):
        raise RuntimeError("threads can only be started once")

    monkeypatch.setattr(threading.Thread, "start", broken)
    with pytest.raises(RuntimeError, match="only be started once"):
        crew.start("one", print)


def test_a_thread_that_stands_by_does_what_it_is_given(crew):
    done = threading.Event()
    with crew.standing_by("one") as given:
        given(done.set)
    assert done.wait(10)
    until(lambda: not crew._threads, what="its end")


def test_one_that_is_given_nothing_ends(crew):
    with pytest.raises(ValueError, match="no launch"), crew.standing_by("one"):
        raise ValueError("no launch")
    until(lambda: not crew._threads, what="its end")


def test_a_watcher_goes_on_after_a_round_that_failed_which_is_told_until_one_succeeds(crew):
    errors = [BackendUnavailable("no thread"), BackendUnavailable("no thread"), ZeroDivisionError("a bug")]
    seen, rounds = [], []

    def look():
        seen.append(crew.failing.get("culler"))
        rounds.append(1)
        if errors:
            raise errors.pop(0)

    with structlog.testing.capture_logs() as log:
        crew.watch("culler", look, every=lambda: 0.001)
        until(lambda: len(rounds) > 4, what="rounds")
    assert seen[:5] == [None, "no thread", "no thread", "ZeroDivisionError('a bug')", None]
    assert not crew.failing
    assert [entry["watcher"] for entry in log] == ["culler"]
