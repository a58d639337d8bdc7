"""Options and example texts that commands share."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click


@dataclass(slots=True)
class Where:
    """The options that locate the keeper."""

    url: str | None = None
    state_dir: str | None = None


def _note(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is not None:
        setattr(context.ensure_object(Where), str(parameter.name), value)


_Function = Callable[..., Any]


def where_options(command: _Function) -> _Function:
    """Add the options that locate the keeper; they may come before or after a command's name."""
    url = click.option(
        "--url",
        metavar="URL",
        expose_value=False,
        callback=_note,
        help="The keeper's URL.  [env: LABKEEPER_URL; default: found]",
    )
    state_dir = click.option(
        "--state-dir",
        metavar="PATH",
        expose_value=False,
        callback=_note,
        help="State directory of the keeper on this machine.  [env: LABKEEPER_STATE_DIR]",
    )
    return url(state_dir(command))


class Size(click.ParamType[int]):
    """Bytes, with a unit of 1024: `512M`, `2GiB`, `1.5g`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the size in bytes, or fail."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", str(value).strip().lower())
        if found is None:
            self.fail(f"{value!r} is no size; write it as 512M or 2GiB", param, ctx)
        return int(float(found[1]) * 1024 ** " kmgt".index(found[2] or " "))


as_json_option = click.option("--json", "as_json", is_flag=True, help="Print the API's JSON.")
wait_option = click.option(
    "--wait",
    type=click.FloatRange(min=0, max=3600),
    metavar="SECONDS",
    help="Maximum time to wait; 0: do not wait.  [default: until it is done]",
)


def pairs_of(option: str, texts: Sequence[str]) -> dict[str, str]:
    """Return the `KEY=VALUE` pairs of a repeated option."""
    pairs = {}
    for text in texts:
        key, is_pair, value = text.partition("=")
        if not is_pair:
            raise click.BadParameter(f"{text!r} is not KEY=VALUE", param_hint=f"'{option}'")
        pairs[key] = value
    return pairs


def examples(*lines: str) -> str:
    """Return the examples of a help text; the first line stops click from rewrapping the others."""
    return "\n".join(("\b", "Examples:", *(f"  {line}" for line in lines)))
