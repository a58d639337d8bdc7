"""Templates, and how pages show amounts, durations and times."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from labkeeper.core.durations import format_duration, format_time
from labkeeper.web.assets import address_of
from labkeeper.web.plain import plain
from labkeeper.web.sparklines import sparkline

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")
_STEP: Final = 1024


def render(template: str, given: Mapping[str, Any]) -> Markup:
    """Return the text of a template."""
    return Markup(_environment().get_template(template).render(given))  # noqa: S704 - it escapes


@functools.cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("labkeeper.web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "amount": amount,
        "duration": format_duration,
        "moment": moment,
        "plain": plain,
    }
    made.globals |= {"asset": address_of, "sparkline": sparkline}
    return made


def amount(count: float) -> str:
    """Return a number of bytes with three digits: `1.25 GiB`."""
    unit = 0
    while count >= _STEP and unit < len(_UNITS) - 1:
        count, unit = count / _STEP, unit + 1
    return f"{count:.3g} {_UNITS[unit]}" if unit and count < 1000 else f"{count:.0f} {_UNITS[unit]}"  # noqa: PLR2004


def moment(at: float) -> Markup:
    """Return an element with a time in seconds since the epoch; scripts show how long ago it is."""
    shown = datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    template = '<time datetime="{0}" title="{1}">{1}</time>'
    return Markup(template).format(format_time(at), shown)  # noqa: S704 - it escapes
