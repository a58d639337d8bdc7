"""Files that make a kernel load other modules or settings than its zygote has."""

from __future__ import annotations

import pytest

from labkeeper.forkserver.footprint import Footprint

FOOTPRINT = Footprint(["six", "numpy"], [".config/plots/rc"], ["plotsrc"], ".local/lib/site")


@pytest.mark.parametrize(
    "name",
    [
        "six.py",
        "six.pyc",
        "six.so",
        "six.cpython-311-x86_64-linux-gnu.so",
        "numpy/__init__.py",
        "numpy/__init__.cpython-311-x86_64-linux-gnu.so",
        "plotsrc",
    ],
)
def test_file_that_comes_first_is_found(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    found = FOOTPRINT.met_in(str(tmp_path))
    assert found == str(tmp_path / name.partition("/")[0])


@pytest.mark.parametrize(
    "name",
    ["sixth.py", "six", "six.txt", "six.ipynb", "six.py.bak", "numpy/core.py", "a/six.py", "plots"],
)
def test_other_files_do_not_matter(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert FOOTPRINT.met_in(str(tmp_path)) is None


@pytest.mark.parametrize("name", [".config/plots/rc", ".local/lib/site/six.py"])
def test_settings_and_modules_of_a_user_are_found(tmp_path, name):
    assert FOOTPRINT.met_at_home(str(tmp_path)) is None
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).touch()
    assert FOOTPRINT.met_at_home(str(tmp_path)) == str(tmp_path / name)
    assert FOOTPRINT.met_in(str(tmp_path)) is None


def test_modules_of_a_user_do_not_matter_where_they_are_not_used(tmp_path):
    (tmp_path / "six.py").touch()
    assert Footprint(["six"]).met_at_home(str(tmp_path)) is None


def test_directory_that_is_missing_or_no_directory_has_no_modules(tmp_path):
    (tmp_path / "file").touch()
    for place in ("nowhere", "file"):
        assert FOOTPRINT.met_in(str(tmp_path / place)) is None


def test_without_libraries_no_directory_is_read(tmp_path):
    (tmp_path / "six.py").touch()
    assert Footprint().met_in(str(tmp_path)) is None
