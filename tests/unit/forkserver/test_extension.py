"""What labkeeper's server extension finds out about JupyterLab."""

from __future__ import annotations

import sys

import pytest

from labkeeper.forkserver.extension import may_need_build


@pytest.fixture
def app_dir(tmp_path, monkeypatch):
    """The directory that JupyterLab takes for that of its package."""
    monkeypatch.delenv("JUPYTERLAB_DIR", raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    path = tmp_path / "share/jupyter/lab"
    (path / "static").mkdir(parents=True)
    return path


def test_jupyterlab_of_its_package_needs_no_build(app_dir):
    assert not may_need_build(str(app_dir))
    # An unused command leaves these.
    (app_dir / "extensions").mkdir()
    (app_dir / "staging").mkdir()
    assert not may_need_build(str(app_dir))


@pytest.mark.parametrize(
    "left", ["extensions/x-1.0.tgz", "staging/package.json", "settings/build_config.json"]
)
def test_jupyterlab_that_was_built_or_extended_may_need_a_build(app_dir, left):
    (app_dir / left).parent.mkdir()
    (app_dir / left).touch()
    assert may_need_build(str(app_dir))


def test_jupyterlab_in_another_directory_may_need_a_build(app_dir, tmp_path, monkeypatch):
    assert may_need_build(str(tmp_path / "mine"))
    monkeypatch.setenv("JUPYTERLAB_DIR", str(app_dir))
    assert may_need_build(str(app_dir))
