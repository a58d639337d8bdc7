"""What a keeper does not need until its API answers, it has not loaded by then: that is most of the time that a boot takes."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from harness import free_port

LATE = {
    "anyio",
    "flask_openapi3_swagger",  # the API's page
    "httpcore",
    "httpx",
    "jupyter_server",
    "labkeeper.api.openapi",
    "labkeeper.client",  # for --start
    "labkeeper.testing",
    "rich.progress",
}

BOOT = """
    import os, signal, sys
    from labkeeper.cli import keeper
    from labkeeper.settings import load

    def ready(said):
        if " answers on " in said:
            print(*sorted(set({late!r}) & set(sys.modules)), "|", len(__import__("threading").enumerate()))
            os.kill(os.getpid(), signal.SIGTERM)

    keeper._settings_flags()
    from labkeeper import serve
    sys.exit(serve.run(load(port={port}, state_dir={state_dir!r}, launch_by="exec"), announce=ready))
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    code = textwrap.dedent(BOOT).format(
        late=sorted(LATE), port=free_port(), state_dir=str(tmp_path_factory.mktemp("state"))
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
    names, threads = ended.stdout.split("|")
    return names.split(), int(threads)


def test_what_is_needed_later_is_loaded_later(loaded):
    assert loaded[0] == []


def test_threads_for_callers_are_started_when_there_are_callers(loaded):
    assert loaded[1] < 20


@pytest.mark.parametrize("name", sorted(LATE - {"labkeeper.testing"}))
def test_what_is_late_is_there(name):
    """A module that was renamed would make the test above pass for nothing."""
    __import__(name)
