"""Frames between a keeper and the processes it launches: JSON objects with open files.

A frame is the object's length in four bytes (big-endian), then the object. A report pipe carries
objects as lines. Both ends belong to the same user; all input is validated nevertheless, once,
here.

Each object has a `version`. Processes outlive their keeper, and one may be started from newer
files: without a version it is 1, and any other than ours is refused.
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

VERSION = 1
"""Version of frames, the files that come with them, and lines."""
LARGEST = 16 * 1024 * 1024
"""Maximum bytes of a frame; the keeper's request body limit bounds the environment."""
MOST_FILES = 4
"""Maximum open files per frame."""
_ALL_BITS = 0o777
_LENGTH = struct.Struct("!I")


class WireError(Exception):
    """The input is not a frame, not the expected one, or of another version."""


@dataclass(frozen=True)
class User:
    """The user that a server runs as."""

    uid: int
    gid: int
    groups: list[int]


@dataclass(frozen=True)
class Launch:
    """All that a process needs to become one server."""

    server_dir: str
    """The server's private directory; also the mark of all that it starts."""
    title: str
    """Title in process lists."""
    cwd: str
    env: dict[str, str]
    kernel_env: dict[str, str]
    """Additional variables of its kernels."""
    umask: int
    config: dict[str, dict[str, Any]]
    """Jupyter's configuration by section; takes precedence over files, like the command line."""
    user: User | None
    cgroups: list[str]
    """Files that the process writes its pid to, in order to be limited."""
    rlimits: dict[str, int]
    """Limits by their name in `resource`, such as RLIMIT_DATA."""
    encrypt_kernels: bool
    """Whether kernels that can encrypt their traffic do so, unless configured otherwise."""
    zygote_cgroups: list[str]
    """Such files for its zygote alone, in order to be counted; the keeper moves the server."""
    kernels_by: str
    """`fork` IPython kernels where possible, or `exec` each."""
    preload: list[str]
    """Libraries that are loaded for forked kernels beside ipykernel."""
    identity_key: str
    """Key of the header by which the edge tells who its client is; empty without an edge."""

    def message(self) -> dict[str, Any]:
        """Return it as a frame's object."""
        return asdict(self)

    @classmethod
    def read(cls, file: int) -> Launch:
        """Read it from an open file, which is closed. Raises WireError, OSError."""
        with os.fdopen(file, "rb") as stream:
            return cls.parse(_read(stream.read(), "a launch"))

    @classmethod
    def parse(cls, message: Mapping[str, Any]) -> Launch:
        """Read it from a frame's object. Raises WireError."""
        given: dict[str, Any] = {field.name: message.get(field.name) for field in fields(cls)}
        for name, fits in _CHECKS.items():
            if not fits(given[name]):
                raise WireError(f"bad launch: {name} does not fit")
        if given["user"] is not None:
            given["user"] = User(**given["user"])
        return cls(**given)


@dataclass(frozen=True)
class KernelLaunch:
    """All that a process needs to become one kernel; written by its server."""

    argv: list[str]
    """The command line that would execute it."""
    env: dict[str, str]
    cwd: str
    again: bool
    """Whether it replaces an earlier kernel on the same ports."""

    def message(self) -> dict[str, Any]:
        """Return it as a frame's object."""
        return asdict(self)

    @classmethod
    def read(cls, file: int) -> KernelLaunch:
        """Read it from an open file, which is closed. Raises WireError, OSError."""
        with os.fdopen(file, "rb") as stream:
            return cls(**_read(stream.read(), "the launch of a kernel"))


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _numbers(value: Any) -> bool:
    return all(type(number) is int and number >= 0 for number in value)


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "server_dir": lambda value: isinstance(value, str),
    "title": lambda value: isinstance(value, str),
    "cwd": lambda value: isinstance(value, str),
    "env": _texts,
    "kernel_env": _texts,
    "umask": lambda value: type(value) is int and 0 <= value <= _ALL_BITS,
    "config": lambda value: (
        isinstance(value, dict) and all(isinstance(section, dict) for section in value.values())
    ),
    "user": lambda value: (
        value is None
        or (
            isinstance(value, dict)
            and value.keys() == {"uid", "gid", "groups"}
            and isinstance(value["groups"], list)
            and _numbers([value["uid"], value["gid"], *value["groups"]])
        )
    ),
    "cgroups": _list_of_texts,
    "zygote_cgroups": _list_of_texts,
    "rlimits": lambda value: isinstance(value, dict) and _numbers(value.values()),
    "encrypt_kernels": lambda value: isinstance(value, bool),
    "kernels_by": lambda value: isinstance(value, str) and value in {"fork", "exec"},
    "preload": _list_of_texts,
    "identity_key": lambda value: isinstance(value, str),
}


