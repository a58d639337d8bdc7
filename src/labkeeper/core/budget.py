"""The restart budget of one server: whether a crash is followed by another launch, and when."""

from __future__ import annotations

from dataclasses import dataclass, replace

from labkeeper.core.policy import Policy


@dataclass(frozen=True, slots=True)
class Budget:
    """Restarts after a crash. A server seen to end before its first answer fails at once."""

    earned: bool = False
    """Whether it has answered since its start command."""
    spent: tuple[float, ...] = ()
    """The times of its restarts, by the monotonic clock."""

    def left(self, policy: Policy, now: float, *, blameless: bool = False) -> bool:
        """Whether one more launch is allowed; `blameless`: the end was not the server's fault."""
        return (self.earned or blameless) and len(self._recent(policy, now)) < len(
            policy.restart_delays
        )

    def spend(self, policy: Policy, now: float) -> tuple[Budget, float]:
        """Return the budget after one more launch, and the delay before it in seconds."""
        recent = self._recent(policy, now)
        return replace(self, spent=(*recent, now)), policy.restart_delays[len(recent)]

    def _recent(self, policy: Policy, now: float) -> tuple[float, ...]:
        return tuple(at for at in self.spent if now - at < policy.restart_window)
