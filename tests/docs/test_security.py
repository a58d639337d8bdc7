"""Each threat in SECURITY.md is stopped by something, and a test that exists proves it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "SECURITY.md").read_text()
ROWS = re.findall(r"^\| (?!threat|---)(.+?) \| (.+?) \| (.+?) \|$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("threat", "stopped_by", "proved_by"), ROWS, ids=[row[0] for row in ROWS])
def test_a_threat_has_a_test_that_exists(threat, stopped_by, proved_by):
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", proved_by)
    assert named
    assert proved_by == ", ".join(f"`{file}::{test}`" for file, test in named)
    for file, test in named:
        assert re.search(rf"^def {test}\(", (TESTS / file).read_text(), re.MULTILINE), (file, test)


def test_the_tables_are_read_whole():
    assert len(ROWS) == PAGE.count("\n| ") - 2 * PAGE.count("| threat |")
