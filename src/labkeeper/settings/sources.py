"""Reads the settings. With `location`, the only reader of our environment variables.

Sources, in order of precedence: the command line, the environment (`LABKEEPER_` and the name in
capitals), the TOML file named by `LABKEEPER_CONFIG`, the default.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any, Final

from pydantic import SecretStr, ValidationError

from labkeeper.core.errors import SettingsError
from labkeeper.settings.location import CA_VARIABLE, CONFIG_VARIABLE, PREFIX, URL_VARIABLE
from labkeeper.settings.model import SECRETS, Settings, Source
from labkeeper.terminal import visible_line

_OUTSIDE: Final = frozenset({CONFIG_VARIABLE, URL_VARIABLE, CA_VARIABLE, PREFIX + "SERVER"})
"""Our variables that are not settings."""
_SHORTEST_TOKEN: Final = 16
_LONGEST_TOKEN: Final = 4096


def load(**flags: Any) -> Settings:
    """Return the settings; `flags` are the command line's. Raises SettingsError, in one line."""
    try:
        return _load(flags)
    except SettingsError as error:
        # Names and paths may contain control characters.
        raise SettingsError(visible_line(error.message)) from error


def _load(flags: dict[str, Any]) -> Settings:
    layers = {
        Source.FILE: _from_file(),
        Source.ENVIRONMENT: _from_environment(),
        Source.FLAG: flags,
    }
    given = {name: value for layer in layers.values() for name, value in layer.items()}
    sources = {name: source for source, layer in layers.items() for name in layer}
    try:
        settings = Settings.model_validate(given, context=sources)
    except ValidationError as error:
        raise SettingsError(
            "; ".join(_sentence(dict(mistake)) for mistake in error.errors())
        ) from error
    for which in ("", "lab_"):
        _check_pair(settings, f"{which}cert_file", f"{which}key_file")
    if settings.preload and settings.kernels_by == "exec":
        raise SettingsError(
            f"{PREFIX}PRELOAD is set, but no kernel is forked ({PREFIX}KERNELS_BY=exec); "
            "unset one of them"
        )
    for name in ("token", "webhook_secret"):
        settings = _with_secret(settings, name)
    secret = settings.token.get_secret_value() if settings.token is not None else None
    if secret is not None and (
        len(secret) < _SHORTEST_TOKEN
        or not secret.isascii()
        or not secret.isprintable()
        or " " in secret
    ):
        source = (
            f"TOKEN_FILE: what {settings.token_file} holds" if settings.token_file else "TOKEN:"
        )
        raise SettingsError(
            f"bad setting LABKEEPER_{source} "
            f"must be at least {_SHORTEST_TOKEN} visible ASCII characters"
        )
    return settings


def _check_pair(settings: Settings, *names: str) -> None:
    for one, other in (names, reversed(names)):
        if getattr(settings, one) is not None and getattr(settings, other) is None:
            raise SettingsError(
                f"{PREFIX}{one.upper()} is set, but {PREFIX}{other.upper()} is not; "
                "set both or neither"
            )


def _with_secret(settings: Settings, name: str) -> Settings:
    """Return the settings with a secret read from its file, if one is named."""
    path, variable = getattr(settings, f"{name}_file"), PREFIX + name.upper()
    if path is None:
        return settings
    if getattr(settings, name) is not None:
        raise SettingsError(f"{variable} and {variable}_FILE are both set; unset one of them")
    return settings.model_copy(update={name: SecretStr(_secret_in(path, f"{variable}_FILE"))})


def unknown_variables() -> list[str]:
    """Return environment variables that look like settings but are none: likely misspelled."""
    known = {PREFIX + name.upper() for name in Settings.model_fields} | _OUTSIDE
    return sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)


def _secret_in(path: Path, variable: str) -> str:
    """Read a secret from a file, without the newline that most editors add."""
    try:
        with path.open("rb") as stream:
            return stream.read(_LONGEST_TOKEN).decode("utf-8", errors="replace").strip("\r\n")
    except OSError as error:
        raise SettingsError(
            f"cannot read the file {path} ({variable}): {error.strerror}"
        ) from error


def _from_environment() -> dict[str, Any]:
    """Return the settings in the environment; an empty one counts as unset."""
    found = {name: os.environ.get(PREFIX + name.upper()) for name in Settings.model_fields}
    return {name: value for name, value in found.items() if value}


def _from_file() -> dict[str, Any]:
    path = os.environ.get(CONFIG_VARIABLE)
    if not path:
        return {}
    try:
        with Path(path).expanduser().open("rb") as stream:
            return tomllib.load(stream)
    except (
        OSError,
        UnicodeDecodeError,
        tomllib.TOMLDecodeError,
        RecursionError,
        RuntimeError,
    ) as error:
        # RuntimeError: a '~' without a home directory; RecursionError: deep nesting in tomllib.
        raise SettingsError(
            f"cannot read the settings file {path} (named by {CONFIG_VARIABLE}): {error}"
        ) from error


def _sentence(mistake: dict[str, Any]) -> str:
    name = str(mistake["loc"][0]) if mistake["loc"] else "?"
    if mistake["type"] == "extra_forbidden":
        return f"unknown setting '{name}'"
    given = "" if name in SECRETS else f" (given: {mistake['input']!r})"
    return f"bad setting {PREFIX}{name.upper()}: {mistake['msg']}{given}"
