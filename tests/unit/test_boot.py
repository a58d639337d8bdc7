"""A keeper is ready before it has loaded modules it does not need yet, which speeds up booting."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from harness import free_port

LATE = {
    "anyio",
    "flask_openapi3_swagger",  # the page of the API
    "httpcore",
    "httpx",
    "jupyter_server",
    "labkeeper.api.openapi",
    "labkeeper.client",  # for --start
    "labkeeper.testing",
    "prometheus_client",  # for the first scrape
    "rich",
}

BOOT = """
    import os, signal, sys
    from labkeeper import cli
    from labkeeper.cli import keeper

    def ready(said):
        if " answers on " in said:
            print(*sorted(set({late!r}) & set(sys.modules)))
            os.kill(os.getpid(), signal.SIGTERM)

    keeper.put = ready
    sys.argv[1:] = "serve --launch-by=exec --port={port} --state-dir={state_dir}".split()
    cli.main()
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    code = textwrap.dedent(BOOT).format(
        late=sorted(LATE), port=free_port(), state_dir=tmp_path_factory.mktemp("state")
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.split()


def test_modules_that_booting_does_not_need_are_not_loaded(loaded):
    assert loaded == []


@pytest.mark.parametrize("name", sorted(LATE - {"labkeeper.testing"}))
def test_what_is_late_is_there(name):
    """A renamed module would make the first test pass for the wrong reason."""
    __import__(name)


COMMAND = """
    import atexit, sys
    from labkeeper import cli

    loaded = lambda: print(*sorted({{"httpx", "pygments", "rich"}} & set(sys.modules)))
    atexit.register(loaded)
    sys.argv[1:] = "ls --state-dir={state_dir}".split()
    cli.main()
"""


def test_a_command_in_a_pipe_does_not_load_what_draws_on_terminals(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMMAND).format(state_dir=tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    # It has loaded everything, to find out that no keeper runs.
    assert (ended.returncode, ended.stdout.split()) == (3, ["httpx"]), ended.stderr
