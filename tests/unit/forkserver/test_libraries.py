"""The kernel loader loads libraries, except those that kernels cannot share."""

from __future__ import annotations

import compileall
import contextlib
import importlib.util
import itertools
import os
import pwd
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from harness import PATIENCE, processes_where
from labkeeper.forkserver import wire
from labkeeper.forkserver.commands import loading
from launches import launch_in
from odd_libraries import FIT, UNFIT, write_odd_libraries

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forking needs Linux")


class Loader:
    """The kernel loader as a fork server starts it."""

    def __init__(self, directory, libraries, **env):
        """Load, with modules of a directory."""
        self.log = directory / "loader.log"
        place = directory / "modules"
        self._connection, its = socket.socketpair()
        with its, self.log.open("wb") as log:
            self._process = subprocess.Popen(
                loading(sys.executable, (), "kernels", its.fileno(), libraries),
                env={**os.environ, "PYTHONPATH": str(place), **env},
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[its.fileno()],
                start_new_session=True,
            )
        self._connection.settimeout(PATIENCE)
        self.told, _ = wire.receive(self._connection)

    @property
    def pid(self):
        return self._process.pid

    def close(self):
        self._connection.close()
        self._process.wait(PATIENCE)

    def zygote(self, directory):
        """Introduce a server, and return what its zygote tells of what it has loaded."""
        ours, its = socket.socketpair()
        launch = launch_in(directory)
        with ours, its:
            wire.send(self._connection, {}, [its.fileno()])
            with self.log.open("ab") as log:
                wire.send(ours, launch.message(), [log.fileno()])
            ours.settimeout(PATIENCE)
            return wire.receive(ours)[0]


@pytest.fixture
def load(tmp_path):
    """Return a function that starts a loader; modules that it loads are in the test's directory."""
    place = tmp_path / "modules"
    place.mkdir()
    write_odd_libraries(place)
    with contextlib.ExitStack() as loaders:

        def load(*libraries, **env):
            loader = Loader(tmp_path, libraries, **env)
            loaders.callback(loader.close)
            return loader

        yield load


def test_fit_libraries_are_loaded_and_each_other_one_is_left_out_for_its_reason(load):
    names = [name for pair in itertools.zip_longest(UNFIT, FIT) for name in pair if name]
    told = load(*names).told
    assert told["preloaded"] == list(FIT)
    assert told["left_out"].keys() == UNFIT.keys()
    for name, (_, pattern) in UNFIT.items():
        assert re.fullmatch(pattern, told["left_out"][name]), told["left_out"][name]


def test_program_that_a_library_starts_is_ended_and_its_temporary_files_are_removed(load, tmp_path):
    loader = load("odd_program", "odd_orphan", "odd_temporary")
    assert not loader.told["preloaded"]
    (only,) = processes_where(lambda process: process.cwd().startswith(str(tmp_path)))
    assert only.pid == loader.pid
    left = {path.name for path in tmp_path.iterdir()} - {"modules", "loader.log"}
    assert not left


def test_without_libraries_nothing_is_told_of_them(load):
    assert load().told == {"preloaded": [], "left_out": {}}


def test_library_that_imports_an_unfit_one_is_unfit_as_well(load, tmp_path):
    place = tmp_path / "modules"
    (place / "odd_importer.py").write_text("import odd_thread")
    assert compileall.compile_dir(place, quiet=1)
    told = load("odd_importer", "odd_plain").told
    assert told["preloaded"] == ["odd_plain"]
    assert told["left_out"].keys() == {"odd_importer"}
    assert told["left_out"]["odd_importer"].startswith("importing it starts a thread (")


# Files that others can write


def writable_by_everyone(file):
    file.chmod(0o666)


def in_a_directory_of_everyone(file):
    file.parent.chmod(0o777)


def of_another_user(file):
    os.chown(file, pwd.getpwnam("nobody").pw_uid, -1)


def of_a_group(file):
    os.chown(file, -1, pwd.getpwnam("nobody").pw_gid)
    file.chmod(0o660)


OPEN = [writable_by_everyone, in_a_directory_of_everyone]
OPEN_BY_ROOT = [of_another_user, of_a_group]


def write_packages(place, ways):
    """Write two packages for each way, whose source or compiled file others can write."""
    names = [(f"odd_{way.__name__}_{which}", way) for way in ways for which in ("source", "cache")]
    for name, _ in names:
        (place / name).mkdir()
        (place / name / "__init__.py").write_text("value = 42")
    assert compileall.compile_dir(place, quiet=1)
    for name, way in names:
        source = place / name / "__init__.py"
        way(source if name.endswith("source") else Path(importlib.util.cache_from_source(source)))
    return [name for name, _ in names]


@pytest.mark.parametrize("ways", [OPEN, pytest.param(OPEN_BY_ROOT, marks=pytest.mark.root)])
def test_library_whose_file_others_can_write_is_left_out(load, tmp_path, ways):
    """Their code would run as the user of the keeper, which may be root."""
    names = write_packages(tmp_path / "modules", ways)
    loader = load(*names, "odd_plain")
    assert loader.told == {
        "preloaded": ["odd_plain"],
        "left_out": dict.fromkeys(names, "others can write to its files"),
    }
    log = loader.log.read_text()
    assert all(re.search(f"{name}: .* can write {tmp_path}", log) for name in names), log


def test_library_that_imports_a_module_of_others_is_left_out_even_if_it_can_do_without(
    load, tmp_path
):
    place = tmp_path / "modules"
    (place / "odd_careful.py").write_text(
        "try:\n    import odd_plain\nexcept ImportError:\n    odd_plain = None"
    )
    assert compileall.compile_dir(place, quiet=1)
    writable_by_everyone(place / "odd_plain.py")
    assert load("odd_careful").told["left_out"] == {"odd_careful": "others can write to its files"}


# What servers are told


def test_zygote_tells_what_a_kernel_must_have_the_same_of(load, tmp_path):
    told = load("odd_reader", "odd_setter", ODD_READ="ours").zygote(tmp_path)
    assert {"ODD_READ", "TZ"} <= set(told["read"])
    assert not {"HOME", "PATH", "ODD_SET"} & set(told["read"])
    assert told["given"]["ODD_READ"] == "ours"
    assert "ODD_SET" not in told["given"]
    assert set(told["libraries"]["top"]) == {"odd_reader", "odd_setter"}
