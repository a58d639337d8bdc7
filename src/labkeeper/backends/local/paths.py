"""The directories and files of this machine that specs may name."""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from labkeeper.core.access import Caller, Scope
from labkeeper.core.errors import InvalidSpec
from labkeeper.core.spec import Gateway, ServerSpec
from labkeeper.schema.types import ONE_LINE

_USER: Final = "%u"
"""Placeholder for the server's user in directories of the settings."""
_FILES: Final = ("ca_certs", "client_cert", "client_key")
"""The fields of a gateway that name files."""


class Paths:
    """Resolves and checks the paths of specs."""

    def __init__(self, notebook_dir: Path, allowed_roots: Sequence[Path] = ()) -> None:
        """`notebook_dir` is the default root directory, and the base of relative ones.

        Root directories may be within `allowed_roots`, or without any only within `notebook_dir`.
        `%u` in these directories is the server's user.
        """
        self._notebook_dir = notebook_dir
        self._allowed_roots = tuple(allowed_roots) or (notebook_dir,)

    def validate(self, spec: ServerSpec, caller: Caller) -> ServerSpec:
        """Return the spec with all links resolved. Raises InvalidSpec, NotAllowed."""
        roots = [resolved(root, spec.user) for root in self._allowed_roots]
        root_dir = os.path.realpath(Path(resolved(self._notebook_dir, spec.user)) / spec.root_dir)
        _check_root_dir(root_dir, roots)
        gateway = None if spec.gateway is None else _with_files(spec.gateway, roots, caller)
        return replace(spec, root_dir=root_dir, gateway=gateway)


def resolved(directory: Path, user: str | None) -> str:
    """Return a directory for a user of the machine, None being our own, with all links resolved."""
    name = user or _own_name()
    return os.path.realpath(str(directory).replace(_USER, name))


def _check_root_dir(root_dir: str, roots: Sequence[str]) -> None:
    if not _holds(roots, root_dir):
        allowed = " or ".join(roots)
        rule = f"must be within {allowed} (LABKEEPER_ALLOWED_ROOTS), after links are resolved"
        raise InvalidSpec.of("root_dir", rule)
    if re.fullmatch(ONE_LINE.pattern, root_dir) is None:
        raise InvalidSpec.of("root_dir", f"{ONE_LINE.rule}, after links are resolved")
    if not os.path.isdir(root_dir) or not os.access(root_dir, os.R_OK | os.X_OK):  # noqa: PTH112
        rule = f"must be a directory that the keeper can read; {root_dir} is not"
        raise InvalidSpec.of("root_dir", rule)


def _with_files(gateway: Gateway, roots: Sequence[str], caller: Caller) -> Gateway:
    files: dict[str, Any] = {
        field: _file(f"gateway.{field}", path, roots, caller)
        for field in _FILES
        if (path := getattr(gateway, field)) is not None
    }
    return replace(gateway, **files)


def _file(field: str, given: str, roots: Sequence[str], caller: Caller) -> str:
    path = os.path.realpath(given)
    if not _holds(roots, path):
        # Checked before the file: only an admin may learn whether it exists.
        caller.needs(Scope.ADMIN, f"use a file outside of {' and '.join(roots)} as {field}")
    if not (os.path.isfile(path) and os.access(path, os.R_OK)):  # noqa: PTH113
        raise InvalidSpec.of(field, "must be a file that the keeper can read")
    return path


def _holds(roots: Iterable[str], path: str) -> bool:
    """Whether a path lies within one of the roots; all must be resolved."""
    return any(Path(path).is_relative_to(root) for root in roots)


def _own_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # In a container with a numeric user.
        return str(os.geteuid())
