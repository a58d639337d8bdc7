"""Thread groups: they end with their owner, cope with a lack of threads, and run watchers."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest
import structlog

from harness import until
from labkeeper.core.errors import BackendUnavailable
from labkeeper.threads import ThreadGroup


@pytest.fixture
def threads():
    with closing(ThreadGroup()) as threads:
        yield threads


def test_without_free_threads_the_error_says_what_to_do(threads, no_threads):
    with no_threads(), pytest.raises(BackendUnavailable, match="ulimit -u"):
        threads.start("one", print)
    with no_threads(), pytest.raises(BackendUnavailable), threads.standing_by("one"):
        pytest.fail("the block must not run")  # pragma: no cover


def test_other_errors_of_thread_start_are_not_translated(threads, monkeypatch):
    def broken(thread):
        raise RuntimeError("threads can only be started once")

    monkeypatch.setattr(threading.Thread, "start", broken)
    with pytest.raises(RuntimeError, match="only be started once"):
        threads.start("one", print)


def test_a_standby_thread_runs_the_function_it_is_given(threads):
    done = threading.Event()
    with threads.standing_by("one") as given:
        given(done.set)
    assert done.wait(10)
    until(lambda: not threads._threads, what="the thread to end")


def test_a_standby_thread_that_is_given_nothing_ends(threads):
    with pytest.raises(ValueError, match="no launch"), threads.standing_by("one"):
        raise ValueError("no launch")
    until(lambda: not threads._threads, what="the thread to end")


def test_a_watcher_survives_failed_rounds_which_are_reported_until_one_succeeds(threads):
    errors = [
        BackendUnavailable("no thread"),
        BackendUnavailable("no thread"),
        ZeroDivisionError("a bug"),
    ]
    seen, rounds = [], []

    def look():
        seen.append(threads.failing.get("culler"))
        rounds.append(1)
        if errors:
            raise errors.pop(0)

    with structlog.testing.capture_logs() as log:
        threads.watch("culler", look, every=lambda: 0.001)
        until(lambda: len(rounds) > 4, what="five rounds")
    assert seen[:5] == [None, "no thread", "no thread", "ZeroDivisionError('a bug')", None]
    assert not threads.failing
    assert [entry["watcher"] for entry in log] == ["culler"]
