"""All checks, in order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from labkeeper import logs, scrub
from labkeeper.backends.local.hierarchies import restored
from labkeeper.core.errors import LabkeeperError, SettingsError
from labkeeper.doctor import asked, certificates, host, jupyter, network, storage
from labkeeper.doctor.case import Case
from labkeeper.doctor.findings import Finding, ok, problem, setting, warning
from labkeeper.scrub import Secrets, of_gateway
from labkeeper.serve import consistency
from labkeeper.settings.sources import unknown_variables


@dataclass(frozen=True, slots=True)
class Check:
    """A check of one subject."""

    group: str
    doing: str
    """What is being done, for people who wait."""
    look: Callable[[Case], Iterator[Finding]]
    anywhere: bool = False
    """Whether it also makes sense for a keeper on another machine."""


def settings(case: Case) -> Iterator[Finding]:
    """Whether the settings fit together, and all variables are settings; each was valid."""
    try:
        consistency.check(case.settings)
    except SettingsError as error:
        yield problem("settings", error.message, "correct that setting")
    for name in unknown_variables():
        why = f"{name} is no setting, and has no effect"
        yield warning("settings", why, f"unset {name}")
    if case.settings.auth == "none":
        yield warning(
            "settings",
            f"access control is off: whoever reaches {case.settings.host} port "
            f"{case.settings.port} can run code as this user",
            setting("auth", "token"),
        )
    yield ok("settings", f"state directory {case.settings.state_dir}")


CHECKS: Final = (
    Check("Keeper", "asking the keeper", asked.keeper, anywhere=True),
    Check("Keeper", "checking the settings", settings),
    Check("Keeper", "asking for its watchers", asked.watchers, anywhere=True),
    Check("Keeper", "asking for servers", asked.servers, anywhere=True),
    Check("Jupyter", "running the interpreter", jupyter.interpreter),
    Check("Jupyter", "importing JupyterLab", jupyter.jupyterlab),
    Check("Jupyter", "loading a fork server", jupyter.forkserver),
    Check("Jupyter", "asking for kernels", asked.kernels, anywhere=True),
    Check("Jupyter", "asking for libraries", asked.libraries, anywhere=True),
    Check("Machine", "looking at the state directory", storage.state_directory),
    Check("Machine", "looking at the notebook directory", storage.notebook_directory),
    Check("Machine", "looking at the disk", storage.disk),
    Check("Machine", "looking at users", host.users),
    Check("Machine", "trying control groups", host.control_groups),
    Check("Machine", "looking at limits", host.descriptors),
    Check("Machine", "comparing clocks", host.clock),
    Check("Network", "trying ports", network.ports),
    Check("Network", "reading certificates", certificates.tls),
    Check("Network", "trying the edge", network.edge),
    Check("Network", "asking gateways", network.gateway, anywhere=True),
)


def checks_of(case: Case) -> list[Check]:
    """Return the checks that a case allows: of a keeper elsewhere, the machine is not at hand."""
    return [check for check in CHECKS if case.is_here or check.anywhere]


def examine(case: Case, check: Check) -> list[Finding]:
    """Return what a check finds, without secrets."""
    # As a keeper does: what is created on trial is private.
    before = os.umask(0o077)
    try:
        with logs.silent(), restored():
            found = list(check.look(case))
    except (OSError, LabkeeperError) as error:
        why = f"a check cannot be made while {check.doing}: {error}"
        found = [warning(check.group.lower(), why, "remove that cause, and try again")]
    finally:
        os.umask(before)
    return [_without_secrets(case, finding) for finding in found]


def _without_secrets(case: Case, finding: Finding) -> Finding:
    own = [] if case.gateway is None else [Secrets(*of_gateway(case.gateway))]

    def clean(text: str) -> str:
        return scrub.scrub(text, scrub.KEEPER, *own)

    return replace(
        finding,
        message=clean(finding.message),
        mend=finding.mend and clean(finding.mend),
        details=tuple(map(clean, finding.details)),
    )
