"""What somebody else may have put there is read with care."""

from __future__ import annotations

import os

import pytest

from labkeeper.files import _LARGEST, read_foreign


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
