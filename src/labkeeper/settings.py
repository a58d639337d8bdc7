"""Every setting, defined once, and the only reader of our environment variables.

Sources, in order of precedence: the command line, the environment (`LABKEEPER_` and the name in
capitals), the TOML file named by `LABKEEPER_CONFIG`, the default. The flags of `labkeeper serve`,
the table in the documentation and the checks are derived from here.
"""

from __future__ import annotations

import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
)

from labkeeper.core.culling import CullPolicy, Terminals
from labkeeper.core.durations import duration
from labkeeper.core.errors import SettingsError
from labkeeper.core.policy import Policy
from labkeeper.core.ports import Reserve
from labkeeper.core.spec import Limits
from labkeeper.terminal import visible_line

PREFIX: Final = "LABKEEPER_"
CONFIG_VARIABLE: Final = PREFIX + "CONFIG"
URL_VARIABLE: Final = PREFIX + "URL"
"""The keeper's URL for the command line, instead of the one in its state directory."""
CA_VARIABLE: Final = PREFIX + "CA_FILE"
"""Certificate authorities that the command line trusts besides the system's."""
_OUTSIDE: Final = frozenset({CONFIG_VARIABLE, URL_VARIABLE, CA_VARIABLE, PREFIX + "SERVER"})
"""Our variables that are not settings."""
_MARGIN: Final = 5.0
"""Seconds."""


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


def _default_state_dir() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state") / "labkeeper"


def _check_reserve(text: str) -> str:
    if re.fullmatch(r"\d{1,18}|(\d{1,2}(\.\d+)?|100)%", text) is None:
        raise ValueError("must be bytes, such as 1073741824, or a percentage, such as 5%")
    return text


def _names(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    return tuple(filter(None, (name.strip() for name in given.split(","))))


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


Directory = Annotated[Path, AfterValidator(_absolute)]
Root = Annotated[Directory, AfterValidator(_check_user_last)]
Directories = Annotated[tuple[Root, ...], BeforeValidator(_split)]
"""Separated as in PATH, in the environment and on the command line."""
Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=86400)]
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
"""A list of texts, or one text separated by commas."""
Duration = Annotated[float, BeforeValidator(duration)]
"""Seconds, or text such as `90m`, `2h`, `1d12h`."""


