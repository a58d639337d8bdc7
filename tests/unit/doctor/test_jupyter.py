"""What the doctor says of the interpreter, JupyterLab and the fork server."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from harness import plain_python, quiet_node, working_in
from labkeeper import unix_sockets
from labkeeper.backends.local.forkserver import PLACE
from labkeeper.doctor import jupyter
from labkeeper.doctor.case import Answers, Case
from labkeeper.settings.model import Settings


@pytest.fixture
def a_case(tmp_path, monkeypatch):
    """Make cases with an interpreter that does without coverage and Node."""
    node = quiet_node(tmp_path / "node")
    monkeypatch.setenv("PATH", str(node), prepend=":")
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config").mkdir()

    def make(*, keeper=None, **chosen):
        python = plain_python(tmp_path / "bin")
        state_dir = tmp_path / "state"
        settings = Settings(**{"state_dir": state_dir, "jupyter_python": python} | chosen)
        return Case(settings, "1", keeper=keeper)

    return make


def only(found):
    (one,) = found
    return one


def script(directory, text):
    """Write an executable that is no usable interpreter."""
    path = directory / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_the_interpreter_runs(a_case):
    found = only(jupyter.interpreter(a_case()))
    assert (found.status, sys.version.split()[0] in found.message) == ("ok", True)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "No such file or directory"),
        ("echo this is no Python >&2; exit 3", "this is no Python"),
        ("exit 3", "it ended with 3"),
        ("echo 3.8.19", "is Python 3.8.19, and servers need 3.9 or later"),
        ("exec sleep 1000", "it does not answer within 0.5 s"),
    ],
)
def test_an_interpreter_that_does_not_run_is_a_problem(a_case, tmp_path, monkeypatch, text, says):
    monkeypatch.setattr(jupyter, "_WITHIN", 0.5)
    path = tmp_path / "none" if text is None else script(tmp_path, text)
    found = only(jupyter.interpreter(a_case(jupyter_python=path)))
    assert (found.status, says in found.message) == ("problem", True)
    assert found.mend == f"export LABKEEPER_JUPYTER_PYTHON={sys.executable}"


def test_without_an_interpreter_the_rest_is_skipped(a_case, tmp_path):
    case = a_case(jupyter_python=tmp_path / "none")
    assert only(jupyter.jupyterlab(case)).status == "skipped"
    assert only(jupyter.forkserver(case)).status == "skipped"


def test_what_jupyter_needs_is_what_the_package_declares():
    assert {text.partition(">=")[0] for text in jupyter.needed()} == {"jupyterlab", "ipykernel"}


def test_jupyterlab_is_imported(a_case):
    found = only(jupyter.jupyterlab(a_case()))
    assert (found.status, "jupyterlab 4." in found.message) == ("ok", True)


def test_an_interpreter_without_jupyterlab_is_a_problem(a_case, tmp_path):
    bare = script(tmp_path, f'exec {shlex.quote(sys.executable)} -I -S "$@"')
    case = a_case(jupyter_python=bare)
    lab, fork = only(jupyter.jupyterlab(case)), only(jupyter.forkserver(case))
    assert "No module named 'jupyterlab'" in lab.message
    needed = "-m pip install 'ipykernel>=6.29' 'jupyterlab>=4.4'"
    assert lab.mend == fork.mend == f"{bare} {needed}"
    assert (lab.status, fork.status) == ("problem", "problem")


@pytest.mark.parametrize(
    ("versions", "status", "says"),
    [
        ('{"jupyterlab": "3.6.8", "ipykernel": "7.1"}', "problem", "jupyterlab 3.6.8 of "),
        ('{"jupyterlab": "4.10.0"}', "warning", "ipykernel is not installed"),
    ],
)
def test_versions_of_jupyter_are_compared(a_case, tmp_path, versions, status, says):
    old = script(tmp_path, f"case $2 in *jupyterlab*) echo '{versions}';; *) echo 3.11.1;; esac")
    found, _ = jupyter.jupyterlab(a_case(jupyter_python=old))
    assert (found.status, says in found.message) == (status, True)
    assert "-m pip install " in found.mend


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="forking needs Linux")


@needs_linux
def test_a_fork_server_is_loaded_on_trial_and_leaves_nothing(a_case, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = only(jupyter.forkserver(a_case()))
    assert (found.status, "can fork servers" in found.message) == ("ok", True)
    assert not list(tmp_path.glob("labkeeper-doctor-*"))
    assert not working_in(tmp_path)


@needs_linux
def test_libraries_are_preloaded_on_trial(a_case):
    case = a_case(preload=("decimal", "no_such_library"))
    _, left_out, loaded = jupyter.forkserver(case)
    assert (left_out.status, left_out.mend) == ("warning", "export LABKEEPER_PRELOAD=decimal")
    assert "no_such_library is not preloaded" in left_out.message
    assert "kernels can share decimal" in loaded.message


@needs_linux
def test_a_configuration_that_keeps_servers_from_starting_is_shown(a_case, tmp_path):
    config = tmp_path / "config" / "jupyter_server_config.py"
    config.write_text("raise RuntimeError('a broken configuration')")
    found = only(jupyter.forkserver(a_case()))
    assert (found.status, found.mend.startswith("correct the Jupyter")) == ("problem", True)
    assert any("a broken configuration" in line for line in found.details), found.details


@needs_linux
def test_a_fork_server_that_falls_silent_is_a_problem(a_case, monkeypatch):
    monkeypatch.setattr(jupyter, "_LIBRARIES_WITHIN", 0.0)
    _, found = jupyter.forkserver(a_case(preload=("decimal",)))
    assert (found.status, "takes too long" in found.message) == ("problem", True)


@needs_linux
def test_a_fork_server_that_cannot_be_started_at_all_can_be_done_without(a_case, monkeypatch):
    monkeypatch.setattr("labkeeper.backends.local.forkserver.PROGRAM", Path("/no/such/program"))
    monkeypatch.setattr(jupyter, "_log_tail", lambda _: [])
    found = only(jupyter.forkserver(a_case()))
    assert (found.status, found.mend) == ("problem", "export LABKEEPER_LAUNCH_BY=exec")


def test_forking_that_is_turned_off_is_fine(a_case):
    found = only(jupyter.forkserver(a_case(launch_by="exec")))
    assert (found.status, "LABKEEPER_LAUNCH_BY=exec" in found.message) == ("ok", True)


@needs_linux
def test_the_fork_server_of_a_running_keeper_is_found(a_case, tmp_path):
    case = a_case(keeper=Answers("http://127.0.0.1:1", "1", (), (), (), ""))
    dead, there = (case.settings.server_dirs / PLACE / name for name in ("a", "b"))
    dead.mkdir(parents=True)
    there.mkdir()
    with unix_sockets.listen(there, "socket"):
        skipped, found = jupyter.forkserver(case)
    assert (skipped.status, found.status) == ("skipped", "ok")
    assert found.message.startswith("one runs as process ")
