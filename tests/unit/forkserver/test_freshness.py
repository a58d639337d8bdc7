"""A fork server detects that the files it has loaded have changed."""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path

import pytest

from labkeeper.forkserver.freshness import Freshness

LONG_AGO = 1_000_000_000
PACKAGE = "labkeeper_test_package"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A directory on the path with an old, loaded package, beside a configuration directory."""
    directory = tmp_path / "site"
    (directory / PACKAGE).mkdir(parents=True)
    (directory / PACKAGE / "__init__.py").write_text("from . import inner")
    (directory / PACKAGE / "inner.py").write_text("version = 1")
    (directory / "old.pth").write_text("# nothing\n")
    (tmp_path / "config" / "jupyter_server_config.d").mkdir(parents=True)
    (tmp_path / "config" / "jupyter_server_config.d" / "a.json").write_text("{}")
    (tmp_path / "config" / "jupyter_server_config.py").write_text("")
    for path in sorted(tmp_path.rglob("*"), reverse=True):
        os.utime(path, (LONG_AGO, LONG_AGO))
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    # The working directory is on the path, and processes of other tests write there.
    monkeypatch.setattr(
        sys,
        "path",
        [str(directory), *(place for place in sys.path if place not in {"", str(Path.cwd())})],
    )
    importlib.invalidate_caches()
    yield directory
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]


@pytest.fixture
def fresh(site):
    freshness = Freshness()
    importlib.import_module(PACKAGE)
    assert freshness.settle() is None
    assert freshness.changed() is None
    return freshness


def edited(path):
    path.write_text(path.read_text() + "\n")
    return path


CHANGES = {
    "a module edited": lambda site: edited(site / PACKAGE / "inner.py"),
    "a module removed": lambda site: (
        (site / PACKAGE / "inner.py").unlink() or site / PACKAGE / "inner.py"
    ),
    "a package installed": lambda site: (site / "other").mkdir() or site,
    "a list of paths added": lambda site: (site / "new.pth").write_text("/x") and site,
    "a list of paths edited": lambda site: edited(site / "old.pth"),
    "a configuration edited": lambda site: edited(
        site.parent / "config" / "jupyter_server_config.py"
    ),
    "a configuration added": lambda site: (
        (site.parent / "config" / "jupyter_server_config.json").write_text("{}")
        and site.parent / "config" / "jupyter_server_config.json"
    ),
    "an extension enabled": lambda site: (
        (site.parent / "config" / "jupyter_server_config.d" / "b.json").write_text("{}")
        and site.parent / "config" / "jupyter_server_config.d"
    ),
    "an extension's settings edited": lambda site: edited(
        site.parent / "config" / "jupyter_server_config.d" / "a.json"
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_that_affects_a_new_process_is_detected(fresh, site, change):
    place = CHANGES[change](site)
    assert fresh.changed() == str(place)


def test_a_change_that_keeps_size_and_time_is_detected(fresh, site):
    """As when a package is replaced by an archived version of the same second."""
    inner = site / PACKAGE / "inner.py"
    (site.parent / "new").write_text("version = 2")
    os.utime(site.parent / "new", (LONG_AGO, LONG_AGO))
    (site.parent / "new").replace(inner)
    assert fresh.changed() == str(inner)


def test_a_module_written_while_it_was_loaded_is_not_trusted(site):
    """It may have been read before or after the change."""
    freshness = Freshness()
    importlib.import_module(PACKAGE)
    now = time.time_ns()
    os.utime(site / PACKAGE / "inner.py", ns=(now, now))
    assert freshness.settle() == str(site / PACKAGE / "inner.py")


def test_a_module_with_a_time_in_the_future_is_accepted(site):
    os.utime(site / PACKAGE / "inner.py", (2**32, 2**32))
    freshness = Freshness()
    importlib.import_module(PACKAGE)
    assert freshness.settle() is None


def test_a_check_reads_no_file_and_looks_at_each_place_once(fresh, monkeypatch):
    """Every start of a server waits for one."""
    looked_at = []
    stat = os.stat
    with monkeypatch.context() as watched:
        watched.setattr(os, "stat", lambda path: looked_at.append(path) or stat(path))
        for name in ("open", "scandir", "listdir"):
            watched.setattr(os, name, refuse)
        watched.setattr("builtins.open", refuse)
        assert fresh.changed() is None
    assert sys.modules[PACKAGE].inner.__file__ in looked_at
    assert len(looked_at) == len(set(looked_at))


def refuse(path, *_, **__):
    raise AssertionError(f"{path} was opened or listed")