class Settings(BaseModel):
    """The settings of a keeper. Frozen. Durations are in seconds, sizes in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    host: str = Field(
        "127.0.0.1",
        description=(
            "Address that the API listens on. The default is loopback, "
            "so that the API is not exposed by accident."
        ),
    )
    port: Port = Field(8000, description="Port of the API.")
    state_dir: Directory = Field(
        default_factory=_default_state_dir,
        description=(
            "Directory of what outlives the keeper: its database, logs, and the owner's token. "
            "Created with mode 0700."
        ),
    )
    runtime_dir: Directory | None = Field(
        None,
        description=(
            "Directory of what lives as long as a server: Jupyter's runtime files, "
            "and the record of its process. Default: `run` in the state directory. "
            "A keeper with a new runtime directory ends the servers that run in the earlier one."
        ),
    )
    notebook_dir: Root = Field(
        default_factory=Path,
        description=(
            "Root directory of servers whose request names none, and the base of relative ones. "
            "`%u` stands for the server's user."
        ),
    )
    allowed_roots: Directories | None = Field(
        None,
        description=(
            "Directories, separated as in `PATH`, that must contain the root directories "
            "of servers and the files that requests name. `%u` as above. Default: the notebook "
            "directory. If set, one of them must contain the notebook directory."
        ),
    )
    lab_ip: str = Field("127.0.0.1", description="Address that JupyterLab listens on.")
    lab_port: Port = Field(
        8888,
        description=(
            "Port of the server named `default`. "
            "Other servers use a free port unless they request one."
        ),
    )
    advertised_host: str | None = Field(
        None,
        description="Host name in `lab_url`. Default: the one by which the caller reached the API.",
    )
    jupyter_python: Directory = Field(
        default_factory=lambda: Path(sys.executable),
        description=(
            "Python interpreter that runs JupyterLab; its environment may differ from the keeper's."
        ),
    )
    launch_by: Literal["fork", "exec"] = Field(
        "fork",
        description=(
            "`fork`: fork servers from a process that has loaded JupyterLab, where possible; "
            "`exec`: load JupyterLab in each."
        ),
    )
    user: str | None = Field(
        None,
        description=(
            "User of the machine that servers run as if their request names none. "
            "Default: the keeper's own."
        ),
    )
    umask: Annotated[str, AfterValidator(_check_umask)] = Field(
        "077",
        description=(
            "Umask, in octal, of files that servers create, notebooks included: "
            "`077` keeps them private, `027` lets the group read them, `022` everyone."
        ),
    )
    auth: Literal["token", "none"] = Field(
        "token",
        description=(
            "`none` turns authentication off: "
            "everyone who can reach the API can run code here as the keeper's user."
        ),
    )
    token: SecretStr | None = Field(
        None,
        description=(
            "The owner's API token, at least 16 characters. "
            "Default: one is generated into the state directory. The command line sends this token."
        ),
    )
    token_file: Directory | None = Field(
        None, description="File that contains the token, such as a container secret."
    )
    cert_file: Directory | None = Field(
        None,
        description="TLS certificate of the API, with its chain, as PEM. Reloaded when it changes.",
    )
    key_file: Directory | None = Field(
        None, description="Private key of that certificate, unencrypted."
    )
    lab_cert_file: Directory | None = Field(
        None,
        description=(
            "TLS certificate of JupyterLab, as PEM. "
            "The users that servers run as must be able to read it."
        ),
    )
    lab_key_file: Directory | None = Field(
        None,
        description=(
            "Private key of that certificate. "
            "The users that servers run as must be able to read it."
        ),
    )
    allowed_hosts: Names = Field(
        (),
        description=(
            "Host names of the API, separated by commas, in addition to addresses, names "
            "without a dot, and the machine's own: `*.example.org` matches every name below it, "
            "`*` any name. Protects against DNS rebinding."
        ),
    )
    allowed_origins: Names = Field(
        (),
        description=(
            "Origins that may call the API from a browser (CORS), separated by commas, such as `https://hub.example.org`."
        ),
    )
    max_request_rate: Annotated[float, Field(ge=0, le=1e6)] = Field(
        100.0,
        description=(
            "Requests per second for each token, with bursts of ten seconds' worth. 0: unlimited."
        ),
    )
    on_exit: Literal["stop", "leave"] = Field(
        "stop",
        description=(
            "What to do with servers when the keeper is asked to exit; "
            "with `leave` the next keeper takes them over."
        ),
    )
    start_timeout: Seconds = Field(
        60.0, description="Seconds within which a server must become ready."
    )
    stop_grace: Seconds = Field(
        8.0,
        description=(
            "Seconds from the request to stop to SIGKILL: "
            "half for Jupyter's own shutdown, half for SIGTERM."
        ),
    )
    kill_wait: Seconds = Field(
        2.0, description="Seconds after SIGKILL until a server that still exists counts as lost."
    )
    probe_period: Seconds = Field(
        15.0, description="Seconds between two health checks of a running server."
    )
    hung_after: Annotated[float, Field(ge=0, le=86400)] = Field(
        120.0,
        description=(
            "Seconds without a response after which a running server is restarted. 0: never."
        ),
    )
    gateway_timeout: Seconds = Field(
        5.0,
        description=(
            "Timeout, in seconds, of requests to a kernel gateway when a server starts "
            "and while it is monitored."
        ),
    )
    gateway_period: Seconds = Field(
        30.0,
        description=(
            "Seconds between two checks of a running server's gateway; "
            "longer when it does not respond."
        ),
    )
    # Culling
    idle_timeout: Duration | None = Field(
        None,
        description=(
            "Idle time after which a server is stopped if its request sets none, such as `2h`. "
            "0: never."
        ),
    )
    max_age: Duration | None = Field(
        None,
        description=(
            "Age at which a server is stopped, used or not, if its request sets none. 0: never."
        ),
    )
    kernel_idle_timeout: Duration | None = Field(
        None,
        description=(
            "Idle time after which a kernel is shut down, independently of its server. 0: never."
        ),
    )
    cull_grace: Duration = Field(
        600.0,
        description="Time after a server became ready during which it does not count as idle.",
    )
    cull_warning: Duration = Field(
        300.0, description="Time between the warning and the stop, at most half of the timeout."
    )
    cull_period: Annotated[Duration, Field(gt=0)] = Field(
        30.0, description="Activity polling interval. Servers without a timeout are not polled."
    )
    cull_busy: bool = Field(
        False,
        description=(
            "`false`: a busy kernel counts as activity, even without output; "
            "`true`: only its last activity counts."
        ),
    )
    cull_connected: bool = Field(
        True,
        description=(
            "`true`: an open notebook does not count as activity; "
            "`false`: every connection to a kernel does."
        ),
    )
    cull_terminals: Literal["programs", "open", "ignore"] = Field(
        "programs",
        description=(
            "What counts as activity of terminals: `programs` that run in them, "
            "every `open` terminal, or nothing (`ignore`)."
        ),
    )
    max_snooze: Duration = Field(86400.0, description="Maximum duration of a snooze.")
    max_servers: Annotated[int, Field(ge=1, le=10000)] = Field(
        200,
        description=(
            "Maximum number of active servers. Ten times as many may be known, "
            "including stopped and failed ones."
        ),
    )
    usage_period: Annotated[float, Field(ge=0, le=3600)] = Field(
        5.0,
        description=(
            "Seconds between two measurements of resource usage while it is being requested. "
            "0: never."
        ),
    )
    max_starts: Annotated[int, Field(ge=1, le=10000)] = Field(
        default_factory=lambda: (
            2 * len(os.sched_getaffinity(0))
            if sys.platform == "linux"
            else 2 * (os.cpu_count() or 1)
        ),
        description=(
            "Maximum number of servers that start at once. Others are queued, first in, first out."
        ),
    )
    min_free_memory: Annotated[str, AfterValidator(_check_reserve)] = Field(
        "5%",
        description=(
            "Memory to keep free, in bytes or as a percentage. "
            "Below it no server is started. 0: no check."
        ),
    )
    memory_limit: Annotated[int, Field(ge=2**26)] | None = Field(
        None, description="Default memory limit of a server with its kernels, in bytes."
    )
    cpu_limit: Annotated[float, Field(ge=0.01)] | None = Field(
        None, description="Default CPU limit of a server with its kernels, in processors."
    )
    process_limit: Annotated[int, Field(ge=16)] | None = Field(
        None, description="Default limit of processes and threads of a server with its kernels."
    )
    history_size: Annotated[int, Field(ge=100, le=10_000_000)] = Field(
        20_000,
        description=(
            "Approximate number of events to keep. "
            "Beyond it the oldest events of the most active actor are removed."
        ),
    )
    webhook_url: SecretStr | None = Field(
        None,
        description=(
            "URL to post every event to, in the form of Standard Webhooks. Requires a secret."
        ),
    )
    webhook_secret: SecretStr | None = Field(
        None,
        description=(
            "Secret that signs the posts: 24 to 64 bytes in base64, "
            "such as the output of `openssl rand -base64 32`."
        ),
    )
    webhook_secret_file: Directory | None = Field(
        None, description="File that contains the webhook secret."
    )
    threads: Annotated[int, Field(ge=4, le=2000)] = Field(
        256,
        description=(
            "Maximum number of threads that answer requests. "
            "A caller that waits or streams holds one; an eighth is kept free."
        ),
    )
    max_body: Annotated[int, Field(ge=1024, le=2**30)] = Field(
        1024 * 1024, description="Maximum size of a request body, in bytes."
    )
    log_max_bytes: Annotated[int, Field(ge=1024)] = Field(
        10 * 1024 * 1024,
        description="Size, in bytes, at which a server's log is rotated; one older file is kept.",
    )
    echo_logs: bool = Field(
        False, description="Copy the logs of servers to the keeper's own log, for containers."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Minimum log level."
    )
    log_format: Literal["auto", "console", "json"] = Field(
        "auto",
        description=(
            "Format of the keeper's log; `auto` is `console` on a terminal and `json` elsewhere."
        ),
    )
    debug: bool = Field(
        False, description="Log at level `debug`, with source locations. Responses are unchanged."
    )

    @property
    def min_free(self) -> Reserve:
        """The memory to keep free."""
        if self.min_free_memory.endswith("%"):
            return Reserve(share=float(self.min_free_memory[:-1]) / 100)
        return Reserve(amount=int(self.min_free_memory))

    @property
    def umask_of_servers(self) -> int:
        """The umask as a number."""
        return int(self.umask, 8)

    @property
    def cull_policy(self) -> CullPolicy:
        """The culling policy for all servers."""
        return CullPolicy(
            grace=self.cull_grace,
            warning=self.cull_warning,
            cull_busy=self.cull_busy,
            cull_connected=self.cull_connected,
            terminals=Terminals(self.cull_terminals),
            kernel_idle_timeout=self.kernel_idle_timeout or None,
        )

    @property
    def policy(self) -> Policy:
        """The numbers that apply to every server."""
        return Policy(
            start_timeout=self.start_timeout,
            stop_grace=self.stop_grace,
            kill_wait=self.kill_wait,
            probe_period=self.probe_period,
            hung_after=self.hung_after,
            max_servers=self.max_servers,
            max_starts=self.max_starts,
            min_free=self.min_free,
        )

    @property
    def longest_stop(self) -> float:
        """Seconds to wait for the end of a server: more than the sum of all timers."""
        return self.stop_grace + self.kill_wait + _MARGIN

    @property
    def limits(self) -> Limits:
        """The default limits of servers."""
        return Limits(memory=self.memory_limit, cpus=self.cpu_limit, processes=self.process_limit)

    @property
    def certificate(self) -> tuple[Path, Path] | None:
        """The files of the API's certificate and key."""
        return (self.cert_file, self.key_file) if self.cert_file and self.key_file else None

    @property
    def lab_certificate(self) -> tuple[Path, Path] | None:
        """The same for servers."""
        cert, key = self.lab_cert_file, self.lab_key_file
        return (cert, key) if cert and key else None

    @property
    def server_dirs(self) -> Path:
        """The runtime directory."""
        return self.runtime_dir or self.state_dir / "run"


