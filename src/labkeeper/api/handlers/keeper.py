"""The keeper itself: health, metrics, version, orphaned kernels."""

from __future__ import annotations

from flask import Response, request

from labkeeper.api.handlers.common import Answer, json_answer
from labkeeper.api.services import Services
from labkeeper.api.views import library_model, orphaned_kernel_model
from labkeeper.core.errors import (
    BackendUnavailable,
)
from labkeeper.schema.answers.keeper import Health, OrphanedKernelList, Readiness, Version


def list_orphaned_kernels(services: Services) -> Answer:
    """List kernels of ended servers that a gateway still has to end.

    They are ended as soon as it responds.
    """
    return json_answer(
        OrphanedKernelList(
            orphaned_kernels=[orphaned_kernel_model(orphan) for orphan in services.orphans()]
        )
    )


def health(services: Services) -> Answer:
    """Check that the keeper accepts commands; if it does not, restart it."""
    if not services.keeper.alive:
        raise BackendUnavailable("cannot take commands: the keeper's fleet does not run")
    return json_answer(Health(status="ok"))


def ready(services: Services) -> Answer:
    """Check that the keeper accepts commands, and that all its watchers work.

    Libraries that cannot be preloaded are named; without them it is ready all the same.
    """
    health(services)
    if failing := services.failing():
        what = "; ".join(f"{watcher}: {why}" for watcher, why in sorted(failing.items()))
        raise BackendUnavailable(
            f"commands are accepted, but not everything is watched: {what}",
            watchers=sorted(failing),
        )
    return json_answer(
        Readiness(
            status="ok",
            preload=[library_model(library) for library in services.backend.libraries()],
        )
    )


def metrics(services: Services) -> Response:
    """Return the metrics in the format of Prometheus, or of OpenMetrics if requested."""
    text, media_type = services.metrics.exposition(request.headers.get("Accept", ""))
    return Response(text, content_type=media_type)


def version(services: Services) -> Answer:
    """Return the name and version of this software."""
    return json_answer(Version(name="labkeeper", version=services.version))
