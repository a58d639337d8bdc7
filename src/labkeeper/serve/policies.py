"""Policies, limits and waiting times, and the options of the backend, as the settings have them."""

from __future__ import annotations

from typing import Final

from labkeeper.api.services import SettingInForce
from labkeeper.backends.local.options import LocalOptions
from labkeeper.backends.local.paths import Paths
from labkeeper.core.culling import CullPolicy, Terminals
from labkeeper.core.policy import Policy
from labkeeper.core.ports import Reserve
from labkeeper.core.spec import Limits
from labkeeper.lab_addresses import LabAddresses
from labkeeper.schema.requests.servers import Defaults
from labkeeper.settings.location import PREFIX
from labkeeper.settings.model import SECRETS, Settings, Source

_MARGIN: Final = 5.0
"""Seconds."""
_SECRET_WORDS: Final = ("password", "secret", "token")
"""What the names of settings contain that are not shown, nor where they can be read."""


def policy(chosen: Settings) -> Policy:
    """Return the numbers that apply to every server."""
    return Policy(
        start_timeout=chosen.start_timeout,
        stop_grace=chosen.stop_grace,
        kill_wait=chosen.kill_wait,
        probe_period=chosen.probe_period,
        hung_after=chosen.hung_after,
        max_servers=chosen.max_servers,
        max_starts=chosen.max_starts,
        min_free=_min_free(chosen),
    )


def cull_policy(chosen: Settings) -> CullPolicy:
    """Return the culling policy for all servers."""
    return CullPolicy(
        grace=chosen.cull_grace,
        warning=chosen.cull_warning,
        cull_busy=chosen.cull_busy,
        cull_connected=chosen.cull_connected,
        terminals=Terminals(chosen.cull_terminals),
        kernel_idle_timeout=chosen.kernel_idle_timeout or None,
    )


def lab_addresses(chosen: Settings) -> LabAddresses:
    """Return where the edge serves Labs."""
    if chosen.edge == "off":
        return LabAddresses()
    domain = chosen.lab_domain or ""
    return LabAddresses(chosen.lab_address or ("host" if domain else "path"), domain)


def hosts(chosen: Settings) -> list[str]:
    """Return the host names at which keeper and edge answer, beyond those always safe."""
    domain = chosen.lab_domain
    # The bare name has the API.
    labs = [] if domain is None else [domain, f"*.{domain}"]
    return [*chosen.allowed_hosts, *filter(None, [chosen.advertised_host]), *labs]


def limits(chosen: Settings) -> Limits:
    """Return the default limits of servers."""
    return Limits(memory=chosen.memory_limit, cpus=chosen.cpu_limit, processes=chosen.process_limit)


def defaults(chosen: Settings) -> Defaults:
    """Return what holds for servers whose requests do not say otherwise."""
    return Defaults(
        chosen.lab_ip,
        chosen.lab_port,
        limits(chosen),
        chosen.idle_timeout,
        chosen.max_age,
        chosen.sleep_after,
        lab_addresses(chosen).mode != "port",
        chosen.user,
        chosen.kernels_by,
    )


def local_options(chosen: Settings) -> LocalOptions:
    """Return what all servers have in common, but for what their edge shares with them."""
    return LocalOptions(
        python=chosen.jupyter_python,
        runtime_dir=chosen.server_dirs,
        log_dir=chosen.state_dir / "logs",
        launch_by=chosen.launch_by,
        kernels_by=chosen.kernels_by,
        preload=chosen.preload,
        umask=int(chosen.umask, 8),
        log_max_bytes=chosen.log_max_bytes,
        echo_logs=chosen.echo_logs,
        base_path=lab_addresses(chosen).base_path,
        certificate=chosen.lab_certificate,
    )


def paths(chosen: Settings) -> Paths:
    """Return the directories and files that requests may name."""
    return Paths(chosen.notebook_dir, chosen.allowed_roots or ())


def own_secrets(chosen: Settings, token: str | None) -> list[str]:
    """Return the keeper's secrets; the URL of a webhook is often a secret by itself."""
    set_ = (
        secret.get_secret_value()
        for secret in (chosen.webhook_url, chosen.webhook_secret)
        if secret is not None
    )
    return [*set_, *([] if token is None else [token])]


def settings_in_force(chosen: Settings) -> list[SettingInForce]:
    """Return all settings as people may see them: without secrets."""
    return [_in_force(chosen, name) for name in Settings.model_fields]


def _in_force(chosen: Settings, name: str) -> SettingInForce:
    variable, source = f"{PREFIX}{name.upper()}", chosen.source_of(name)
    value = _as_text(name, getattr(chosen, name))
    if name in SECRETS and getattr(chosen, f"{name}_file", None) is not None:
        return SettingInForce(variable, value, f"file named by {variable}_FILE")
    return SettingInForce(variable, value, source, is_default=source is Source.DEFAULT)


def _as_text(name: str, value: object) -> str:
    if value is None or value == ():
        return "not set"
    if name in SECRETS or any(word in name for word in _SECRET_WORDS):
        return "set"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def longest_stop(chosen: Settings) -> float:
    """Return the seconds to wait for the end of a server: more than the sum of all timers."""
    return chosen.stop_grace + chosen.kill_wait + _MARGIN


def _min_free(chosen: Settings) -> Reserve:
    if chosen.min_free_memory.endswith("%"):
        return Reserve(share=float(chosen.min_free_memory[:-1]) / 100)
    return Reserve(amount=int(chosen.min_free_memory))
