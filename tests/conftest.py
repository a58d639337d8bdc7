"""No test leaves anything behind: every one is checked for threads and child processes."""

from __future__ import annotations

import gc
import threading
import time

import psutil
import pytest


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    threads_before = set(threading.enumerate())
    children_before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    gc.collect()
    end = time.monotonic() + 5
    while True:
        threads = [thread for thread in threading.enumerate() if thread not in threads_before]
        children = [child for child in psutil.Process().children(recursive=True) if child.pid not in children_before]
        if not threads and not children:
            return
        if time.monotonic() > end:
            pytest.fail(f"left behind: threads {threads}, processes {children}")
        time.sleep(0.02)
