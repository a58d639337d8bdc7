"""The address file of a keeper is read in its present version, and without one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from labkeeper import discovery

ADDRESS = {"url": "http://127.0.0.1:8000", "socket": "/s/keeper.sock", "pid": os.getpid()}


def test_what_is_written_has_a_version_and_is_read_back(tmp_path):
    discovery.write_address(tmp_path, ADDRESS["url"], Path(ADDRESS["socket"]))
    assert json.loads((tmp_path / "keeper.json").read_text()) == ADDRESS | {"version": 1}
    assert discovery.read_address(tmp_path) == ADDRESS["url"]
    assert discovery.read_socket(tmp_path) == Path(ADDRESS["socket"])
    assert discovery.runs(tmp_path)


def test_a_file_without_a_version_is_of_the_first(tmp_path):
    (tmp_path / "keeper.json").write_text(json.dumps(ADDRESS))
    assert discovery.read_address(tmp_path) == ADDRESS["url"]
    assert discovery.runs(tmp_path)


@pytest.mark.parametrize("version", [2, 0, "one", None, [1]])
def test_a_file_of_an_unknown_version_names_no_keeper(tmp_path, version):
    (tmp_path / "keeper.json").write_text(json.dumps(ADDRESS | {"version": version}))
    assert discovery.read_address(tmp_path) is None
    assert discovery.read_socket(tmp_path) is None
    assert not discovery.runs(tmp_path)
