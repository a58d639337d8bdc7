"""Settings: their sources and precedence, and one-line errors for wrong values."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from labkeeper.core.errors import SettingsError
from labkeeper.serve.policies import cull_policy, settings_in_force
from labkeeper.settings.location import PREFIX, ca_file
from labkeeper.settings.model import Settings
from labkeeper.settings.sources import load, unknown_variables


@pytest.fixture(autouse=True)
def _clean(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith(PREFIX):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)


def test_by_default_nothing_is_reachable_from_other_machines(tmp_path):
    chosen = load()
    assert (chosen.host, chosen.port, chosen.lab_ip, chosen.lab_port) == (
        "127.0.0.1",
        8000,
        "127.0.0.1",
        8888,
    )
    assert chosen.auth == "token"
    assert chosen.state_dir == tmp_path / ".local/state/labkeeper"
    assert chosen.server_dirs == chosen.state_dir / "run"
    assert not chosen.debug


def test_flags_override_the_environment_which_overrides_the_file(tmp_path, monkeypatch):
    file = tmp_path / "labkeeper.toml"
    file.write_text("port = 1001\nlab_port = 1002\nmax_servers = 3\n")
    monkeypatch.setenv("LABKEEPER_CONFIG", str(file))
    monkeypatch.setenv("LABKEEPER_PORT", "2001")
    monkeypatch.setenv("LABKEEPER_LAB_PORT", "2002")
    chosen = load(port=3001)
    assert (chosen.port, chosen.lab_port, chosen.max_servers) == (3001, 2002, 3)
    names = ("port", "lab_port", "max_servers", "host")
    assert [chosen.source_of(name) for name in names] == [
        "flag",
        "environment variable",
        "settings file",
        "default",
    ]


def test_settings_in_force_are_told_with_their_sources_and_without_secrets(tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.write_text("a-token-that-is-secret\n")
    monkeypatch.setenv("LABKEEPER_TOKEN_FILE", str(file))
    monkeypatch.setenv("LABKEEPER_WEBHOOK_URL", "https://hook.example.org/a-secret-path")
    monkeypatch.setenv("LABKEEPER_ALLOWED_HOSTS", "a.example.org,b.example.org")
    told = settings_in_force(load(debug=True))
    found = {one.variable.removeprefix(PREFIX): (one.value, one.source) for one in told}
    assert found.keys() == {name.upper() for name in Settings.model_fields}
    assert found["TOKEN"] == ("set", "file named by LABKEEPER_TOKEN_FILE")
    assert found["TOKEN_FILE"] == found["WEBHOOK_URL"] == ("set", "environment variable")
    assert found["WEBHOOK_SECRET"] == found["ALLOWED_ORIGINS"] == ("not set", "default")
    assert found["ALLOWED_HOSTS"] == ("a.example.org, b.example.org", "environment variable")
    assert found["DEBUG"] == ("true", "flag")
    assert found["STOP_GRACE"] == ("8", "default")
    assert "secret" not in " ".join(one.value for one in told)


def test_an_empty_variable_counts_as_unset(monkeypatch):
    monkeypatch.setenv("LABKEEPER_TOKEN", "")
    assert load().token is None


def test_paths_are_made_absolute_and_tildes_expanded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LABKEEPER_STATE_DIR", "here")
    monkeypatch.setenv("LABKEEPER_RUNTIME_DIR", "~/there")
    chosen = load()
    assert (chosen.state_dir, chosen.server_dirs) == (tmp_path / "here", tmp_path / "there")
    assert chosen.notebook_dir == tmp_path


def test_lists_of_directories_are_colon_separated_or_toml_arrays(tmp_path, monkeypatch):
    monkeypatch.setenv("LABKEEPER_ALLOWED_ROOTS", "/srv:~/there::/home/%u")
    assert load().allowed_roots == (Path("/srv"), tmp_path / "there", Path("/home/%u"))
    monkeypatch.delenv("LABKEEPER_ALLOWED_ROOTS")
    assert load().allowed_roots is None
    file = tmp_path / "labkeeper.toml"
    file.write_text('allowed_roots = ["/srv", "/home/%u"]')
    monkeypatch.setenv("LABKEEPER_CONFIG", str(file))
    assert load().allowed_roots == (Path("/srv"), Path("/home/%u"))


@pytest.mark.parametrize("variable", ["LABKEEPER_NOTEBOOK_DIR", "LABKEEPER_ALLOWED_ROOTS"])
def test_a_root_ends_with_the_part_that_contains_the_user_name(monkeypatch, variable):
    """Below it, that user could create a symbolic link to a directory of another user."""
    monkeypatch.setenv(variable, "/home/of-%u")
    load()
    monkeypatch.setenv(variable, "/home/%u/notebooks")
    with pytest.raises(SettingsError, match=f"{variable}: .*must end with the part that has '%u'"):
        load()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("LABKEEPER_PORT", "0"),
        ("LABKEEPER_PORT", "http"),
        ("LABKEEPER_START_TIMEOUT", "0"),
        ("LABKEEPER_STOP_GRACE", "nan"),
        ("LABKEEPER_AUTH", "off"),
        ("LABKEEPER_LOG_LEVEL", "loud"),
        ("LABKEEPER_MAX_SERVERS", "-1"),
        ("LABKEEPER_TOKEN", "short"),
        ("LABKEEPER_TOKEN", "with a blank in it ..."),
    ],
)
def test_a_wrong_value_names_its_variable_and_never_shows_a_token(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as caught:
        load()
    assert variable in caught.value.message
    assert "\n" not in caught.value.message
    assert variable != "LABKEEPER_TOKEN" or value not in caught.value.message


@pytest.mark.parametrize(
    ("text", "word"),
    [("colour = 1", "colour"), ("port = ", "labkeeper.toml"), ("port = 'x'", "LABKEEPER_PORT")],
)
def test_an_error_in_the_file_names_its_cause(tmp_path, monkeypatch, text, word):
    file = tmp_path / "labkeeper.toml"
    file.write_text(text)
    monkeypatch.setenv("LABKEEPER_CONFIG", str(file))
    with pytest.raises(SettingsError, match=word):
        load()


def test_a_missing_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("LABKEEPER_CONFIG", str(tmp_path / "none.toml"))
    with pytest.raises(SettingsError, match=r"none\.toml"):
        load()


def test_a_misspelled_variable_is_reported(monkeypatch):
    monkeypatch.setenv("LABKEEPER_PROT", "1")
    monkeypatch.setenv("LABKEEPER_PORT", "1")
    assert unknown_variables() == ["LABKEEPER_PROT"]


def test_the_token_is_not_in_the_repr(monkeypatch):
    monkeypatch.setenv("LABKEEPER_TOKEN", "a-long-enough-token")
    assert "a-long-enough-token" not in repr(load())


def test_every_setting_has_a_description():
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_the_token_may_come_from_a_file(tmp_path, monkeypatch, end):
    file = tmp_path / "token"
    file.write_text("a-long-enough-token" + end, newline="")
    monkeypatch.setenv("LABKEEPER_TOKEN_FILE", str(file))
    assert load().token.get_secret_value() == "a-long-enough-token"


@pytest.mark.parametrize(
    "held", [b"", b"short", b"two lines in it\nare not good", b"\xff" * 20, b"x y" * 20]
)
def test_a_file_without_a_valid_token_is_named_and_not_shown(tmp_path, monkeypatch, held):
    file = tmp_path / "the-file"
    file.write_bytes(held)
    monkeypatch.setenv("LABKEEPER_TOKEN_FILE", str(file))
    with pytest.raises(
        SettingsError, match=r"LABKEEPER_TOKEN_FILE.*the-file.*16 visible"
    ) as caught:
        load()
    assert "two lines" not in caught.value.message
    assert "x y" not in caught.value.message


@pytest.mark.parametrize("name", ["none", "."])
def test_an_unreadable_token_file_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setenv("LABKEEPER_TOKEN_FILE", str(tmp_path / name))
    with pytest.raises(SettingsError, match="cannot read the file"):
        load()


def test_token_and_token_file_are_mutually_exclusive(tmp_path, monkeypatch):
    monkeypatch.setenv("LABKEEPER_TOKEN", "a-long-enough-token")
    monkeypatch.setenv("LABKEEPER_TOKEN_FILE", str(tmp_path / "token"))
    with pytest.raises(SettingsError, match="both set"):
        load()


def test_durations_are_numbers_or_texts_and_zero_disables_a_rule(monkeypatch):
    monkeypatch.setenv("LABKEEPER_IDLE_TIMEOUT", "2h")
    monkeypatch.setenv("LABKEEPER_CULL_GRACE", "90")
    monkeypatch.setenv("LABKEEPER_KERNEL_IDLE_TIMEOUT", "0")
    chosen = load(max_age="1d12h", cull_terminals="open")
    assert (chosen.idle_timeout, chosen.max_age) == (7200, 129600)
    policy = cull_policy(chosen)
    assert (policy.grace, policy.kernel_idle_timeout, policy.terminals) == (90, None, "open")
    monkeypatch.setenv("LABKEEPER_IDLE_TIMEOUT", "soon")
    with pytest.raises(
        SettingsError, match=r"LABKEEPER_IDLE_TIMEOUT: .*must be seconds as a number"
    ):
        load()


@pytest.mark.parametrize("which", ["", "LAB_"])
@pytest.mark.parametrize(("one", "other"), [("CERT", "KEY"), ("KEY", "CERT")])
def test_certificate_and_key_must_be_set_together(monkeypatch, which, one, other):
    monkeypatch.setenv(f"LABKEEPER_{which}{one}_FILE", "/some/where.pem")
    with pytest.raises(
        SettingsError,
        match=rf"^LABKEEPER_{which}{one}_FILE is set, but LABKEEPER_{which}{other}_FILE is not",
    ):
        load()
    monkeypatch.setenv(f"LABKEEPER_{which}{other}_FILE", "/else/where.pem")
    chosen = load()
    pair = chosen.lab_certificate if which else chosen.certificate
    assert sorted(map(str, pair)) == ["/else/where.pem", "/some/where.pem"]
    assert (chosen.certificate if which else chosen.lab_certificate) is None


def test_the_ca_file_of_the_command_line_is_not_a_setting(monkeypatch, tmp_path):
    assert ca_file() is None
    monkeypatch.setenv("LABKEEPER_CA_FILE", "~/ca.pem")
    assert ca_file() == tmp_path / "ca.pem"
    assert unknown_variables() == []


def test_libraries_are_names_of_modules_without_duplicates(monkeypatch):
    assert load().preload == ()
    monkeypatch.setenv("LABKEEPER_PRELOAD", "numpy, matplotlib.pyplot,,numpy")
    assert load().preload == ("numpy", "matplotlib.pyplot")


@pytest.mark.parametrize("given", ["a b", "a/b", ".a", "a.", "../evil", "1a", "a;b"])
def test_a_library_that_is_no_module_is_refused(monkeypatch, given):
    monkeypatch.setenv("LABKEEPER_PRELOAD", f"numpy,{given}")
    with pytest.raises(SettingsError, match=r"LABKEEPER_PRELOAD: .*names of Python modules"):
        load()


def test_libraries_without_forked_kernels_are_refused(monkeypatch):
    monkeypatch.setenv("LABKEEPER_PRELOAD", "numpy")
    monkeypatch.setenv("LABKEEPER_KERNELS_BY", "exec")
    with pytest.raises(SettingsError, match=r"LABKEEPER_KERNELS_BY=exec.*unset one of them"):
        load()
