"""How a process becomes a server."""

from __future__ import annotations

from pathlib import Path

import pytest

from labkeeper.forkserver import server


def test_a_server_enters_its_directory_but_not_through_a_symbolic_link(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    server._go_to(str(tmp_path / "real" / "deep"))
    assert Path.cwd() == tmp_path / "real" / "deep"
    with pytest.raises(
        NotADirectoryError, match=f"{tmp_path / 'link' / 'deep'} leads to another place now"
    ):
        server._go_to(str(tmp_path / "link" / "deep"))
