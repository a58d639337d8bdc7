"""What we know of Jupyter: how it is configured, what it tells of itself, how it is asked to end.

Knows nothing of keepers, states or processes. Sources of the rules: jupyter_server 2.x (`serverapp.py`, `services/`,
`gateway/gateway_client.py`) and JupyterLab 4.x (`labapp.py`), read and run.
"""

from __future__ import annotations

import http.client
import json
import re
import ssl
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from labkeeper import addresses, shortage
from labkeeper.core.errors import BackendTimeout, BackendUnavailable
from labkeeper.core.server import Activity, Endpoint, Exit, FailureClass, Kernel, KernelUse, Load, OwnKernel, Session, TerminalUse
from labkeeper.core.spec import KERNEL_PREFIX, Gateway, ServerSpec
from labkeeper.exchange import Answer, exchange
from labkeeper.files import read_foreign

PRIVATE_VARIABLES: Final = re.compile(
    r"^(LABKEEPER_|JUPYTER_TOKEN|JUPYTER_GATEWAY_|JUPYTER_RUNTIME_DIR$|JUPYTERHUB_|JPY_"
    r"|INVOCATION_ID$|JOURNAL_STREAM$|NOTIFY_SOCKET$|WATCHDOG_|LISTEN_|SYSTEMD_|MEMORY_PRESSURE_"
    r"|(CACHE|CONFIGURATION|CREDENTIALS|LOGS|RUNTIME|STATE)_DIRECTORY$)"
)
"""Variables of the keeper's own environment that a server must not inherit: ours, those that would configure Jupyter against the
spec, and those by which systemd speaks to one service process."""
_LOOK_TIMEOUT: Final = 1.0
"""Seconds for a look at whether a server answers; what is to end it may wait behind it, so it is shorter than any grace."""
_END_KERNEL_TIMEOUT: Final = 10.0
"""Seconds for a kernel to end; Jupyter gives one that does not listen five."""
_LAUNCH_PAD: Final = 2.0
"""Jupyter raises a gateway's request timeout to KERNEL_LAUNCH_TIMEOUT plus this many seconds."""


def base_config() -> dict[str, dict[str, Any]]:
    """Give the configuration that all servers have in common, by section."""
    return {
        # The other one builds an SSL context at each start, and lets users install packages from the Lab.
        "LabApp": {"extension_manager": "readonly"},
        # A port is taken or not: Jupyter's silent search for another one would break every promise about it.
        "ServerApp": {"allow_root": True, "open_browser": False, "port_retries": 0},
    }


def config(
    spec: ServerSpec, *, token: str, port: int, ca_bundle: Path | None, certificate: tuple[Path, Path] | None = None
) -> dict[str, dict[str, Any]]:
    """Give the configuration of one launch, by section: above every file of the user and the site. It holds secrets.

    What is ours to say goes over the options that were asked for. With a certificate and its key the server speaks TLS; Tornado
    reads the files at each connection, so new ones count at once.
    """
    sections = _sections(spec.jupyter_options)
    for section, values in base_config().items():
        sections[section].update(values)
    sections["IdentityProvider"] = {"token": token}
    sections["LabApp"]["default_url"] = spec.default_url
    sections["ServerApp"].update(
        ip=spec.ip, port=port, root_dir=spec.root_dir, base_url=spec.base_url, default_url=spec.default_url
    )
    if certificate is not None:
        sections["ServerApp"].update(certfile=str(certificate[0]), keyfile=str(certificate[1]))
    if spec.gateway is not None:
        sections["GatewayClient"] = _gateway_settings(spec.gateway, spec.kernel_env, ca_bundle)
    return dict(sections)


def _sections(options: Mapping[str, Any]) -> defaultdict[str, dict[str, Any]]:
    sections: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for name, value in options.items():
        section, _, trait = name.partition(".")
        sections[section][trait] = value
    return sections


def _gateway_settings(gateway: Gateway, kernel_env: Mapping[str, str], ca_bundle: Path | None) -> dict[str, Any]:
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
        # Those whose names begin with KERNEL_ are sent anyway.
        "allowed_envs": ",".join(name for name in kernel_env if not name.startswith(KERNEL_PREFIX)) or None,
        "connect_timeout": gateway.connect_timeout,
        "request_timeout": gateway.request_timeout,
    }
    return {name: value for name, value in chosen.items() if value is not None}


def base_environment(own: Mapping[str, str]) -> dict[str, str]:
    """Make the environment that all servers have in common: our own, without what is private."""
    return {name: value for name, value in own.items() if not PRIVATE_VARIABLES.match(name)}


