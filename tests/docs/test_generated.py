"""The generated parts of the documentation match the code."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STALE = "| `LABKEEPER_PORT` | `80` |"


def generate(*arguments):
    command = [sys.executable, ROOT / "scripts" / "generate-docs", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def copy(tmp_path):
    """A copy of the pages, to change."""
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("_build"))
    return tmp_path


def test_no_block_is_stale():
    checked = generate("--check")
    assert checked.returncode == 0, checked.stderr


def test_an_outdated_block_is_reported_and_regenerated(copy):
    page = copy / "docs" / "reference" / "settings.md"
    good = page.read_text()
    page.write_text(good.replace("| `LABKEEPER_PORT` | `8000` |", STALE))
    assert STALE in page.read_text()

    checked = generate("--check", "--root", copy)
    assert checked.returncode == 1
    assert "docs/reference/settings.md: is stale" in checked.stderr
    assert "run: .venv/bin/python scripts/generate-docs" in checked.stderr
    assert STALE in page.read_text()

    assert generate("--root", copy).returncode == 0
    assert page.read_text() == good


def test_a_block_that_is_missing_from_the_pages_is_named(copy):
    page = copy / "docs" / "reference" / "cli.md"
    page.write_text(page.read_text().replace("<!-- begin: commands -->", ""))
    checked = generate("--check", "--root", copy)
    assert checked.returncode == 1
    assert "no page holds the blocks: commands" in checked.stderr


def check_pictures(root):
    command = [sys.executable, root / "scripts" / "take-screenshots", "--check"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_pictures_are_of_the_present_dashboard():
    checked = check_pictures(ROOT)
    assert checked.returncode == 0, checked.stderr


def test_pictures_of_an_earlier_dashboard_are_reported(tmp_path):
    web = Path("src", "labkeeper", "web")
    shutil.copytree(ROOT / web, tmp_path / web)
    for path in ("scripts/take-screenshots", "docs/images/dashboard.sha256"):
        (tmp_path / path).parent.mkdir(parents=True)
        shutil.copy(ROOT / path, tmp_path / path)
    assert check_pictures(tmp_path).returncode == 0
    with (tmp_path / web / "static" / "dashboard.css").open("a") as sheet:
        sheet.write("body { color: red; }")
    checked = check_pictures(tmp_path)
    assert (checked.returncode, "make screenshots" in checked.stderr) == (1, True)
