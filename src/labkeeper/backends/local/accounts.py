"""Accounts of this machine that servers may run as when the keeper is root."""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from labkeeper.core.errors import BackendRefused
from labkeeper.core.server import FailureClass
from labkeeper.core.spec import ServerSpec
from labkeeper.forkserver.wire import User

_FOR_EVERYBODY: Final = re.compile(
    r"(PATH|TZ|TERM|LANG\w*|LC_\w*|SSL_CERT_(FILE|DIR)|(https?|ftp|all|no)_proxy)$"
    r"|PYTHON|LD_|MALLOC_|GLIBC_|JUPYTER(?!_(CONFIG|DATA|RUNTIME)_DIR$)",
    re.IGNORECASE,
)
"""Variables that describe the machine, or that the fork server was started with anyway."""
_PLACES: Final = re.compile(r"(HOME|USER|LOGNAME|SHELL|TMPDIR|XDG_\w+|JUPYTER_(CONFIG|DATA)_DIR)$")
"""Paths by which a fork server finds what to load."""


@dataclass(frozen=True, slots=True)
class Account:
    """One user account."""

    ids: User
    environment: dict[str, str]
    """The variables that a login would set."""


def find_user(spec: ServerSpec) -> Account | None:
    """Return the account that a server asks for, or None if that is the keeper's own.

    Raises BackendRefused.
    """
    if spec.user is None:
        return None
    try:
        entry = pwd.getpwnam(spec.user)
    except KeyError:
        raise _refused(spec, "there is no such user on this machine") from None
    if entry.pw_uid == os.geteuid():
        return None
    if os.geteuid() != 0:
        raise _refused(spec, "only a keeper that runs as root can start servers as other users")
    ids = User(entry.pw_uid, entry.pw_gid, os.getgrouplist(entry.pw_name, entry.pw_gid))
    login = {
        "HOME": entry.pw_dir,
        "USER": entry.pw_name,
        "LOGNAME": entry.pw_name,
        "SHELL": entry.pw_shell,
    }
    return Account(ids, login)


def own_environment(account: Account | None) -> Mapping[str, str]:
    """Return the part of the keeper's environment that another user may have.

    The rest may describe the keeper, and hold secrets.
    """
    if account is None:
        return os.environ
    return {
        name: value for name, value in os.environ.items() if _FOR_EVERYBODY.match(name)
    } | account.environment


def common_environment() -> Mapping[str, str]:
    """Return the part of the keeper's environment that a fork server needs; launches add the rest.

    All servers of a fork server share its memory; if the keeper is root, other users' servers too.
    """
    if os.geteuid() != 0:
        return os.environ
    return {
        name: value
        for name, value in os.environ.items()
        if _FOR_EVERYBODY.match(name) or _PLACES.match(name)
    }


def check_passage(spec: ServerSpec, runtime_dir: Path) -> None:
    """Raise BackendRefused unless every user may traverse the path to the server directories."""
    for directory in runtime_dir.parents:
        if not directory.stat().st_mode & 0o001:
            raise _refused(
                spec,
                f"that user cannot traverse {directory}; set LABKEEPER_RUNTIME_DIR to a directory "
                "that all users can reach, such as /run/labkeeper",
            )


def _refused(spec: ServerSpec, why: str) -> BackendRefused:
    return BackendRefused(
        f"cannot start server '{spec.name}' as user '{spec.user}': {why}",
        failure_class=FailureClass.CONFIG_ERROR,
    )