def environment(spec: ServerSpec, own: Mapping[str, str], *, runtime_dir: Path, ca_bundle: Path | None) -> dict[str, str]:
    """Make the environment of one launch from our own and the spec's."""
    env = {**base_environment(own), **spec.env}
    env["JUPYTER_RUNTIME_DIR"] = str(runtime_dir)
    if ca_bundle is not None:
        # Jupyter hands `ca_certs` on only beside a client certificate; OpenSSL's own variable works without one.
        env["SSL_CERT_FILE"] = str(ca_bundle)
    if spec.gateway is not None and spec.gateway.request_timeout is not None:
        # Jupyter would raise a shorter request timeout to its launch timeout of 40 s.
        env["KERNEL_LAUNCH_TIMEOUT"] = str(max(1, int(spec.gateway.request_timeout - _LAUNCH_PAD)))
    return env


class _Info(BaseModel):
    """`jpserver-PID.json` (jupyter_server's `server_info`)."""

    model_config = ConfigDict(extra="ignore")

    base_url: str
    hostname: str
    password: bool
    pid: int
    port: int
    root_dir: str
    secure: bool
    token: str
    version: str = Field("", max_length=64)


def info_path(runtime_dir: Path, pid: int) -> Path:
    """Say where the server of this pid writes its server_info; it removes the file when it ends in good order."""
    return runtime_dir / f"jpserver-{pid}.json"


def read_info(runtime_dir: Path, pid: int) -> Endpoint | None:
    """Read the server_info of a process; None as long as it has written none, or only half of it."""
    try:
        return endpoint_of(json.loads(read_foreign(info_path(runtime_dir, pid))), pid)
    except (OSError, ValueError, RecursionError):
        return None


def endpoint_of(server_info: Any, pid: int) -> Endpoint | None:
    """Read what a process says of itself, in the form of a server_info; None where that is none of its."""
    try:
        info = _Info.model_validate(server_info)
    except ValidationError:
        return None
    if info.pid != pid:
        return None
    return with_url(
        Endpoint(
            base_url=info.base_url,
            hostname=info.hostname,
            notebook_dir=info.root_dir,
            password=info.password,
            pid=info.pid,
            port=info.port,
            secure=info.secure,
            token=info.token,
            url="",
            version=info.version,
        )
    )


def with_url(endpoint: Endpoint, **told: Any) -> Endpoint:
    """Give an endpoint with what is told better, and the URL that follows from it all."""
    better = replace(endpoint, **told)
    return replace(better, url=url_of(better, better.hostname or "localhost"))


_KernelId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class _SessionRecord(BaseModel):
    model_config = ConfigDict(defer_build=True)

    path: str
    name: str
    type: str
    kernel_id: str


class _KernelsRecord(BaseModel):
    """`kernels.json`, as `standalone/kernels.py` writes it; the user of the server can write it, too."""

    model_config = ConfigDict(defer_build=True)

    kernels: list[_KernelId]
    starting: list[_KernelId]
    sessions: list[_SessionRecord]


_MOST_KERNELS: Final = 500
"""Kernels of one server that are believed: each may become a debt, which is kept with all that its gateway is asked with."""


def read_kernels(path: Path) -> tuple[OwnKernel, ...]:
    """Read which kernels a server has written down to have, the first 500; none when it has written nothing that can be read."""
    try:
        found = _KernelsRecord.model_validate_json(read_foreign(path))
    except (OSError, ValidationError):
        return ()
    sessions = found.sessions[:_MOST_KERNELS]
    there = (
        OwnKernel(id_, tuple(Session(s.path, s.name, s.type) for s in sessions if s.kernel_id == id_))
        for id_ in dict.fromkeys(found.kernels[:_MOST_KERNELS])
    )
    return (*there, *(OwnKernel(id_, starting=True) for id_ in found.starting))[:_MOST_KERNELS]


class _KernelModel(BaseModel):
    model_config = ConfigDict(extra="ignore")

    id: str
    name: str
    execution_state: str = "unknown"
    last_activity: str = ""
    connections: int = 0


class _TerminalModel(BaseModel):
    model_config = ConfigDict(extra="ignore")

    name: str
    last_activity: str = ""


class _StatusModel(BaseModel):
    model_config = ConfigDict(extra="ignore")

    last_activity: str
    kernels: int
    connections: int


_LAZY: Final = ConfigDict(defer_build=True)
_KERNELS: Final = TypeAdapter(list[_KernelModel], config=_LAZY)
_TERMINALS: Final = TypeAdapter(list[_TerminalModel], config=_LAZY)
_STATUS: Final = TypeAdapter(_StatusModel)
_UNTRACKED: Final = "?no_track_activity=1"
"""With this a question is no activity."""


