"""Reading and removing files that another user may have put there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import signal
import stat
import sys
from pathlib import Path

import pytest

from harness import no_descriptors
from labkeeper.files import _LARGEST, private_copy, read_foreign, read_named, remove_tree


def test_read_foreign_truncates_large_files(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"text")
    assert read_foreign(path) == b"text"
    path.write_bytes(bytes(_LARGEST + 1))
    assert len(read_foreign(path)) == _LARGEST


def endless(path):
    """Make a device that can be read endlessly, or a link to one where that needs root."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    except PermissionError:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    "make",
    [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/etc/passwd"), endless, lambda _: None],
)
def test_anything_but_a_regular_file_is_refused_without_blocking(tmp_path, make):
    make(tmp_path / "file")
    for read in (read_foreign, read_named):
        with pytest.raises(OSError, match=r"not a regular file|No such file|symbolic links"):
            read(str(tmp_path / "file"))


def test_a_named_file_is_read_completely_or_refused(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"text")
    assert read_named(str(path)) == b"text"
    os.truncate(path, 1 << 40)
    with pytest.raises(OSError, match="it is too large"):
        read_named(str(path))


def test_a_named_file_is_not_read_through_a_symbolic_link_in_its_path(tmp_path):
    """Such a link may be created after the path was checked; the file itself is not a link."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "key").write_text("secret")
    (tmp_path / "mine").symlink_to("theirs")
    with pytest.raises(OSError, match="a part of its path has become a link"):
        read_named(str(tmp_path / "mine" / "key"))


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_a_file_with_a_lease_is_refused_without_blocking(tmp_path):
    """By default, Linux blocks such an open for up to 45 seconds."""
    path = tmp_path / "file"
    path.write_text("text")
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        with path.open("r+") as held:
            fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            for read in (read_foreign, read_named):
                with pytest.raises(BlockingIOError):
                    read(str(path))
    finally:
        signal.signal(signal.SIGIO, before)


NOBODY = pwd.getpwuid(65534).pw_name


@pytest.mark.root
@pytest.mark.parametrize(
    ("owner", "group", "mode", "readable"),
    [
        (0, 0, 0o600, False),
        (0, 0, 0o640, False),
        (0, 65534, 0o640, True),
        (0, 0, 0o644, True),
        (65534, 0, 0o600, True),
        (65534, 0, 0o044, False),
    ],
)
def test_for_another_user_only_files_that_this_user_may_read_are_read(
    tmp_path, owner, group, mode, readable
):
    path = tmp_path / "key"
    path.write_text("secret")
    os.chown(path, owner, group)
    path.chmod(mode)
    assert read_named(str(path)) == read_named(str(path), "root") == b"secret"
    with (
        contextlib.nullcontext()
        if readable
        else pytest.raises(PermissionError, match=f"user '{NOBODY}' may not read it")
    ):
        assert read_named(str(path), NOBODY) == b"secret"
    with pytest.raises(PermissionError):
        read_named(str(path), "no-such-user")


def test_a_private_copy_can_be_opened_repeatedly_and_has_no_name(tmp_path, monkeypatch):
    """Without a name, nothing is left behind and no other process finds it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with private_copy(b"secret") as path:
        assert [Path(path).read_bytes() for _ in range(2)] == [b"secret"] * 2
        assert list(tmp_path.iterdir()) == []


def nested(directory, depth):
    """Nest directories deeper than the longest path, and return a descriptor of the innermost."""
    here = os.open(directory, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    return here


def test_remove_tree_removes_deep_trees_and_follows_no_links(tmp_path):
    """Deeper than Python's recursion limit, the descriptor limit, and the longest path."""
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


def test_remove_tree_leaves_a_link_to_a_directory_alone(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to("kept")
    remove_tree(tmp_path / "link")
    assert {path.name for path in tmp_path.iterdir()} == {"kept", "link"}


def test_remove_tree_removes_directories_without_permissions(tmp_path):
    """As a user other than root, which ignores permissions."""
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


def test_remove_tree_fails_without_free_descriptors(tmp_path):
    (tmp_path / "tree" / "inner").mkdir(parents=True)
    with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
        remove_tree(tmp_path / "tree")
    remove_tree(tmp_path / "tree")
    assert not (tmp_path / "tree").exists()
