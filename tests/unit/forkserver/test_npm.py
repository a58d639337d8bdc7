"""npm is asked for its directory once, except where something may have configured another one."""

from __future__ import annotations

import os

import pytest

from labkeeper.forkserver import npm

ANSWER = "/opt/of-npm"


class Npm:
    """An installed npm, and what it answers."""

    def __init__(self, place):
        self.place = place
        self.answer = ANSWER
        self.asked = 0
        for path in ("bin/node", "lib/npm/bin/npm-cli.js"):
            self.write(path, "#!/bin/sh\n").chmod(0o755)
        (place / "bin" / "npm").symlink_to("../lib/npm/bin/npm-cli.js")

    def write(self, path, text):
        file = self.place / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def ask(self):
        self.asked += 1
        return self.answer


@pytest.fixture
def installed(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name in npm._VARIABLES or name.lower().startswith("npm_config_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(npm, "prefixes", {})
    return Npm(tmp_path)


def times_asked(installed):
    """Look the prefix up twice; return how many times npm was asked."""
    before = installed.asked
    found = [npm.global_prefix(installed.ask) for _ in range(2)]
    assert found == [installed.answer] * 2
    return installed.asked - before


def test_npm_is_asked_once(installed):
    installed.write(".npmrc", "fund=false\n")
    assert times_asked(installed) == 1


@pytest.mark.parametrize("file", [".npmrc", "etc/npmrc", "lib/npm/npmrc"])
def test_npm_is_asked_each_time_if_a_file_configures_the_prefix(installed, file):
    assert times_asked(installed) == 1
    installed.write(file, "fund=false\nprefix=/home/ada/npm\n")
    installed.answer = "/home/ada/npm"
    assert times_asked(installed) == 2


def test_npm_is_asked_each_time_if_a_file_cannot_be_read(installed):
    (installed.place / ".npmrc").mkdir()
    assert times_asked(installed) == 2


@pytest.mark.parametrize("name", ["npm_config_prefix", "NPM_CONFIG_USERCONFIG", "PREFIX"])
def test_npm_is_asked_each_time_if_the_environment_may_configure_it(installed, name, monkeypatch):
    monkeypatch.setenv(name, "/home/ada/npm")
    assert times_asked(installed) == 2


def test_a_version_managers_npm_is_asked_each_time(installed):
    (installed.place / "bin" / "npm").unlink()
    installed.write("bin/npm", "#!/bin/sh\n").chmod(0o755)
    assert times_asked(installed) == 2


def test_another_node_is_another_answer(installed, monkeypatch):
    assert times_asked(installed) == 1
    installed.write("other/bin/node", "#!/bin/sh\n").chmod(0o755)
    monkeypatch.setenv("PATH", f"{installed.place / 'other' / 'bin'}:{os.environ['PATH']}")
    installed.answer = "/opt/of-another"
    assert times_asked(installed) == 1


def test_npm_that_fails_is_asked_again(installed):
    installed.answer = None
    assert times_asked(installed) == 2
    installed.answer = ANSWER
    assert times_asked(installed) == 1


def test_without_home_the_prefix_is_found(installed, monkeypatch):
    monkeypatch.setenv("HOME", os.devnull)
    assert times_asked(installed) == 1
