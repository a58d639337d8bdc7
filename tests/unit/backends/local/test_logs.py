"""A server's log file: rotation, tail, followers, permissions and limits."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource

import pytest

from labkeeper.backends.local.logs import LogFile


@pytest.fixture
def log(tmp_path):
    return LogFile(tmp_path / "logs" / "x.log", max_bytes=100)


def write(log, text):
    with log.open("[labkeeper] launch") as stream:
        stream.write(text.encode())


def test_a_log_is_private_and_begins_with_a_headline(log):
    write(log, "one\n")
    assert log.path.stat().st_mode & 0o777 == 0o600
    assert log.path.parent.stat().st_mode & 0o777 == 0o700
    assert log.tail(None) == ["[labkeeper] launch", "one"]


def test_a_tail_includes_the_rotated_part(log):
    write(log, "x" * 120 + "\n")
    log.rotate()
    write(log, "new\n")
    assert log.tail(2) == ["[labkeeper] launch", "new"]
    assert log.tail(3)[0] == "x" * 120
    assert log.tail(0) == []
    assert (log.path.parent / "x.log.1").stat().st_mode & 0o077 == 0


def test_a_log_below_its_limit_is_not_rotated(log):
    write(log, "short\n")
    log.rotate()
    assert not (log.path.parent / "x.log.1").exists()


def test_a_writer_continues_after_a_rotation(log):
    with log.open("[labkeeper] launch") as stream:
        stream.write(b"x" * 120 + b"\n")
        log.rotate()
        stream.write(b"after\n")
    assert log.path.read_text() == "after\n"


def test_if_the_old_part_cannot_be_kept_new_lines_take_precedence(log, tmp_path):
    write(log, "x" * 120 + "\n")
    (log.path.parent / "x.log.tmp").mkdir()
    log.rotate()
    assert log.path.read_text() == ""


def test_a_missing_log_has_no_lines_and_followers_end(log):
    log.rotate()
    assert log.tail(None) == []
    assert list(log.follow(None, lambda: True)) == []


def test_a_follower_receives_old_lines_then_new_ones_until_the_end(log):
    write(log, "old\n")
    alive = [True]
    lines = log.follow(1, lambda: alive[0])
    assert next(lines) == "old\n"
    assert next(lines) == ""
    write(log, "new\n\n")
    assert [next(lines), next(lines), next(lines)] == ["[labkeeper] launch\n", "new\n", "\n"]
    write(log, "last\n")
    alive[0] = False
    assert [line for line in lines if line][-1] == "last\n"


def test_a_follower_continues_after_a_rotation(log):
    write(log, "x" * 120 + "\n")
    lines = log.follow(0, lambda: True)
    assert next(lines) == ""
    log.rotate()
    write(log, "after\n")
    assert next(lines) == "[labkeeper] launch\n"
    assert next(lines) == "after\n"
    lines.close()


def test_a_follower_ends_when_the_log_is_removed_and_ignores_its_successor(log):
    write(log, "old\n")
    lines = log.follow(0, lambda: True)
    assert next(lines) == ""
    write(log, "last\n")
    log.remove()
    write(log, "of another server\n")
    assert list(itertools.islice(lines, 5)) == ["[labkeeper] launch\n", "last\n"]


def test_invalid_utf_8_is_replaced_and_long_lines_come_in_pieces(log):
    log.open("h").close()
    with log.path.open("ab") as stream:
        stream.write(b"\xff\n" + b"y" * 100_000 + b"\n")
    lines = log.tail(None)
    assert lines[1] == "\ufffd"
    assert "".join(lines[2:]) == "y" * 100_000


def test_a_log_that_cannot_be_written_raises(log):
    log.path.parent.mkdir()
    full = LogFile(log.path.parent / "full", max_bytes=1)
    full.path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        full.open("x")


MIB = 1024 * 1024


@contextlib.contextmanager
def file_size_limit(most):
    """Limit the size of files that this process writes; pytest's own output may be one of them."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_of_a_sparse_log_of_a_terabyte_only_the_end_is_read_and_kept(log):
    """A server has its log open, so it can extend it without using disk space."""
    with log.open("[labkeeper] launch") as stream:
        lines = log.follow(1, lambda: True)
        assert next(lines) == "[labkeeper] launch\n"
        os.ftruncate(stream.fileno(), 1 << 40)
        stream.write(b"\nlast\n")
        followed = list(iter(lines.__next__, ""))
        assert followed[-1] == "last\n"
        assert len("".join(followed)) <= MIB
        assert log.tail(1) == ["last"]
        assert len("".join(log.tail(None))) <= MIB
        assert log.news(0, 100)[0] == ["last"]
        with file_size_limit(64 * MIB):
            log.rotate()
    older = log.path.parent / "x.log.1"
    assert older.stat().st_size <= MIB
    assert older.read_bytes().endswith(b"\nlast\n")
    assert (log.size, log.tail(1)) == (0, ["last"])
    lines.close()


def test_a_rotation_that_fails_halfway_leaves_no_copy(log):
    """As on a full disk."""
    write(log, "x" * 50 + "\n" + "y" * 70 + "\n")
    with file_size_limit(60):
        log.rotate()
    assert [path.name for path in log.path.parent.iterdir()] == ["x.log"]
    assert log.size == 0


def test_the_copy_of_a_rotation_that_was_killed_is_removed_with_the_log(log):
    write(log, "one\n")
    (log.path.parent / "x.log.tmp").touch()
    log.remove()
    assert not list(log.path.parent.iterdir())


def test_removal_is_idempotent(log):
    write(log, "x" * 120 + "\n")
    log.rotate()
    log.remove()
    log.remove()
    assert not list(log.path.parent.iterdir())
