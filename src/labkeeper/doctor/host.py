"""Checks of the machine: control groups, users, descriptors, and the clock."""

from __future__ import annotations

import os
import pwd
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from labkeeper.backends.local.accounts import check_passage, find_user
from labkeeper.backends.local.hierarchies import LimitedBy, why_not_version_2
from labkeeper.backends.local.limits import ControlGroups
from labkeeper.core.errors import BackendRefused, InvalidSpec
from labkeeper.core.spec import Gateway, Limits, QualifiedName, ServerSpec
from labkeeper.doctor.case import Case, default_spec
from labkeeper.doctor.findings import Finding, ok, problem, setting, skipped, warning
from labkeeper.gateways.client import GatewayClient
from labkeeper.runtime import SystemClock
from labkeeper.schema.requests.gateway import ws_url_of
from labkeeper.serve.process import DESCRIPTORS

_TRIAL: Final = QualifiedName(".doctor")
"""A name of control groups that no server can have."""
_LIMITS: Final = Limits(memory=2**30, cpus=1.0, processes=1000)
_SYSTEMD: Final = Path("/run/systemd/system")
"""Exists if systemd is process 1 (sd_booted(3))."""
_FIRST_PERSON: Final = 1000
"""The lowest user id of people, by the convention of Linux distributions."""
_NOBODY: Final = 65534
_ALLOWED_SKEW: Final = 30.0
"""Seconds by which clocks may differ: one-time links live a minute, identity headers 90 s."""
_MOST_CLOCKS: Final = 3


def control_groups(case: Case) -> Iterator[Finding]:
    """What enforces limits: as a running keeper says of its servers, or else by a trial."""
    if case.keeper is not None:
        yield from _groups_of_servers(case)
    elif sys.platform != "linux":
        yield skipped("control groups", f"they need Linux, and this is {sys.platform}")
    else:
        by = _tried(own_user=case.settings.user is not None)
        yield _groups(by, why_not_version_2())


def _tried(*, own_user: bool) -> dict[str, LimitedBy]:
    """Create the groups of a server with all limits, and remove them; return what enforces each."""
    with tempfile.TemporaryDirectory(prefix="labkeeper-doctor-") as place:
        groups = ControlGroups(Path(place))
        try:
            return dict(groups.limit(_TRIAL, _LIMITS, own_user=own_user).by)
        finally:
            groups.remove(_TRIAL)


def _groups(by: dict[str, LimitedBy], why_not: str) -> Finding:
    """Return the finding on what would enforce the limits of a server."""
    found = ", ".join(f"{limit} by {how}" for limit, how in by.items())
    weak = [limit for limit, how in by.items() if how in {LimitedBy.RLIMIT, LimitedBy.NOTHING}]
    if not weak:
        return ok("control groups", f"limits are enforced: {found}")
    why = f"limits of {' and '.join(weak)} are not enforced by control groups: {found}"
    return warning("control groups", why, _delegate(), [why_not] if why_not else [])


def _groups_of_servers(case: Case) -> Iterator[Finding]:
    """Say what enforces the limits of running servers."""
    found = [
        (server.name, limit, of.limited_by)
        for server in (case.keeper.servers if case.keeper else ())
        for limit, of in server.limits.items()
        if of.limited_by
    ]
    if not found:
        yield skipped("control groups", "no server with limits runs that would show it")
        return
    details = [f"{name}: {limit} by {by}" for name, limit, by in found]
    if weak := sorted({name for name, _, by in found if by == LimitedBy.NOTHING}):
        why = f"limits are not enforced for {', '.join(weak)}"
        yield warning("control groups", why, _delegate(), details)
    else:
        yield ok("control groups", "the limits of all servers are enforced", details)


def _delegate() -> str:
    """Return what gives a keeper a control group that it can divide."""
    if not _SYSTEMD.is_dir():
        return "limit the container, or the user, that the keeper runs in instead"
    for_user = "" if os.geteuid() == 0 else "--user "
    return f"systemd-run {for_user}--scope -p Delegate=yes labkeeper serve"


