"""Who can write a file, and the refusal of modules that others can write."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from labkeeper.forkserver import writers
from labkeeper.forkserver.writers import Guard, WritableByOthersError, foreign_writer

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture(autouse=True)
def _forget():
    writers._writer.cache_clear()
    writers._members.cache_clear()
    yield
    writers._writer.cache_clear()


@pytest.fixture
def place():
    """A private directory with a module of a new name."""
    place = Path(tempfile.mkdtemp())
    (place / "deep").mkdir(mode=0o755)
    (place / "deep" / "some_module.py").write_text("here = 1")
    yield place
    shutil.rmtree(place)


def test_own_file_that_others_can_only_read_is_fine(place):
    (place / "deep" / "some_module.py").chmod(0o644)
    assert foreign_writer(str(place / "deep" / "some_module.py")) is None


@pytest.mark.parametrize("part", ["deep/some_module.py", "deep", ""])
def test_file_or_directory_that_everyone_can_write_is_found(place, part):
    (place / part).chmod(0o777)
    found = foreign_writer(str(place / "deep" / "some_module.py"))
    assert found == f"everyone can write {place / part}"


def test_directory_in_which_only_owners_replace_files_is_fine(place):
    place.chmod(0o1777)
    assert foreign_writer(str(place / "deep" / "some_module.py")) is None


def test_both_a_link_and_its_target_count(place):
    safe = place / "safe"
    safe.mkdir()
    (safe / "link.py").symlink_to(place / "deep" / "some_module.py")
    assert foreign_writer(str(safe / "link.py")) is None
    writers._writer.cache_clear()
    (place / "deep").chmod(0o777)
    assert foreign_writer(str(safe / "link.py")) == f"everyone can write {place / 'deep'}"
    (place / "deep").chmod(0o755)
    writers._writer.cache_clear()
    safe.chmod(0o777)
    assert foreign_writer(str(safe / "link.py")) == f"everyone can write {safe}"


def test_file_that_does_not_exist_yet_is_judged_by_its_directory(place):
    compiled = place / "deep" / "__pycache__" / "some_module.pyc"
    assert foreign_writer(str(compiled)) is None
    writers._writer.cache_clear()
    (place / "deep").chmod(0o777)
    assert foreign_writer(str(compiled)) == f"everyone can write {place / 'deep'}"


@AS_ROOT
def test_file_of_another_user_is_found(place):
    os.chown(place / "deep", 65534, -1)
    found = foreign_writer(str(place / "deep" / "some_module.py"))
    assert found == f"user nobody can write {place / 'deep'}"


@AS_ROOT
def test_group_counts_if_it_may_have_other_members(place):
    file = place / "deep" / "some_module.py"
    file.chmod(0o664)
    assert foreign_writer(str(file)) is None, "the group of root"
    for group in (65534, 54321):
        writers._writer.cache_clear()
        os.chown(file, -1, group)
        assert (foreign_writer(str(file)) or "").startswith("group ")


def test_module_is_refused_and_the_refusal_is_remembered(place, monkeypatch):
    guard = Guard()
    monkeypatch.setattr(sys, "meta_path", [guard, *sys.meta_path])
    monkeypatch.syspath_prepend(str(place / "deep"))
    (place / "deep" / "some_module.py").chmod(0o666)
    with pytest.raises(WritableByOthersError, match=r"some_module: everyone can write .*\.py"):
        importlib.import_module("some_module")
    assert len(guard.refused) == 1
    assert "some_module" not in sys.modules


def test_other_modules_are_found_as_usual(place, monkeypatch):
    guard = Guard()
    monkeypatch.setattr(sys, "meta_path", [guard, *sys.meta_path])
    monkeypatch.syspath_prepend(str(place / "deep"))
    (place / "deep" / "package").mkdir()
    (place / "deep" / "package" / "inner.py").write_text("here = 2")
    try:
        assert importlib.import_module("some_module").here == 1
        assert importlib.import_module("package.inner").here == 2, "of a package without a file"
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("no_such_module")
    finally:
        for name in ("some_module", "package", "package.inner"):
            sys.modules.pop(name, None)
    assert guard.refused == []
