"""The command `doctor`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Final

import click

from labkeeper.cli.connect import connected, loading, read_settings, token_of
from labkeeper.cli.options import Where, examples, where_options
from labkeeper.cli.output import is_terminal, print_json, put, styled, waiting
from labkeeper.core.errors import LabkeeperError, SettingsError, Unreachable
from labkeeper.terminal import visible_line

if TYPE_CHECKING:
    from labkeeper.core.spec import Gateway
    from labkeeper.doctor.case import Case
    from labkeeper.doctor.findings import Finding
    from labkeeper.settings.model import Settings

_MARKS: Final = {
    "ok": ("✓", "green"),
    "skipped": ("-", "bright_black"),
    "warning": ("!", "yellow"),
    "problem": ("✗", "red"),
}
"""The mark and the colour of each status; the word beside it says the same."""
_INDENT: Final = " " * 4


@click.command(
    epilog=examples(
        "labkeeper doctor",
        "labkeeper doctor --gateway http://gateway:8888",
        "labkeeper doctor --json | jq '.findings[] | select(.status == \"problem\")'",
    )
)
@click.option("--gateway", "gateway_url", metavar="URL", help="Also check this kernel gateway.")
@click.option(
    "--gateway-token-file",
    "token_file",
    type=click.File(encoding="utf-8"),
    metavar="FILE",
    help="File with the token of that gateway, `-` for stdin.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@where_options
@click.pass_obj
def doctor(
    where: Where, /, *, gateway_url: str | None, token_file: IO[str] | None, as_json: bool
) -> int:
    """Find out what is wrong, and what mends it.

    Run it on the keeper's machine, as its user and with its settings. It asks a running keeper;
    without one, it tries what `labkeeper serve` would need. It leaves nothing behind.

    The exit code is 1 if there is a problem; warnings do not count.
    """
    with loading():
        from labkeeper.doctor.examination import checks_of, examine  # noqa: PLC0415 - late

    found: list[Finding] = []
    group = ""
    with waiting("asking the keeper"):
        case = _case(where, _gateway(gateway_url, token_file))
    for check in checks_of(case):
        with waiting(check.doing):
            new = examine(case, check)
        found += new
        if new and not as_json:
            if check.group != group:
                put(("\n" if group else "") + styled(check.group, sys.stdout, bold=True))
                group = check.group
            for finding in new:
                _show(finding)
    if as_json:
        print_json({"status": _worst(found), "findings": [asdict(one) for one in found]})
    else:
        put("\n" + _summary(found))
    return 1 if _worst(found) == "problem" else 0


def _gateway(url: str | None, token_file: IO[str] | None) -> Gateway | None:
    """Return the gateway that the options name. Raises UsageError."""
    if url is None:
        if token_file is not None:
            raise click.UsageError("--gateway-token-file: only together with --gateway")
        return None
    from pydantic import ValidationError  # noqa: PLC0415 - late

    from labkeeper.schema.requests.gateway import GatewayFields  # noqa: PLC0415 - late

    token = {} if token_file is None else {"auth_token": token_file.read().strip()}
    try:
        return GatewayFields.model_validate({"url": url, **token}).at(url)
    except ValidationError as error:
        # Without the value, which may be the token.
        which = {"auth_token": "--gateway-token-file"}.get(str(error.errors()[0]["loc"][0]))
        raise click.UsageError(f"{which or '--gateway'}: {error.errors()[0]['msg']}") from None


def _case(where: Where, gateway: Gateway | None) -> Case:
    """Return what is to be examined; ask the keeper if one runs."""
    from importlib.metadata import version  # noqa: PLC0415 - late

    from labkeeper import scrub  # noqa: PLC0415 - late
    from labkeeper.doctor.asked import ask  # noqa: PLC0415 - late
    from labkeeper.doctor.case import Case  # noqa: PLC0415 - late
    from labkeeper.serve.policies import own_secrets  # noqa: PLC0415 - late
    from labkeeper.settings.location import keeper_url  # noqa: PLC0415 - late

    settings = read_settings(where)
    scrub.KEEPER.learn(lambda: own_secrets(settings, token_of(settings)))
    is_named = bool(where.url or keeper_url())
    is_here, answers, why, mend = True, None, "", ""
    try:
        with connected(where) as (client, is_here):
            answers = ask(client)
    except Unreachable as error:
        if is_named:
            why = error.message.rpartition("; ")[0]
            mend = "labkeeper serve" if is_here else "start the keeper on its machine"
        else:
            why = f"none runs on {settings.state_dir}: what one would need is checked"
    except SettingsError:
        raise
    except LabkeeperError as error:
        why, mend = error.message, _as_owner(settings)
    return Case(settings, version("labkeeper"), is_here, answers, why, mend, gateway)


def _as_owner(settings: Settings) -> str:
    """Return the command that runs this as the user to whom the state directory belongs."""
    try:
        owner = settings.state_dir.owner()
    except (OSError, KeyError):
        return "run this command as the keeper's user, with its settings"
    return f"sudo -u {shlex.quote(owner)} labkeeper doctor"


def _show(finding: Finding) -> None:
    """Print a finding: in lines that can be searched, and at a terminal with marks and colours."""
    mark, colour = _MARKS[finding.status]
    word = f"{finding.status:7}"
    if is_terminal(sys.stdout):
        word = styled(f"{mark} {word}", sys.stdout, fg=colour)
    put(f"  {word}  {finding.subject}: {visible_line(finding.message)}")
    for line in finding.details:
        put(f"{_INDENT}| {visible_line(line)}")
    if finding.mend is not None:
        put(f"{_INDENT}mend: {visible_line(finding.mend)}")


def _worst(findings: Sequence[Finding]) -> str:
    """Return the status of everything."""
    found = {finding.status for finding in findings}
    return next((status for status in ("problem", "warning") if status in found), "ok")


def _summary(findings: Sequence[Finding]) -> str:
    counts = [
        f"{count} {status}{'' if count == 1 else 's'}"
        for status in ("problem", "warning")
        if (count := sum(finding.status == status for finding in findings))
    ]
    return ", ".join(counts) or "nothing is wrong"