def send(connection: socket.socket, message: Mapping[str, Any], files: Sequence[int] = ()) -> None:
    """Send one frame with open files. Raises OSError, and WireError if it is too large."""
    body = _written(message)
    if len(body) > LARGEST:
        raise WireError(f"a frame of {len(body)} bytes is too large (at most {LARGEST})")
    frame = _LENGTH.pack(len(body)) + body
    # The other end may have read all of it, and have closed.
    if rest := frame[socket.send_fds(connection, [frame], files) :]:
        connection.sendall(rest)


def receive(
    connection: socket.socket, *, within: float | None = None
) -> tuple[dict[str, Any], list[int]]:
    """Return one frame and its open files, which the caller must close.

    All of it must arrive within `within` seconds, however slowly it is sent. Raises EOFError if the
    other end has closed, WireError if the frame is invalid, OSError (TimeoutError).
    """
    files: list[int] = []
    until = None if within is None else time.monotonic() + within
    try:
        _limit(connection, until)
        header = _files_and(connection, _LENGTH.size, files)
        if not header:
            raise EOFError
        (length,) = _LENGTH.unpack(header + _exactly(connection, _LENGTH.size - len(header), until))
        if length > LARGEST:
            raise WireError(f"a frame of {length} bytes is too large (at most {LARGEST})")
        message = _read(_exactly(connection, length, until), "a frame")
    except BaseException:
        for file in files:
            os.close(file)
        raise
    return message, files


def line(message: Mapping[str, Any]) -> bytes:
    """Return an object as a line for a report pipe."""
    return _written(message) + b"\n"


def read_line(text: bytes) -> dict[str, Any]:
    """Return the object in a line. Raises WireError."""
    return _read(text, "a line")


def _written(message: Mapping[str, Any]) -> bytes:
    return json.dumps({**message, "version": VERSION}).encode()


def _read(text: bytes, what: str) -> dict[str, Any]:
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WireError(f"{what} holds no JSON: {error}") from error
    if not isinstance(message, dict):
        raise WireError(f"{what} holds no object, but {type(message).__name__}")
    if (version := message.pop("version", 1)) != VERSION:
        raise WireError(f"{what} has version {str(version)[:20]}, not {VERSION}")
    return message


def _files_and(connection: socket.socket, size: int, files: list[int]) -> bytes:
    """Receive up to `size` bytes; append the attached files, which are close-on-exec."""
    room = socket.CMSG_SPACE(MOST_FILES * array.array("i").itemsize)
    close_on_exec = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
    data, ancillary, flags, _ = connection.recvmsg(size, room, close_on_exec)
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers = array.array("i")
            numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
            files.extend(numbers)
    if flags & socket.MSG_CTRUNC:
        raise WireError(f"more than {MOST_FILES} files came with a frame")
    return data


def _limit(connection: socket.socket, until: float | None) -> None:
    if until is not None:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError("a frame did not come in time")
        connection.settimeout(left)


def _exactly(connection: socket.socket, size: int, until: float | None) -> bytes:
    data = bytearray()
    while len(data) < size:
        _limit(connection, until)
        piece = connection.recv(min(size - len(data), 1 << 16))
        if not piece:
            raise WireError("the other end closed within a frame")
        data += piece
    return bytes(data)
