"""The keeper itself: health, metrics, version, orphaned kernels."""

from __future__ import annotations

from flask import Response, request

from labkeeper.api.handlers.common import Answer, json_answer
from labkeeper.api.services import Services
from labkeeper.api.views import (
    orphaned_kernel_model,
)
from labkeeper.core.errors import (
    BackendUnavailable,
)
from labkeeper.schema.answers import (
    Health,
    OrphanedKernelList,
    Version,
)


def list_orphaned_kernels(services: Services) -> Answer:
    """List the kernels of servers that have ended which a gateway still has to end; that is done when it answers."""
    return json_answer(OrphanedKernelList(orphaned_kernels=[orphaned_kernel_model(orphan) for orphan in services.orphans()]))


def health(services: Services) -> Answer:
    """Whether the keeper takes commands; where it does not, only a new one would."""
    if not services.keeper.alive:
        raise BackendUnavailable("cannot take commands: the keeper's fleet does not run")
    return json_answer(Health(status="ok"))


def ready(services: Services) -> Answer:
    """Whether the keeper takes commands, and watches all that it is to watch."""
    health(services)
    if failing := services.failing():
        what = "; ".join(f"{watcher}: {why}" for watcher, why in sorted(failing.items()))
        raise BackendUnavailable(f"commands are taken, but not everything is watched: {what}", watchers=sorted(failing))
    return json_answer(Health(status="ok"))


def metrics(services: Services) -> Response:
    """Return the keeper's metrics in the form of Prometheus, or of OpenMetrics where that is asked for."""
    text, media_type = services.meter.exposition(request.headers.get("Accept", ""))
    return Response(text, content_type=media_type)


def version(services: Services) -> Answer:
    """Name this software and its version."""
    return json_answer(Version(name="labkeeper", version=services.version))
