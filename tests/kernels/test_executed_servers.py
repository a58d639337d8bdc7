"""Servers that were executed load libraries themselves, and again when these change on disk."""

from __future__ import annotations

import compileall
import contextlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from harness import KeeperProcess
from kernel import call_server, start_kernel_by

CODE = "import sys\nfound = 'odd_version' in sys.modules\nimport odd_version\n"
FOUND = f"{CODE}found, odd_version.value"


def write_version(place, value):
    """Write the library as an upgrade does, which leaves the directory around it as it was."""
    package = place / "odd_version"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text(f"value = {value!r}")
    assert compileall.compile_dir(place, quiet=1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory of modules that a server finds."""
    place = tmp_path_factory.mktemp("modules")
    write_version(place, "old")
    return place


@pytest.fixture(scope="module")
def keeper(tmp_path_factory, place):
    runtime_dir = Path(tempfile.mkdtemp(prefix="kernels-"))
    keeper = KeeperProcess(
        tmp_path_factory.mktemp("executing") / "keeper",
        launch_by="exec",
        runtime_dir=runtime_dir,
        preload="odd_version",
    )
    path = [str(place), *filter(None, [os.environ.get("PYTHONPATH")])]
    keeper.variables["JUPYTER_DATA_DIR"] = keeper.base / "data"
    keeper.variables["PYTHONPATH"] = os.pathsep.join(path)
    yield keeper.start()
    keeper.close()
    shutil.rmtree(runtime_dir)


@pytest.fixture
def server(keeper):
    answer = keeper.post(name="default")
    assert answer.status_code == 201, answer.text
    yield answer.json()
    assert keeper.delete(force="true").status_code == 200


@contextlib.contextmanager
def kernel_of(server, launched_by, reason=None, **options):
    """Start a kernel for the block."""
    kernel = start_kernel_by(server, launched_by, reason, **options)
    try:
        yield kernel
    finally:
        kernel.close()
        call_server(server, "DELETE", f"kernels/{kernel.id}")


def install_kernelspec(keeper, *options):
    """Install a kernelspec of an interpreter with options; return its name."""
    directory = keeper.base / "data" / "kernels" / "own"
    directory.mkdir(parents=True)
    argv = [sys.executable, *options, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "own", "language": "python"}
    (directory / "kernel.json").write_text(json.dumps(spec))
    return directory.name


def test_kernels_after_the_first_are_forked_with_libraries_and_never_with_old_ones(
    keeper, server, place
):
    with kernel_of(server, "exec", "the server itself was executed") as kernel:
        assert kernel.value(FOUND) == (False, "old")
    with kernel_of(server, "fork") as kernel:
        assert kernel.value(FOUND) == (True, "old")
    for value in ("new", "newest"):
        write_version(place, value)
        with kernel_of(server, "exec", "has changed on disk since") as kernel:
            assert kernel.value(FOUND) == (False, value)
        with kernel_of(server, "fork") as kernel:
            assert kernel.value(FOUND) == (True, value)


def test_keeper_tells_that_each_server_loads_libraries_itself(keeper):
    (told,) = keeper.http.get("/readyz").json()["preload"]
    assert (told["name"], told["loaded"]) == ("odd_version", False)
    assert "each loads it for itself after its first kernel" in told["reason"]


def test_forked_kernels_of_another_interpreter_have_the_libraries(keeper, server):
    name = install_kernelspec(keeper, "-Xdev")
    with kernel_of(server, "exec", "is not loaded yet", name=name) as kernel:
        assert kernel.value(CODE + "found, sys.flags.dev_mode") == (False, True)
    with kernel_of(server, "fork", name=name) as kernel:
        assert kernel.value(CODE + "found, sys.flags.dev_mode") == (True, True)
