"""Where the keeper is, as the environment says.

Without models, which take a tenth of a second to import: shell completion waits for this only.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

PREFIX: Final = "LABKEEPER_"
CONFIG_VARIABLE: Final = PREFIX + "CONFIG"
URL_VARIABLE: Final = PREFIX + "URL"
"""The keeper's URL for the command line, instead of the one in its state directory."""
CA_VARIABLE: Final = PREFIX + "CA_FILE"
"""Certificate authorities that the command line trusts besides the system's."""
_DECISIVE: Final = (URL_VARIABLE, CONFIG_VARIABLE, PREFIX + "TOKEN", PREFIX + "TOKEN_FILE")
"""Variables beside that of the state directory on which the keeper or its caller depends."""


def keeper_url() -> str | None:
    """Return the keeper URL for the command line from the environment."""
    return os.environ.get(URL_VARIABLE) or None


def ca_file() -> Path | None:
    """Return the certificate authorities' file for the command line from the environment."""
    named = os.environ.get(CA_VARIABLE)
    return Path(named).expanduser() if named else None


def default_state_dir() -> Path:
    """Return the state directory that applies if none is named."""
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state") / "labkeeper"


def certain_state_dir(named: str | None) -> Path | None:
    """Return the state directory, by its name on the command line or the environment.

    None if the keeper or the token also depends on other variables, which only `sources` reads.
    """
    if any(os.environ.get(variable) for variable in _DECISIVE):
        return None
    found = named or os.environ.get(PREFIX + "STATE_DIR") or default_state_dir()
    return Path(os.path.expanduser(found))  # noqa: PTH111 - never raises
