"""What somebody else may have put there is read, and removed, with care."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from labkeeper.files import _LARGEST, read_foreign, remove_tree


def test_a_file_is_read_up_to_a_size(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"text")
    assert read_foreign(path) == b"text"
    path.write_bytes(bytes(_LARGEST + 1))
    assert len(read_foreign(path)) == _LARGEST


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/etc/passwd"), lambda _: None])
def test_what_is_no_file_is_refused_at_once(tmp_path, make):
    make(tmp_path / "file")
    with pytest.raises(OSError, match=r"no file|No such file|symbolic links"):
        read_foreign(tmp_path / "file")


def nested(directory, depth):
    """Make directories in each other, deeper than a path can say; give the innermost one as it is open."""
    here = os.open(directory, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    return here


def test_directories_are_removed_however_deep_they_are_and_no_link_is_followed(tmp_path):
    """Deeper than Python recurses, than a process may hold descriptors, and than a path may be long."""
    kept, tree = tmp_path / "kept", tmp_path / "tree"
    kept.mkdir()
    (kept / "file").touch()
    tree.mkdir()
    innermost = nested(tree, 3000)
    os.symlink(kept, "link", dir_fd=innermost)
    os.close(innermost)
    remove_tree(tree)
    remove_tree(tree)
    assert not tree.exists()
    assert (kept / "file").exists()


def test_a_link_to_a_directory_is_no_directory_to_remove(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to("kept")
    remove_tree(tmp_path / "link")
    assert {path.name for path in tmp_path.iterdir()} == {"kept", "link"}


def test_what_its_owner_has_closed_to_itself_is_removed_too(tmp_path):
    """As a user who is not root, since nothing is closed to root."""
    inner = tmp_path / "tree" / "closed" / "inner"
    inner.mkdir(parents=True)
    (inner / "file").touch()
    if as_root := os.geteuid() == 0:
        for path in (tmp_path, *tmp_path.rglob("*")):
            os.chown(path, 65534, 65534)
    for path in (inner, inner.parent, inner.parent.parent):
        path.chmod(0)
    here = os.open(tmp_path, os.O_RDONLY)
    child = os.fork()
    if child == 0:
        os.fchdir(here)
        if as_root:
            os.setresuid(65534, 65534, 65534)
        remove_tree(Path("tree"))
        os._exit(os.path.lexists("tree"))
    os.close(here)
    assert os.waitpid(child, 0)[1] == 0
