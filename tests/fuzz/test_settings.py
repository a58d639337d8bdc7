"""Fuzz settings: they are loaded, or rejected with a one-line error."""

from __future__ import annotations

import json
import os
from unittest.mock import patch

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fuzzing import DEPTHS, FUZZ
from labkeeper.core.errors import SettingsError
from labkeeper.settings.location import PREFIX
from labkeeper.settings.model import Settings
from labkeeper.settings.sources import load

VALUES = st.text(st.characters(blacklist_characters="\0", codec="utf-8")) | st.sampled_from(
    ["~nobody-of-this-name/x", "~", "1e999", "nan", "-0", "9" * 5000, "٣", "90m", "5%", "on", "[]"]
)
NAMES = st.sampled_from(sorted(Settings.model_fields))
TOML = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2)
    ),
    max_leaves=4,
)


def load_from(environment):
    """Load settings from this environment only; return the settings, and an error or ''."""
    with patch.dict(os.environ, environment, clear=True):
        try:
            return load(), ""
        except SettingsError as error:
            return None, str(error)


def assert_loaded_or_rejected(environment):
    settings, why = load_from(environment)
    assert (settings is None) == bool(why)
    assert "\n" not in why
    assert settings is None or "\0" not in f"{settings.state_dir}{settings.token_file}"


@FUZZ
@given(given_=st.dictionaries(NAMES.map(lambda name: PREFIX + name.upper()), VALUES, max_size=3))
@example(given_={"LABKEEPER_STATE_DIR": "~nobody-of-this-name/x"})
@example(given_={"LABKEEPER_WEBHOOK_SECRET_FILE": "\n"})
def test_variables_may_have_any_value(tmp_path, given_):
    assert_loaded_or_rejected(
        {"HOME": str(tmp_path)}
        | {
            name: os.fsencode(value).decode(errors="surrogateescape")
            for name, value in given_.items()
        }
    )


@FUZZ
@given(
    content=st.dictionaries(NAMES, TOML, max_size=3) | st.dictionaries(st.text(), TOML, max_size=2)
)
@example(content={"state_dir": "\0"})
@example(content={"token_file": "\0"})
@example(content={"\n": True})
def test_file_may_set_anything_to_anything(tmp_path, content):
    path = tmp_path / "labkeeper.toml"
    # JSON is valid TOML except for objects, which become inline tables.
    lines = [f"{json.dumps(name)} = {to_toml(value)}" for name, value in content.items()]
    path.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    assert_loaded_or_rejected({"LABKEEPER_CONFIG": str(path), "HOME": str(tmp_path)})


def to_toml(value):
    if isinstance(value, dict):
        return (
            "{"
            + ", ".join(f"{json.dumps(name)} = {to_toml(inner)}" for name, inner in value.items())
            + "}"
        )
    if isinstance(value, list):
        return "[" + ", ".join(map(to_toml, value)) + "]"
    return json.dumps(value) if isinstance(value, str | bool) else repr(value)


@FUZZ
@given(content=st.binary(max_size=100) | DEPTHS.map(lambda depth: b"port = " + b"[" * depth))
@example(content=b"port = " + b"[" * 100_000)
def test_file_may_have_any_content(tmp_path, content):
    path = tmp_path / "labkeeper.toml"
    path.write_bytes(content)
    assert_loaded_or_rejected({"LABKEEPER_CONFIG": str(path), "HOME": str(tmp_path)})


@pytest.mark.parametrize("path", ["~nobody-of-this-name/x", "/proc/self/mem", "/", "\udcff"])
def test_file_may_have_any_path(tmp_path, path):
    assert_loaded_or_rejected({"LABKEEPER_CONFIG": path, "HOME": str(tmp_path)})


@FUZZ
@given(content=st.binary(max_size=100))
def test_secret_file_may_have_any_content(tmp_path, content):
    path = tmp_path / "secret"
    path.write_bytes(content)
    for name in ("TOKEN", "WEBHOOK_SECRET"):
        assert_loaded_or_rejected({f"LABKEEPER_{name}_FILE": str(path), "HOME": str(tmp_path)})
