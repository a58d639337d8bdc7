"""Runs a job: one call of the backend, whose result or error becomes a fact."""

from __future__ import annotations

from labkeeper.core.errors import BackendError, BackendRefused, LabkeeperError
from labkeeper.core.lifecycle import Action
from labkeeper.core.messages import Fact, Job, Refused, Unreachable
from labkeeper.core.ports import Backend, GatewayPreflight
from labkeeper.core.server import Failure, FailureClass


def perform(
    backend: Backend, preflight: GatewayPreflight, job: Job, *, grace: float
) -> Fact | None:
    """Run one job on a backend; return its result or error as a fact."""
    name = job.spec.qualified_name
    try:
        match job.action:
            case Action.LAUNCH:
                preflight.begin(job.spec, job.generation, job.kernels)
                backend.launch(job.spec, job.generation)
            case Action.TERMINATE:
                backend.terminate(name, job.generation, grace, keep_kernels=job.keep_kernels)
            case Action.KILL:
                backend.kill(name, job.generation)
            case Action.OBSERVE:
                return backend.observe(name, job.generation)
    except BackendError as error:
        if isinstance(error, BackendRefused) and job.action is Action.LAUNCH:
            return refusal(error, error.message)
        return Unreachable(error.message)
    return None


def refusal(error: LabkeeperError, why: str) -> Refused:
    """Return the fact for an error that prevented a launch."""
    kind = FailureClass(error.details.get("failure_class", FailureClass.OTHER))
    return Refused(Failure(kind, why, log_tail=tuple(error.details.get("log_tail", ()))))
