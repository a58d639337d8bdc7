"""The threads that answer: as many as there is work for, and some more."""

from __future__ import annotations

import threading

import pytest
import structlog

from harness import until
from labkeeper.api.places import Places, reserve
from labkeeper.api.wsgi import _FIRST_THREADS, _Threads


class Task:
    """Work that lasts until it is told to end."""

    def __init__(self):
        self.begun, self.end = threading.Event(), threading.Event()

    def service(self):
        self.begun.set()
        self.end.wait()

    def cancel(self):
        pass


@pytest.fixture
def fits():
    return []


@pytest.fixture
def threads(fits):
    made = _Threads(20, fits.append)
    yield made
    made.shutdown()


@pytest.fixture
def work(threads):
    """Give a thread work that lasts to the end of the test."""
    given = []

    def give():
        task = Task()
        given.append(task)
        threads.add_task(task)
        return task

    yield give
    for task in given:
        task.end.set()


def test_threads_come_with_the_work_up_to_the_setting(threads, work):
    threads.begin()
    assert len(threads.threads) == _FIRST_THREADS
    tasks = []
    for count in range(1, 19):
        tasks.append(work())
        assert tasks[-1].begun.wait(60)
        assert count + reserve(len(threads.threads)) <= len(threads.threads) <= 20
    more = [work(), work(), work()]
    assert len(threads.threads) == 20
    assert not more[-1].begun.is_set()
    tasks[0].end.set()
    assert more[-1].begun.wait(60)


def test_a_setting_below_the_first_number_is_kept_to(fits):
    few = _Threads(2, fits.append)
    few.begin()
    assert len(few.threads) == 2
    assert few.shutdown()


def test_threads_that_have_no_work_are_used_again(threads):
    threads.begin()
    # One that was only just started counts as at work until it has looked for some.
    until(lambda: threads.active_count == 0, what="the first threads wait for work")
    for _ in range(50):
        task = Task()
        task.end.set()
        threads.add_task(task)
        assert task.begun.wait(60)
        until(lambda: threads.active_count == 0, what="the thread is back")
    assert len(threads.threads) == _FIRST_THREADS


def test_where_no_more_can_be_had_it_is_said_once_and_the_rest_goes_on(threads, work, fits, monkeypatch):
    threads.begin()
    with monkeypatch.context() as none_left, structlog.testing.capture_logs() as log:
        none_left.setattr(threading.Thread, "start", out_of_threads)
        tasks = [work() for _ in range(_FIRST_THREADS)]
        assert all(task.begun.wait(60) for task in tasks)
    (said,) = log
    assert (said["log_level"], said["threads"], said["wanted"]) == ("warning", _FIRST_THREADS, 20)
    assert set(fits) == {_FIRST_THREADS}
    assert len(threads.threads) == _FIRST_THREADS
    # They may be had again later.
    assert work().begun.wait(60)
    assert fits[-1] == 20


def test_no_thread_to_begin_with_is_an_error(threads, monkeypatch):
    monkeypatch.setattr(threading.Thread, "start", out_of_threads)
    with pytest.raises(RuntimeError):
        threads.begin()
    assert not threads.threads


def out_of_threads(_):
    raise RuntimeError("can't start new thread")


def test_no_thread_is_started_after_the_end(threads):
    threads.begin()
    assert threads.shutdown()
    threads.add_task(Task())
    assert not threads.threads


@pytest.mark.parametrize(("threads_", "count"), [(1, 0), (3, 1), (4, 2), (256, 224)])
def test_some_threads_are_kept_for_those_who_do_not_wait(threads_, count):
    places = Places(threads_)
    assert [places.take() for _ in range(count + 1)] == [True] * count + [False]


def test_whoever_has_a_place_keeps_it_when_there_are_fewer():
    places = Places(5)
    assert [places.take() for _ in range(3)] == [True] * 3
    places.fit(4)
    places.give_back()
    assert not places.take()
    places.give_back()
    assert places.take()