class JupyterClient:
    """Speaks to running servers over loopback or the address that they listen on. Thread-safe."""

    def __init__(self, *, timeout: float = 3.0) -> None:
        self._timeout = timeout

    def answers(self, endpoint: Endpoint) -> bool | None:
        """Whether it is alive, None where we could not ask: `GET api` needs no token and touches no gateway."""
        with _connection(endpoint) as connection:
            return _ok(connection, endpoint, "api", {})

    def proves(self, endpoint: Endpoint) -> bool:
        """Whether it is alive and knows its token: `GET api/me` needs one, and touches no gateway either."""
        with _connection(endpoint) as connection:
            known = {"Authorization": f"token {endpoint.token}"}
            return bool(_ok(connection, endpoint, "api", {}) and _ok(connection, endpoint, "api/me", known))

    def kernels(self, endpoint: Endpoint) -> list[Kernel]:
        """List its kernels, without counting as activity. Raises BackendUnavailable, BackendTimeout."""
        with _failing(f"cannot list the kernels of the server on port {endpoint.port}"):
            found = _KERNELS.validate_json(self._told(endpoint, "api/kernels"))
        return [Kernel(k.id, k.name, k.execution_state, k.last_activity) for k in found]

    def load(self, endpoint: Endpoint) -> Load:
        """Say how many kernels and connections it has: `GET api/status`, which is no activity, and may wait for a gateway."""
        with _failing(f"cannot ask the server on port {endpoint.port} for its kernels and connections"):
            status = _STATUS.validate_json(self._told(endpoint, "api/status"))
        return Load(status.kernels, status.connections)

    def activity(self, endpoint: Endpoint) -> Activity:
        """Ask how it is used, without counting as use. Raises BackendUnavailable, BackendTimeout."""
        with _failing(f"cannot ask the server on port {endpoint.port} how it is used"):
            status = _STATUS.validate_json(self._told(endpoint, "api/status"))
            kernels = _KERNELS.validate_json(self._told(endpoint, "api/kernels")) if status.kernels else []
            # A server without terminals has no such page.
            terminals = _TERMINALS.validate_json(self._told(endpoint, "api/terminals", absent=b"[]"))
        return Activity(
            _epoch(status.last_activity),
            tuple(KernelUse(k.id, k.execution_state, _epoch(k.last_activity), k.connections) for k in kernels),
            tuple(TerminalUse(t.name, _epoch(t.last_activity)) for t in terminals),
        )

    def end_kernel(self, endpoint: Endpoint, kernel_id: str) -> None:
        """End one of its kernels, without counting as use. Raises BackendUnavailable, BackendTimeout."""
        with _failing(f"cannot end kernel {kernel_id} of the server on port {endpoint.port}"):
            path = f"api/kernels/{kernel_id}{_UNTRACKED}"
            answer = self._ask("DELETE", endpoint, path, timeout=_END_KERNEL_TIMEOUT)
            if answer.status not in {http.client.NO_CONTENT, http.client.NOT_FOUND}:
                raise BackendUnavailable(f"it answered {answer.status}")

    def shutdown(self, endpoint: Endpoint, *, timeout: float) -> bool:
        """Ask it to end with its kernels; it answers when that is done. Says whether it did."""
        try:
            answer = self._ask("POST", endpoint, "api/shutdown", timeout=timeout)
        except (OSError, http.client.HTTPException):
            return False
        return answer.status == http.client.OK

    def take_over(self, endpoint: Endpoint, kernel: OwnKernel) -> None:
        """Give it a kernel that runs on its gateway already, with its sessions. Raises BackendUnavailable, BackendTimeout."""
        asked: list[tuple[str, dict[str, Any]]] = [("api/kernels", {"kernel_id": kernel.id})]
        asked += [("api/sessions", {**asdict(session), "kernel": {"id": kernel.id}}) for session in kernel.sessions]
        what = f"the server on port {endpoint.port} cannot take over kernel {kernel.id}"
        for path, body in asked:
            try:
                answer = self._ask("POST", endpoint, path, body=body)
            except TimeoutError as error:
                raise BackendTimeout(f"{what}: it did not answer in time") from error
            except (OSError, http.client.HTTPException) as error:
                raise BackendUnavailable(f"{what}: {type(error).__name__}") from error
            if answer.status != http.client.CREATED:
                raise BackendUnavailable(f"{what}: it answered {answer.status}")

    def _told(self, endpoint: Endpoint, path: str, *, absent: bytes | None = None) -> bytes:
        """Give what a page says, or `absent` where there is no such page. Raises as `_ask` does, and BackendUnavailable."""
        answer = self._ask("GET", endpoint, path + _UNTRACKED)
        if answer.status == http.client.NOT_FOUND and absent is not None:
            return absent
        if answer.status != http.client.OK:
            because = "its gateway is not reachable" if answer.status == http.client.SERVICE_UNAVAILABLE else ""
            raise BackendUnavailable(f"it answered {answer.status} {because}".rstrip())
        return answer.body

    def _ask(self, method: str, endpoint: Endpoint, path: str, *, timeout: float | None = None, body: Any = None) -> Answer:
        """Show the token and ask. Raises OSError, of which TimeoutError is one, and HTTPException."""
        patience = self._timeout if timeout is None else timeout
        known = {"Authorization": f"token {endpoint.token}"}
        with _connection(endpoint, patience) as connection:
            return exchange(connection, method, endpoint.base_url + path, headers=known, within=patience, body=body)


