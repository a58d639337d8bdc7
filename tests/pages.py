"""Shared by the browser tests: Chromium, and notebooks that it runs."""

from __future__ import annotations

import contextlib
import json
import shutil

import pytest
from playwright import sync_api

from harness import PATIENCE

REBOUND = "rebound.example.org"
"""A host name that resolves to this machine, in the browser only."""
DOMAIN = "labs.test"
"""A domain that does, likewise, with all names below it."""
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules="
    + ", ".join(f"MAP {name} 127.0.0.1" for name in (REBOUND, DOMAIN, f"*.{DOMAIN}")),
]
"""Root needs the first; the others stop the browser's own network requests."""


@pytest.fixture
def page():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        context = browser.new_context()
        context.set_default_timeout(PATIENCE * 1000)
        yield context.new_page()
        browser.close()


def notebook(code):
    cell = {
        "cell_type": "code",
        "id": "a",
        "metadata": {},
        "outputs": [],
        "execution_count": None,
        "source": code,
    }
    spec = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    return json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": spec, "cells": [cell]})


def run_cell_in_page(page, output, lab=None):
    """Run the first cell, and return whether it shows that output.

    The Lab ignores the request until it is connected. On a busy machine it may open a dialog
    first, such as for the choice of a kernel, which is accepted. `lab` is its frame,
    if it is in one.
    """
    lab = lab or page
    question = lab.locator(".jp-Dialog .jp-mod-accept")
    with contextlib.suppress(sync_api.TimeoutError):
        if question.count():
            question.first.click(timeout=2000)
        lab.locator(".jp-Notebook .cm-content").first.click(timeout=2000)
        page.keyboard.press("Control+Enter")
        lab.locator(".jp-OutputArea-output").get_by_text(output, exact=True).wait_for(timeout=2000)
        return True
    return False