def load(**flags: Any) -> Settings:
    """Return the settings; `flags` are the command line's. Raises SettingsError, in one line."""
    try:
        return _load(flags)
    except SettingsError as error:
        # Names and paths may contain control characters.
        raise SettingsError(visible_line(error.message)) from error


def _load(flags: dict[str, Any]) -> Settings:
    try:
        settings = Settings(**(_from_file() | _from_environment() | flags))
    except ValidationError as error:
        raise SettingsError(
            "; ".join(_sentence(dict(mistake)) for mistake in error.errors())
        ) from error
    for which in ("", "lab_"):
        _check_pair(settings, f"{which}cert_file", f"{which}key_file")
    for name in ("token", "webhook_secret"):
        settings = _with_secret(settings, name)
    secret = settings.token.get_secret_value() if settings.token is not None else None
    if secret is not None and (
        len(secret) < _SHORTEST_TOKEN
        or not secret.isascii()
        or not secret.isprintable()
        or " " in secret
    ):
        source = (
            f"TOKEN_FILE: what {settings.token_file} holds" if settings.token_file else "TOKEN:"
        )
        raise SettingsError(
            f"bad setting LABKEEPER_{source} "
            f"must be at least {_SHORTEST_TOKEN} visible ASCII characters"
        )
    return settings


