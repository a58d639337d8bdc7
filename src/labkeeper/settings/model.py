"""Every setting, defined once.

The flags of `labkeeper serve`, the table in the documentation and the checks are derived from here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SecretStr

from labkeeper.core.spec import KernelsBy
from labkeeper.settings.location import default_state_dir
from labkeeper.settings.types import (
    BytesOrShare,
    Directories,
    Directory,
    Duration,
    HostName,
    Modules,
    Names,
    Networks,
    Port,
    Root,
    Seconds,
    Umask,
)


class Source(StrEnum):
    """Where a setting comes from. Later ones take precedence."""

    DEFAULT = "default"
    FILE = "settings file"
    ENVIRONMENT = "environment variable"
    FLAG = "flag"


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
    edge: Literal["on", "off"] = Field(
        "on" if sys.platform == "linux" else "off",
        description=(
            "`on`: a process of its own, the edge, listens on that address, also while the keeper "
            "restarts, and Labs are behind it. `off`: the keeper listens itself, on loopback "
            "addresses only, for development. Other systems than Linux have no edge."
        ),
    )
    lab_address: Literal["path", "host", "port"] | None = Field(
        None,
        description=(
            "Address of Labs if there is an edge: `path`: below its address, at `/servers/NAME/`; "
            "`host`: at `NAME.DOMAIN`; `port`: each on its own port, as without an edge. Takes "
            "effect at a Lab's next launch. Default: `host` if there is a domain, else `path`."
        ),
    )
    lab_domain: HostName | None = Field(
        None,
        description=(
            "Domain of Labs: with `labs.example.org` the Lab `demo` is at `demo.labs.example.org`. "
            "All names below it must lead to this machine (wildcard DNS)."
        ),
    )
    trusted_proxies: Networks = Field(
        (),
        description=(
            "Addresses or networks, separated by commas, of proxies in front of the edge: what "
            "they say about clients in `X-Forwarded-For` and `X-Forwarded-Proto`, or else in "
            "`Forwarded`, is believed. What others say there is ignored."
        ),
    )
    session_idle: Duration = Field(
        3 * 86400.0,
        description=(
            "Time after which a browser's session ends if it was not used: no request, and no open "
            "Lab. Sessions last a week at most. 0: no such limit."
        ),
    )
    state_dir: Directory = Field(
        default_factory=default_state_dir,
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
    kernels_by: KernelsBy = Field(
        "fork",
        description=(
            "`fork`: fork IPython kernels from a process that has loaded ipykernel, where "
            "possible, unless a request chooses `exec`; `exec`: load ipykernel in each. "
            "Requests for `fork` are then refused."
        ),
    )
    preload: Modules = Field(
        (),
        description=(
            "Libraries to load once for all forked kernels, separated by commas, such as "
            "`numpy,pandas,matplotlib.pyplot`. One that cannot be shared by kernels is left out; "
            "`labkeeper show` and `/readyz` say why."
        ),
    )
    user: str | None = Field(
        None,
        description=(
            "User of the machine that servers run as if their request names none. "
            "Default: the keeper's own."
        ),
    )
    umask: Umask = Field(
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
        description=(
            "TLS certificate of the API, with its chain, as PEM. With an edge it serves Labs, too. "
            "Reloaded when it changes."
        ),
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
    sleep_after: Duration | None = Field(
        None,
        description=(
            "Time without kernels, terminals and visitors after which a server is stopped until "
            "the next visit to its Lab, if its request sets none. 0: never. Needs the edge."
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
            "Seconds between two measurements of resource usage. "
            "0: never, so there is neither usage nor a history of it."
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
    min_free_memory: BytesOrShare = Field(
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
        128,
        description=(
            "Number of threads that answer requests. "
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
    access_log: bool = Field(
        True,
        description=(
            "If there is an edge: log each request and its answer as a line of JSON, in "
            "`logs/_access.log` in the state directory, rotated as the logs of servers are."
        ),
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

    _sources: Mapping[str, Source] = PrivateAttr(default_factory=dict)

    def model_post_init(self, context: Any, /) -> None:
        """Take the context of a validation as the sources of the settings, by name."""
        self._sources = context or {}

    def source_of(self, name: str) -> Source:
        """Return where a setting comes from."""
        return self._sources.get(name, Source.DEFAULT)

    @property
    def certificate(self) -> tuple[Path, Path] | None:
        """The files of the API's certificate and key."""
        return (self.cert_file, self.key_file) if self.cert_file and self.key_file else None

    @property
    def lab_certificate(self) -> tuple[Path, Path] | None:
        """The files of the servers' certificate and key."""
        cert, key = self.lab_cert_file, self.lab_key_file
        return (cert, key) if cert and key else None

    @property
    def server_dirs(self) -> Path:
        """The runtime directory."""
        return self.runtime_dir or self.state_dir / "run"


SECRETS: Final = frozenset(
    name
    for name, field in Settings.model_fields.items()
    if SecretStr in {field.annotation, *get_args(field.annotation)}
)
"""Settings excluded from the command line, which others can read, and from messages."""
