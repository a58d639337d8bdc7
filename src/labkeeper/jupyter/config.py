"""Configuration of a Jupyter server: traits and environment of one launch.

Sources: jupyter_server 2.x (`serverapp.py`, `gateway/gateway_client.py`) and JupyterLab 4.x
(`labapp.py`), read and run.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from labkeeper.core.spec import KERNEL_PREFIX, Gateway, ServerSpec

PRIVATE_VARIABLES: Final = re.compile(
    r"^(LABKEEPER_|JUPYTER_TOKEN|JUPYTER_GATEWAY_|JUPYTER_RUNTIME_DIR$|JUPYTERHUB_|JPY_"
    r"|INVOCATION_ID$|JOURNAL_STREAM$|NOTIFY_SOCKET$|WATCHDOG_|LISTEN_|SYSTEMD_|MEMORY_PRESSURE_"
    r"|(CACHE|CONFIGURATION|CREDENTIALS|LOGS|RUNTIME|STATE)_DIRECTORY$)"
)
"""Variables of the keeper that a server must not inherit.

The keeper's own, those that would configure Jupyter against the spec, and those by which systemd
addresses one service process.
"""


_LAUNCH_PAD: Final = 2.0
"""Jupyter raises a gateway's request timeout to KERNEL_LAUNCH_TIMEOUT plus this many seconds."""


def base_config() -> dict[str, dict[str, Any]]:
    """Return the configuration common to all servers, by section."""
    return {
        # The default manager builds an SSL context at each start, and lets users install packages
        # from the Lab.
        "LabApp": {"extension_manager": "readonly"},
        # Jupyter's silent search for another port would break every promise about it.
        "ServerApp": {"allow_root": True, "open_browser": False, "port_retries": 0},
    }


def launch_config(
    spec: ServerSpec,
    *,
    token: str,
    port: int,
    ca_bundle: Path | None,
    base_path: str = "",
    behind_edge: bool = False,
    certificate: tuple[Path, Path] | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the configuration of one launch, by section. It holds secrets.

    It takes precedence over all configuration files, and the keeper's own values over the requested
    options. With a `base_path`, such as `/servers/`, the server is below that path and its name.
    Behind the edge it answers to any host name. With a certificate and key the server uses TLS;
    Tornado reads the files at each connection, so renewed ones take effect at once.
    """
    sections = _sections(spec.jupyter_options)
    for section, values in base_config().items():
        sections[section].update(values)
    sections["IdentityProvider"] = {"token": token}
    sections["LabApp"]["default_url"] = spec.default_url
    sections["ServerApp"].update(
        ip=spec.ip,
        port=port,
        root_dir=spec.root_dir,
        base_url=base_url(spec, base_path),
        default_url=spec.default_url,
    )
    if behind_edge:
        # The edge passes on the host name that its client used.
        sections["ServerApp"]["allow_remote_access"] = True
    if certificate is not None:
        sections["ServerApp"].update(certfile=str(certificate[0]), keyfile=str(certificate[1]))
    if spec.gateway is not None:
        sections["GatewayClient"] = _gateway_settings(spec.gateway, spec.kernel_env, ca_bundle)
    return dict(sections)


def base_url(spec: ServerSpec, base_path: str) -> str:
    """Return the base_url of a server that is below `base_path` and its name, if there is one."""
    if not base_path:
        return spec.base_url
    return f"{base_path}{spec.qualified_name}/{spec.base_url.lstrip('/')}"


def _sections(options: Mapping[str, Any]) -> defaultdict[str, dict[str, Any]]:
    sections: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for name, value in options.items():
        section, _, trait = name.partition(".")
        sections[section][trait] = value
    return sections


def _gateway_settings(
    gateway: Gateway, kernel_env: Mapping[str, str], ca_bundle: Path | None
) -> dict[str, Any]:
    chosen = {
        "url": gateway.url,
        "ws_url": gateway.ws_url,
        "auth_token": gateway.auth_token,
        "auth_scheme": gateway.auth_scheme,
        "headers": json.dumps(dict(gateway.headers)),
        "ca_certs": str(ca_bundle) if ca_bundle else None,
        "client_cert": gateway.client_cert,
        "client_key": gateway.client_key,
        "validate_cert": gateway.validate_cert,
        # Variables with names that begin with KERNEL_ are sent anyway.
        "allowed_envs": ",".join(name for name in kernel_env if not name.startswith(KERNEL_PREFIX))
        or None,
        "connect_timeout": gateway.connect_timeout,
        "request_timeout": gateway.request_timeout,
    }
    return {name: value for name, value in chosen.items() if value is not None}


def base_environment(own: Mapping[str, str]) -> dict[str, str]:
    """Return the environment common to all servers: the keeper's own without private variables."""
    return {name: value for name, value in own.items() if not PRIVATE_VARIABLES.match(name)}


def launch_environment(
    spec: ServerSpec, own: Mapping[str, str], *, runtime_dir: Path, ca_bundle: Path | None
) -> dict[str, str]:
    """Return the environment of one launch, from the keeper's own and the spec's."""
    env = {**base_environment(own), **spec.env}
    env["JUPYTER_RUNTIME_DIR"] = str(runtime_dir)
    if ca_bundle is not None:
        # Jupyter uses `ca_certs` only with a client certificate; OpenSSL's variable works without
        # one.
        env["SSL_CERT_FILE"] = str(ca_bundle)
    if spec.gateway is not None and spec.gateway.request_timeout is not None:
        # Jupyter would raise a shorter request timeout to its launch timeout of 40 s.
        env["KERNEL_LAUNCH_TIMEOUT"] = str(max(1, int(spec.gateway.request_timeout - _LAUNCH_PAD)))
    return env
