"""Users of this machine, as whom a server may run when the keeper is root."""

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
"""How the machine is set up, and what our fork server was started with anyway."""
_PLACES: Final = re.compile(r"(HOME|USER|LOGNAME|SHELL|TMPDIR|XDG_\w+|JUPYTER_(CONFIG|DATA)_DIR)$")
"""Where files of ours are, by which a fork server knows what to load."""


@dataclass(frozen=True, slots=True)
class Account:
    """One user."""

    ids: User
    environment: dict[str, str]
    """What a login would set."""


def find_user(spec: ServerSpec) -> Account | None:
    """Find the user that a server asks for; None when that is who we are. Raises BackendRefused."""
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
    login = {"HOME": entry.pw_dir, "USER": entry.pw_name, "LOGNAME": entry.pw_name, "SHELL": entry.pw_shell}
    return Account(ids, login)


def own_environment(account: Account | None) -> Mapping[str, str]:
    """Give of our environment what another user should have; what else is in it may be about us, and secret."""
    if account is None:
        return os.environ
    return {name: value for name, value in os.environ.items() if _FOR_EVERYBODY.match(name)} | account.environment


def common_environment() -> Mapping[str, str]:
    """Give of our environment what a fork server needs; the rest comes with each launch.

    All its servers have its memory. If we are root, those of other users are among them.
    """
    if os.geteuid() != 0:
        return os.environ
    return {name: value for name, value in os.environ.items() if _FOR_EVERYBODY.match(name) or _PLACES.match(name)}


def check_passage(spec: ServerSpec, runtime_dir: Path) -> None:
    """Check that every user may traverse the path to server directories, as a server has to. Raises BackendRefused."""
    for directory in runtime_dir.parents:
        if not directory.stat().st_mode & 0o001:
            raise _refused(
                spec,
                f"that user cannot pass through {directory}; set LABKEEPER_RUNTIME_DIR to where everybody can, as /run/labkeeper",
            )


def _refused(spec: ServerSpec, why: str) -> BackendRefused:
    return BackendRefused(
        f"cannot start server '{spec.name}' as user '{spec.user}': {why}", failure_class=FailureClass.CONFIG_ERROR
    )