@contextmanager
def _failing(what: str) -> Iterator[None]:
    """Make of all that can go wrong with a question the error that says so."""
    try:
        yield
    except TimeoutError as error:
        raise BackendTimeout(f"{what}: it did not answer in time") from error
    except BackendUnavailable as error:
        raise BackendUnavailable(f"{what}: {error.message}") from error
    except (OSError, http.client.HTTPException, ValidationError) as error:
        raise BackendUnavailable(f"{what}: {type(error).__name__}") from error


def _epoch(instant: str) -> float | None:
    """Read a time of Jupyter's; None where it is none."""
    try:
        return datetime.fromisoformat(instant).timestamp()
    except ValueError:
        return None


def _connection(endpoint: Endpoint, timeout: float = _LOOK_TIMEOUT) -> closing[http.client.HTTPConnection]:
    host = addresses.from_here(endpoint.hostname)
    if not endpoint.secure:
        return closing(http.client.HTTPConnection(host, endpoint.port, timeout=timeout))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # It is known by its pid and its token; its certificate says nothing more.
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return closing(http.client.HTTPSConnection(host, endpoint.port, timeout=timeout, context=context))


def _ok(connection: http.client.HTTPConnection, endpoint: Endpoint, path: str, headers: Mapping[str, str]) -> bool | None:
    """Whether a page is given; None where we could not ask for it."""
    try:
        answer = exchange(connection, "GET", endpoint.base_url + path, headers=headers, within=_LOOK_TIMEOUT)
    except (OSError, http.client.HTTPException) as error:
        return None if shortage.is_ours(error) else False
    return answer.status == http.client.OK


def url_of(endpoint: Endpoint, host: str | None = None) -> str:
    """Give the root URL of a server: as seen from this machine, or with the name by which others know it."""
    host = host or addresses.from_here(endpoint.hostname)
    return addresses.url("https" if endpoint.secure else "http", host, endpoint.port, endpoint.base_url)


_CAUSES: Final = (
    (FailureClass.PORT_IN_USE, re.compile(r"port \d+ is (already in use|not available)|Address already in use", re.IGNORECASE)),
    (FailureClass.DISK_FULL, re.compile(r"No space left on device|Disk quota exceeded", re.IGNORECASE)),
    (FailureClass.IMPORT_ERROR, re.compile(r"ModuleNotFoundError|ImportError|No module named")),
    (
        FailureClass.CONFIG_ERROR,
        re.compile(
            r"Bad config|bad configuration|TraitError|ConfigError|Permission denied|Read-only file system"
            r"|\[labkeeper\] cannot start the server"
        ),
    ),
)
_LEVEL: Final = re.compile(r"^\[([CEWID]) [^\]]*\]\s*")


def cause_of(end: Exit, tail: Sequence[str]) -> tuple[FailureClass, str]:
    """Name the class of an end, and the line of the log that says it best (without Jupyter's prefix); "" where none does."""
    if end.signal is not None:
        return FailureClass.KILLED, ""
    grave = [line for line in reversed(tail) if _level(line) not in {"D", "I"}]
    for kind, pattern in _CAUSES:
        for line in grave:
            if pattern.search(line):
                return kind, _LEVEL.sub("", line).strip()
    # Jupyter warns at each start of something, and what is indented belongs to a line above.
    last_words = (_LEVEL.sub("", line).strip() for line in grave if _level(line) != "W" and not line[:1].isspace())
    return FailureClass.OTHER, next(filter(None, last_words), "")


def _level(line: str) -> str:
    """Give the level of a line of Jupyter's log; "" of what it has not logged, such as a traceback."""
    found = _LEVEL.match(line)
    return found[1] if found else ""
