"""The directory of one server, which goes when the server has ended.

Only the keeper's user can enter it. Where the server runs as another user, others can pass through it (0711), but not list it,
and one part belongs to that user.

In it: `launch.json`, by which a later keeper knows the process again; `stop.json`, how the server is to end; and `jupyter/`,
Jupyter's runtime directory, with `kernels.json`, the kernels that it has: the part that is the server's user's. Its path is
the mark by which all that the server started is found.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import AliasChoices, BaseModel, Field, ValidationError

from labkeeper.backends.local.hierarchies import LimitedBy
from labkeeper.core.errors import BackendUnavailable
from labkeeper.core.spec import ServerSpec
from labkeeper.files import read_named, remove_tree, write_private
from labkeeper.forkserver import kernels
from labkeeper.forkserver.extension import RECORD
from labkeeper.forkserver.wire import User

_BUNDLE: Final = "gateway-ca.pem"


class Asked(BaseModel):
    """Where a server was told to listen. It runs its user's own code, so what it says of that itself is worth nothing."""

    hostname: str
    port: int
    base_url: str
    secure: bool
    """Whether it has to speak TLS; by its own configuration it may in any case."""


class Record(BaseModel):
    """`launch.json`: which process runs here, of which generation and boot."""

    version: Literal[1, 2] = 2
    """Of this format. Without it, or with 1, `generation` may still be called `launch`."""
    generation: int = Field(validation_alias=AliasChoices("generation", "launch"))
    pid: int
    started: str
    boot: str
    gateway: bool
    launched_by: Literal["fork", "exec"] = "exec"
    exec_reason: str | None = None
    forkserver: str | None = None
    """Which fork server is its parent."""
    limited_by: dict[str, LimitedBy] = {}
    ready: bool = False
    asked: Asked | None = None
    """None in one that an earlier release wrote."""


@dataclass(frozen=True, slots=True)
class ServerDir:
    """One server's directory, whether it exists or not."""

    path: Path

    @property
    def jupyter(self) -> Path:
        """Jupyter's runtime directory; the part that belongs to the server's user."""
        return self.path / "jupyter"

    @property
    def users(self) -> frozenset[int] | None:
        """The users that processes of its server run as: its own, and ours until it has become that one; None if unknown."""
        try:
            return frozenset({os.getuid(), self.jupyter.lstat().st_uid})
        except OSError:
            return None

    def prepare(self, spec: ServerSpec, user: User | None) -> Path | None:
        """Create the directory and what a launch needs; return the file of certificates to trust, if any. Raises OSError."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path.mkdir(mode=0o700)
        self.jupyter.mkdir(mode=0o700)
        bundle = self._bundle(spec)
        if user is not None:
            # It may pass through to its own part. Which process runs here it must not be able to write.
            for passed in (self.path.parent, self.path):
                passed.chmod(0o711)
            # The directory last: once it is the user's, a link may stand for anything in it, and we would give that away.
            for owned in filter(None, (bundle, self.jupyter)):
                os.chown(owned, user.uid, user.gid, follow_symlinks=False)
        return bundle

    def write_record(self, record: Record) -> None:
        """Write down which process runs here. Raises OSError."""
        write_private(self._record_path, record.model_dump_json())

    def read_record(self) -> Record | None:
        """Read which process runs here; None when nothing that can be trusted is written. Raises BackendUnavailable."""
        try:
            return Record.model_validate_json(self._record_path.read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValidationError):
            return None
        except OSError as error:
            raise BackendUnavailable(f"cannot read {self._record_path}: {error.strerror}") from error

    @property
    def kernels(self) -> Path:
        """Where the server writes down which kernels it has."""
        return self.jupyter / kernels.RECORD

    def write_stop_request(self, *, keep_kernels: bool, within: float) -> None:
        """Tell the server how its kernels on a gateway are to end, and within how many seconds. Raises OSError."""
        note = write_private(self.path / kernels.STOP_REQUEST, json.dumps({"keep_kernels": keep_kernels, "within": within}))
        # Its user is to read it.
        if (user := self.jupyter.stat()).st_uid != os.geteuid():
            os.chown(note, user.st_uid, user.st_gid, follow_symlinks=False)

    @property
    def recognised(self) -> bool:
        """Whether a keeper made this directory: a user's own may have the same path."""
        try:
            inside = {path.name for path in self.path.iterdir()}
        except OSError:
            return False
        half_there = inside <= {self.jupyter.name, f"{RECORD}.new", kernels.STOP_REQUEST, f"{kernels.STOP_REQUEST}.new"}
        return not self.path.is_symlink() and (RECORD in inside or half_there)

    def reset(self) -> None:
        """Remove what an abandoned launch wrote, and keep what the next one needs. Raises OSError."""
        for path in self.jupyter.iterdir():
            if path.name == _BUNDLE:
                continue
            if path.is_dir() and not path.is_symlink():
                remove_tree(path)
            else:
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the directory with all that is in it. Idempotent. Raises OSError where we lack what it takes to look into it.

        A keeper may be killed at any step, and what is left is recognised. The record goes first: a later keeper would take a
        server whose own files are gone for one that has ended in good order. Then what may hold anything.
        """
        if self.path.is_symlink():
            return
        with contextlib.suppress(OSError):
            self._record_path.unlink()
        for directory in (self.jupyter, self.path):
            remove_tree(directory)

    @property
    def _record_path(self) -> Path:
        return self.path / RECORD

    def _bundle(self, spec: ServerSpec) -> Path | None:
        """Write the certificates to trust: the system's and the gateway's own."""
        if spec.gateway is None or spec.gateway.ca_certs is None:
            return None
        system = ssl.get_default_verify_paths().cafile
        sources = [_certificates(system, Path(system).read_bytes())] if system else []
        sources.append(_certificates(spec.gateway.ca_certs, read_named(spec.gateway.ca_certs)))
        return write_private(self.jupyter / _BUNDLE, "\n".join(sources))


_CERTIFICATE: Final = re.compile(r"-----BEGIN ((?:TRUSTED )?CERTIFICATE)-----[\sA-Za-z0-9+/=]+-----END \1-----")


def _certificates(file: str, content: bytes) -> str:
    """Return the certificates of a file, and nothing else: we may be able to read what the server's user may not.

    Raises ValueError where there is none.
    """
    found = [match[0] for match in _CERTIFICATE.finditer(content.decode(errors="replace"))]
    if not found:
        raise ValueError(f"{file} holds no certificate in PEM")
    return "\n".join(found)
