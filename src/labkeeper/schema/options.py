"""The Jupyter options that callers may set, as a table: name, type, bounds, description.

None of them runs code, names a file, program or address, or opens the server to others. Each is a
switch or a number, so that there is no text to inject anything into. They are passed as
configuration, never on a command line. Options that the keeper sets (address, port, token, root
directory) are missing, and so are those that a request field covers.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, model_validator

_UNSET: Final[Any] = None
_Days = Annotated[int, Field(ge=0, le=366 * 86400)]
_Interval = Annotated[int, Field(ge=1, le=86400)]
_Rate = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
_Bytes = Annotated[int, Field(ge=2**20, le=2**40)]


def _option(name: str, about: str) -> Any:
    return Field(_UNSET, alias=name, description=about)


class JupyterOptions(BaseModel):
    """Jupyter options by their configuration names; missing ones keep the site's or user's."""

    model_config = ConfigDict(extra="forbid", strict=True, defer_build=True)

    terminals_enabled: bool = _option(
        "ServerApp.terminals_enabled", "Whether the Lab offers terminals."
    )
    quit_button: bool = _option(
        "ServerApp.quit_button", "Whether the Lab shows how to shut the server down."
    )
    max_body_size: _Bytes = _option(
        "ServerApp.max_body_size", "Bytes of the largest request, such as an upload or a notebook."
    )
    max_buffer_size: _Bytes = _option(
        "ServerApp.max_buffer_size", "Bytes of the largest request that is held in memory."
    )
    allow_hidden: bool = _option(
        "ContentsManager.allow_hidden", "Whether hidden files can be opened."
    )
    delete_to_trash: bool = _option(
        "FileContentsManager.delete_to_trash", "Whether what is deleted goes to the trash."
    )
    always_delete_dir: bool = _option(
        "FileContentsManager.always_delete_dir", "Whether directories with files can be deleted."
    )
    use_atomic_writing: bool = _option(
        "FileContentsManager.use_atomic_writing",
        "Whether a file is written beside the old one first; not all file systems can.",
    )
    max_copy_folder_size_mb: Annotated[int, Field(ge=0, le=2**20)] = _option(
        "FileContentsManager.max_copy_folder_size_mb",
        "MB of the largest directory that can be copied in the Lab.",
    )
    cull_kernels_after: _Days = _option(
        "MappingKernelManager.cull_idle_timeout",
        "Seconds without use after which Jupyter itself ends a kernel; 0: never.",
    )
    cull_kernels_every: _Interval = _option(
        "MappingKernelManager.cull_interval", "Seconds between two looks for such kernels."
    )
    cull_connected: bool = _option(
        "MappingKernelManager.cull_connected", "Whether those of open notebooks are ended, too."
    )
    cull_busy: bool = _option("MappingKernelManager.cull_busy", "Whether busy ones are ended, too.")
    buffer_offline_messages: bool = _option(
        "MappingKernelManager.buffer_offline_messages",
        "Whether output is kept for a notebook that is closed for a while.",
    )
    cull_terminals_after: _Days = _option(
        "TerminalManager.cull_inactive_timeout",
        "Seconds without use after which Jupyter itself ends a terminal; 0: never.",
    )
    cull_terminals_every: _Interval = _option(
        "TerminalManager.cull_interval", "Seconds between two looks for such terminals."
    )
    limit_rate: bool = _option(
        "ZMQChannelsWebsocketConnection.limit_rate",
        "Whether the output of kernels is held to a rate.",
    )
    iopub_data_rate_limit: _Rate = _option(
        "ZMQChannelsWebsocketConnection.iopub_data_rate_limit",
        "Bytes of output a second, of kernels beside the server.",
    )
    iopub_msg_rate_limit: _Rate = _option(
        "ZMQChannelsWebsocketConnection.iopub_msg_rate_limit",
        "Messages of output a second, likewise.",
    )
    notebook_starts_kernel: bool = _option(
        "LabApp.notebook_starts_kernel", "Whether a notebook that is opened starts a kernel."
    )

    @model_validator(mode="before")
    @classmethod
    def _all_are_known(cls, given: Any) -> Any:
        known = {field.alias for field in cls.model_fields.values()}
        if isinstance(given, dict) and not given.keys() <= known:
            raise ValueError(f"only these can be set: {', '.join(sorted(filter(None, known)))}")
        return given

    def chosen(self) -> dict[str, bool | int | float]:
        """Return the options that are set, by name."""
        return self.model_dump(by_alias=True, exclude_unset=True)
