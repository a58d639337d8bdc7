"""Each threat in SECURITY.md has a countermeasure, and an existing test that proves it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "SECURITY.md").read_text()
ROWS = re.findall(r"^\| (?!threat|---)(.+?) \| (.+?) \| (.+?) \|$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("threat", "stopped_by", "proved_by"), ROWS, ids=[row[0] for row in ROWS])
def test_each_threat_names_existing_tests(threat, stopped_by, proved_by):
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", proved_by)
    assert named
    assert proved_by == ", ".join(f"`{file}::{test}`" for file, test in named)
    for file, test in named:
        assert re.search(rf"^def {test}\(", (TESTS / file).read_text(), re.MULTILINE), (file, test)


def test_no_row_of_the_tables_is_missed():
    assert len(ROWS) == PAGE.count("\n| ") - 2 * PAGE.count("| threat |")
