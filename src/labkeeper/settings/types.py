"""Types of the values of settings: each with its check, and its form as text."""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from labkeeper.core.durations import duration


def _absolute(path: Path) -> Path:
    if "\0" in str(path):
        raise ValueError("must not contain NUL")
    try:
        return Path(os.path.abspath(path.expanduser()))  # noqa: PTH100 - links are kept as the user wrote them
    except RuntimeError:
        raise ValueError(
            "must not begin with the '~' of a user who has no home directory"
        ) from None


def _split(given: object) -> object:
    return tuple(filter(None, given.split(os.pathsep))) if isinstance(given, str) else given


def _check_reserve(text: str) -> str:
    if re.fullmatch(r"\d{1,18}|(\d{1,2}(\.\d+)?|100)%", text) is None:
        raise ValueError("must be bytes, such as 1073741824, or a percentage, such as 5%")
    return text


def _names(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    return tuple(filter(None, (name.strip() for name in given.split(","))))


def _check_modules(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(
                f"must be names of Python modules, such as numpy or matplotlib.pyplot, not {name!r}"
            )
    return tuple(dict.fromkeys(names))


def _check_networks(texts: tuple[str, ...]) -> tuple[str, ...]:
    for text in texts:
        try:
            ipaddress.ip_network(text)
        except ValueError:
            raise ValueError(
                f"must be addresses or networks, such as 10.0.0.5 or 10.0.0.0/24, not {text!r}"
            ) from None
    return texts


def _check_umask(text: str) -> str:
    # The owner keeps all rights: a server that cannot read its own files does not start.
    if re.fullmatch(r"0{0,2}[0-7]{2}", text) is None:
        raise ValueError("must be octal and leave the owner's own rights, such as 077, 027 or 022")
    return text


def _check_user_last(root: Path) -> Path:
    # Otherwise root would follow a link that the user controls.
    if any("%u" in part for part in root.parts[:-1]):
        raise ValueError(
            "must end with the part that has '%u': that user owns what is below, "
            "and could replace it with a link"
        )
    return root


def _check_host_name(text: str) -> str:
    label = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
    # With the name of a server before it, a host name has at most 253 characters (RFC 1035).
    if re.fullmatch(rf"{label}(\.{label})*", text.lower()) is None or len(text) > _LONGEST_DOMAIN:
        raise ValueError("must be a host name, such as labs.example.org")
    return text.lower()


_LONGEST_DOMAIN = 125


Directory = Annotated[Path, AfterValidator(_absolute)]
Root = Annotated[Directory, AfterValidator(_check_user_last)]
Directories = Annotated[tuple[Root, ...], BeforeValidator(_split)]
"""Separated as in PATH, in the environment and on the command line."""
Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=86400)]
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
"""A list of texts, or one text separated by commas."""
Networks = Annotated[Names, AfterValidator(_check_networks)]
"""Addresses and networks, as text."""
Modules = Annotated[Names, AfterValidator(_check_modules)]
"""Names of Python modules, without duplicates."""
Duration = Annotated[float, BeforeValidator(duration)]
"""Seconds, or text such as `90m`, `2h`, `1d12h`."""
BytesOrShare = Annotated[str, AfterValidator(_check_reserve)]
HostName = Annotated[str, AfterValidator(_check_host_name)]
Umask = Annotated[str, AfterValidator(_check_umask)]