def users(case: Case) -> Iterator[Finding]:
    """Whether servers can be started as the users that the settings name."""
    own = _own_name()
    try:
        spec = default_spec(case.settings)
    except InvalidSpec:
        yield skipped("users", "the notebook directory cannot be used")
        return
    try:
        account = find_user(spec)
    except BackendRefused as error:
        is_unknown = os.geteuid() == 0
        mend = f"useradd --create-home {spec.user}" if is_unknown else _as_root()
        yield problem("users", _why(error), mend)
        return
    if account is not None:
        yield from _other_user(case, spec)
    elif os.geteuid() == 0:
        yield warning(
            "users",
            "servers whose request names no user run as root",
            _ordinary_user(),
        )
    else:
        yield ok("users", f"servers run as {own}; a keeper of root could start them as others")


def _other_user(case: Case, spec: ServerSpec) -> Iterator[Finding]:
    """Whether another user reaches the directories of servers."""
    try:
        check_passage(spec, _existing(case.settings.server_dirs / "server"))
    except BackendRefused as error:
        yield problem("users", _why(error), setting("runtime_dir", "/run/labkeeper"))
    else:
        yield ok("users", f"servers run as {spec.user} if their request names no other user")


def _existing(path: Path) -> Path:
    """Return a path of which the directory above exists: the others are created passable."""
    while not path.parent.exists():
        path = path.parent
    return path


def _why(error: BackendRefused) -> str:
    """Return an error without the server that it names: no start was asked for."""
    return error.message.partition(": ")[2].partition("; ")[0]


def _as_root() -> str:
    return "sudo labkeeper serve"


def _ordinary_user() -> str:
    """Return the command that has servers run as a person who exists, or as a new user."""
    people = sorted(
        (entry.pw_uid, entry.pw_name)
        for entry in pwd.getpwall()
        if _FIRST_PERSON <= entry.pw_uid < _NOBODY
    )
    if people:
        return setting("user", people[0][1])
    return f"useradd --create-home lab && {setting('user', 'lab')}"


def _own_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # In a container with a numeric user.
        return f"user {os.geteuid()}"


def descriptors(_: Case) -> Iterator[Finding]:
    """Whether a keeper may open as many files as it wants."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= DESCRIPTORS:
        yield ok("descriptors", f"a keeper may open {DESCRIPTORS} files")
    else:
        yield warning(
            "descriptors",
            f"a keeper may open {hard} files, and wants {DESCRIPTORS}: "
            "each connection, log and server needs some",
            f"sudo prlimit --pid $$ --nofile={DESCRIPTORS}",
        )


def clock(case: Case) -> Iterator[Finding]:
    """Whether the clock agrees with those of gateways, and with the files of the keeper."""
    now, newest = time.time(), _newest(case.settings.state_dir)
    if newest > now + _ALLOWED_SKEW:
        then = datetime.fromtimestamp(newest, UTC)
        yield problem(
            "clock",
            f"it is behind: a file in the state directory was written at {then:%Y-%m-%d %H:%M} UTC",
            _SET_CLOCK,
        )
        return
    compared = []
    for gateway in _gateways(case):
        ahead = GatewayClient(SystemClock(), timeout=case.settings.gateway_timeout).clock_of(
            gateway
        )
        if ahead is None:
            continue
        if abs(ahead) > _ALLOWED_SKEW:
            side = "behind" if ahead > 0 else "ahead of"
            why = f"it is {abs(ahead):.0f} s {side} that of the gateway {gateway.url}"
            yield warning("clock", why, _SET_CLOCK)
            return
        compared.append(gateway.url)
    with_whom = f", as that of {', '.join(compared)}" if compared else ""
    yield ok("clock", f"{datetime.fromtimestamp(now, UTC):%Y-%m-%d %H:%M:%S} UTC{with_whom}")


_SET_CLOCK: Final = "sudo timedatectl set-ntp true"


def _gateways(case: Case) -> list[Gateway]:
    """Return the gateways whose clocks are compared: without their tokens, which they need not."""
    servers = case.keeper.servers if case.keeper else ()
    urls = dict.fromkeys(server.gateway.url for server in servers if server.gateway)
    known = [Gateway(url, ws_url_of(url)) for url in urls]
    return [*([case.gateway] if case.gateway else []), *known][:_MOST_CLOCKS]


def _newest(state_dir: Path) -> float:
    """Return when a file in the state directory was last written, in seconds since the epoch."""
    try:
        return max((path.stat().st_mtime for path in state_dir.iterdir()), default=0.0)
    except OSError:
        return 0.0
