"""The directory of one server, removed when the server has ended.

Only the keeper's user can enter it. If the server runs as another user, other users can traverse it
(0711) but not list it, and that user owns one part.

It holds `launch.json`, by which a later keeper recognises the process; `stop.json`, how the server
is to end; and `jupyter/`, Jupyter's runtime directory with `kernels.json`, the list of its kernels:
the part that the server's user owns. Its path is the mark that finds all that the server started.
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
    """The address that a server was launched to listen on.

    A server runs its user's own code, so its own statements about this are not trusted.
    """

    hostname: str
    port: int
    base_url: str
    secure: bool
    """Whether it must use TLS; its own configuration may enable TLS anyway."""
    behind_edge: bool = False
    """Whether it was launched to be reached through the edge."""


class Record(BaseModel):
    """`launch.json`: the process that runs here, with its generation and boot."""

    version: Literal[1, 2] = 2
    """The format's version. Without it, or with 1, `generation` may still be called `launch`."""
    generation: int = Field(validation_alias=AliasChoices("generation", "launch"))
    pid: int
    started: str
    boot: str
    gateway: bool
    launched_by: Literal["fork", "exec"] = "exec"
    exec_reason: str | None = None
    forkserver: str | None = None
    """The fork server that is its parent."""
    limited_by: dict[str, LimitedBy] = {}
    ready: bool = False
    asked: Asked


@dataclass(frozen=True, slots=True)
class ServerDir:
    """One server's directory, which need not exist."""

    path: Path

    @property
    def jupyter(self) -> Path:
        """Jupyter's runtime directory; the part that belongs to the server's user."""
        return self.path / "jupyter"

    @property
    def users(self) -> frozenset[int] | None:
        """The users that the server's processes run as, or None if unknown.

        Its own, and the keeper's until the process has switched.
        """
        try:
            return frozenset({os.getuid(), self.jupyter.lstat().st_uid})
        except OSError:
            return None

    def prepare(self, spec: ServerSpec, user: User | None) -> Path | None:
        """Create the directory with what a launch needs; return the CA bundle, if any.

        Raises OSError.
        """
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path.mkdir(mode=0o700)
        self.jupyter.mkdir(mode=0o700)
        bundle = self._bundle(spec)
        if user is not None:
            # The user may traverse to its own part, but must not be able to write which process
            # runs here.
            for passed in (self.path.parent, self.path):
                passed.chmod(0o711)
            # The directory last: once the user owns it, any entry may be replaced by a link, whose
            # target would be given away.
            for owned in filter(None, (bundle, self.jupyter)):
                os.chown(owned, user.uid, user.gid, follow_symlinks=False)
        return bundle

    def write_record(self, record: Record) -> None:
        """Record which process runs here. Raises OSError."""
        write_private(self._record_path, record.model_dump_json())

    def read_record(self) -> Record | None:
        """Return which process runs here, or None without a valid record.

        Raises BackendUnavailable.
        """
        try:
            return Record.model_validate_json(self._record_path.read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValidationError):
            return None
        except OSError as error:
            raise BackendUnavailable(
                f"cannot read {self._record_path}: {error.strerror}"
            ) from error

    @property
    def kernels(self) -> Path:
        """The file in which the server lists its kernels."""
        return self.jupyter / kernels.RECORD

    def write_stop_request(self, *, keep_kernels: bool, within: float) -> None:
        """Tell the server how, and within how many seconds, to end its kernels on a gateway.

        Raises OSError.
        """
        note = write_private(
            self.path / kernels.STOP_REQUEST,
            json.dumps(
                {
                    "version": kernels.STOP_REQUEST_VERSION,
                    "keep_kernels": keep_kernels,
                    "within": within,
                }
            ),
        )
        # The server's user must be able to read it.
        if (user := self.jupyter.stat()).st_uid != os.geteuid():
            os.chown(note, user.st_uid, user.st_gid, follow_symlinks=False)

    @property
    def recognised(self) -> bool:
        """Whether a keeper created this directory: a user's own may have the same path."""
        try:
            inside = {path.name for path in self.path.iterdir()}
        except OSError:
            return False
        half_there = inside <= {
            self.jupyter.name,
            f"{RECORD}.new",
            kernels.STOP_REQUEST,
            f"{kernels.STOP_REQUEST}.new",
        }
        return not self.path.is_symlink() and (RECORD in inside or half_there)

    def reset(self) -> None:
        """Remove what an abandoned launch wrote, except what the next one needs. Raises OSError."""
        for path in self.jupyter.iterdir():
            if path.name == _BUNDLE:
                continue
            if path.is_dir() and not path.is_symlink():
                remove_tree(path)
            else:
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the directory and its contents. Idempotent.

        Raises OSError if the keeper lacks resources to read it. A keeper may be killed at any step,
        and what is left is recognised. The record goes first, because a later keeper would take a
        server without its own files for one that ended in good order; then the part with arbitrary
        contents.
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
        """Write the CA bundle: the system's certificates and the gateway's own."""
        if spec.gateway is None or spec.gateway.ca_certs is None:
            return None
        system = ssl.get_default_verify_paths().cafile
        sources = [_certificates(system, Path(system).read_bytes())] if system else []
        sources.append(_certificates(spec.gateway.ca_certs, read_named(spec.gateway.ca_certs)))
        return write_private(self.jupyter / _BUNDLE, "\n".join(sources))


_CERTIFICATE: Final = re.compile(
    r"-----BEGIN ((?:TRUSTED )?CERTIFICATE)-----[\sA-Za-z0-9+/=]+-----END \1-----"
)


def _certificates(file: str, content: bytes) -> str:
    """Return only the certificates of a file: the server's user may be unable to read the rest.

    Raises ValueError if there are none.
    """
    found = [match[0] for match in _CERTIFICATE.finditer(content.decode(errors="replace"))]
    if not found:
        raise ValueError(f"{file} holds no certificate in PEM")
    return "\n".join(found)