def _check_pair(settings: Settings, *names: str) -> None:
    for one, other in (names, reversed(names)):
        if getattr(settings, one) is not None and getattr(settings, other) is None:
            raise SettingsError(
                f"{PREFIX}{one.upper()} is set, but {PREFIX}{other.upper()} is not; "
                "set both or neither"
            )


def _with_secret(settings: Settings, name: str) -> Settings:
    """Return the settings with a secret read from its file, if one is named."""
    path, variable = getattr(settings, f"{name}_file"), PREFIX + name.upper()
    if path is None:
        return settings
    if getattr(settings, name) is not None:
        raise SettingsError(f"{variable} and {variable}_FILE are both set; unset one of them")
    return settings.model_copy(update={name: SecretStr(_secret_in(path, f"{variable}_FILE"))})


def keeper_url() -> str | None:
    """Return the keeper URL for the command line from the environment."""
    return os.environ.get(URL_VARIABLE) or None


def ca_file() -> Path | None:
    """Return the certificate authorities' file for the command line from the environment."""
    named = os.environ.get(CA_VARIABLE)
    return Path(named).expanduser() if named else None


def unknown_variables() -> list[str]:
    """Return environment variables that look like settings but are none: likely misspelled."""
    known = {PREFIX + name.upper() for name in Settings.model_fields} | _OUTSIDE
    return sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)


SECRETS: Final = frozenset(
    name
    for name, field in Settings.model_fields.items()
    if SecretStr in {field.annotation, *get_args(field.annotation)}
)
"""Settings excluded from the command line, which others can read, and from messages."""
_SHORTEST_TOKEN: Final = 16
_LONGEST_TOKEN: Final = 4096


def _secret_in(path: Path, variable: str) -> str:
    """Read a secret from a file, without the newline that most editors add."""
    try:
        with path.open("rb") as stream:
            return stream.read(_LONGEST_TOKEN).decode("utf-8", errors="replace").strip("\r\n")
    except OSError as error:
        raise SettingsError(
            f"cannot read the file {path} ({variable}): {error.strerror}"
        ) from error


def _from_environment() -> dict[str, Any]:
    """Return the settings in the environment; an empty one counts as unset."""
    found = {name: os.environ.get(PREFIX + name.upper()) for name in Settings.model_fields}
    return {name: value for name, value in found.items() if value}


def _from_file() -> dict[str, Any]:
    path = os.environ.get(CONFIG_VARIABLE)
    if not path:
        return {}
    try:
        with Path(path).expanduser().open("rb") as stream:
            return tomllib.load(stream)
    except (
        OSError,
        UnicodeDecodeError,
        tomllib.TOMLDecodeError,
        RecursionError,
        RuntimeError,
    ) as error:
        # RuntimeError: a '~' without a home directory; RecursionError: deep nesting in tomllib.
        raise SettingsError(
            f"cannot read the settings file {path} (named by {CONFIG_VARIABLE}): {error}"
        ) from error


def _sentence(mistake: dict[str, Any]) -> str:
    name = str(mistake["loc"][0]) if mistake["loc"] else "?"
    if mistake["type"] == "extra_forbidden":
        return f"unknown setting '{name}'"
    given = "" if name in SECRETS else f" (given: {mistake['input']!r})"
    return f"bad setting {PREFIX}{name.upper()}: {mistake['msg']}{given}"
