"""The contract of every backend, as tests: the laws of `core.ports.Backend` in executable form.

Needs pytest. To test a backend, return its rig:

    class TestMyBackend(BackendContract):
        @pytest.fixture
        def rig(self, tmp_path):
            return MyRig(tmp_path)      # implements Rig

No test sleeps to wait: each waits for a report, at most `Rig.patience` seconds. A server is started
eighteen times in all.
"""

from __future__ import annotations

import itertools
import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final, Protocol, TypeVar

import pytest

from labkeeper.core.access import ANYBODY
from labkeeper.core.errors import BackendRefused
from labkeeper.core.messages import Ended, Fact, Gone, Ready, Report, Seen
from labkeeper.core.ports import Backend
from labkeeper.core.server import Instance, Progress, StopMethod
from labkeeper.core.spec import Owner, QualifiedName, ServerSpec

_FEW: Final = 50
"""Upper bound of the lines before the end of a log, including empty ones."""
_FENCE: Final = 1_000_000
"""A generation that no test uses for a server."""
_F = TypeVar("_F", bound=Fact)


class Rig(Protocol):
    """The interface to an implementation: its world of backends, and control from outside."""

    @property
    def patience(self) -> float:
        """Seconds to wait for a report before a test fails; be generous."""

    def backend(self, report: Callable[[Report], None]) -> Backend:
        """Create a backend. A second call adds one over the same world, as after a crash."""

    def abandon(self, backend: Backend) -> None:
        """Make a backend inactive, as if its keeper had crashed; its servers keep running."""

    def spec(self) -> ServerSpec:
        """Return a spec that can be launched; the same name each time."""

    def refused(self) -> ServerSpec:
        """Return a spec whose launch is refused."""

    def strike(self, instance: Instance) -> None:
        """Kill a server's main process from outside, as by `kill -9`; return once it is dead."""

    def exists(self, instance: Instance) -> bool:
        """Return whether the main process of a server exists; a zombie does not."""


class Stage:
    """One backend of a rig at a time, with its reports."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.spec = rig.spec()
        self._reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self.backend = rig.backend(self._reports.put)
        self._crashed = False

    @property
    def name(self) -> QualifiedName:
        """The name of the server on this stage."""
        return self.spec.qualified_name

    def crash(self) -> None:
        """Crash the keeper."""
        if not self._crashed:
            self._crashed = True
            self.rig.abandon(self.backend)

    def succeed(self) -> Backend:
        """Crash the keeper, and replace its backend by a second one over the same world."""
        self.crash()
        self._reports, self._crashed = queue.SimpleQueue(), False
        self.backend = self.rig.backend(self._reports.put)
        return self.backend

    def launch(self, generation: int = 1) -> Ready:
        """Launch the server, and wait until it is ready."""
        self.backend.launch(self.spec, generation)
        return self.wait(Ready, generation)

    def kill(self, generation: int = 1) -> Ended:
        """Kill the server, and wait for its end."""
        self.backend.kill(self.name, generation)
        return self.wait(Ended, generation)

    def wait(self, kind: type[_F], generation: int) -> _F:
        """Wait for the next report but progress; it must be of this kind and generation."""
        report = None
        while report is None or isinstance(report.fact, Progress):
            try:
                report = self._reports.get(timeout=self.rig.patience)
            except queue.Empty:
                raise AssertionError(
                    f"no {kind.__name__} was reported in {self.rig.patience:g} s"
                ) from None
        assert isinstance(report.fact, kind), f"{kind.__name__} was due, but {report} came"
        assert (report.name, report.generation) == (self.name, generation), (
            f"not of launch {generation}: {report}"
        )
        return report.fact

    def quiet(self) -> None:
        """Prove that no report was pending: the one caused here arrives first."""
        self.kill(_FENCE)

    def clear(self) -> None:
        """Clean up."""
        until = time.monotonic() + self.rig.patience
        try:
            self.backend.kill(self.name, _FENCE)
            # The end of a living server has the generation of its launch; of none, this one.
            while not isinstance(
                self._reports.get(timeout=max(0.0, until - time.monotonic())).fact, Ended
            ):
                pass
            self.backend.forget(self.name)
        finally:
            self.crash()


class BackendContract:
    """The laws; a subclass provides the fixture `rig`."""

    @pytest.fixture
    def rig(self) -> Rig:
        """Return the implementation under test."""
        raise NotImplementedError

    @pytest.fixture
    def stage(self, rig: Rig) -> Iterator[Stage]:
        """Return a backend without servers."""
        stage = Stage(rig)
        yield stage
        stage.clear()

    def test_a_valid_spec_stays_as_it_is(self, stage: Stage) -> None:
        """What a backend made of a spec is valid: stored specs are validated again."""
        valid = stage.backend.validate(stage.spec, ANYBODY)
        assert stage.backend.validate(valid, ANYBODY) == valid

    def test_launch_makes_a_server_ready(self, stage: Stage) -> None:
        """A launch is followed by one Ready, whose endpoint is that of an observable process."""
        ready = stage.launch()
        assert stage.rig.exists(ready.instance)
        endpoint = ready.endpoint
        assert endpoint.base_url == stage.spec.base_url
        assert endpoint.root_dir == stage.spec.root_dir
        assert endpoint.url.endswith(endpoint.base_url)
        assert endpoint.token
        assert endpoint.port > 0
        assert stage.backend.observe(stage.name, 1) == Seen(answers=True)

    def test_launch_is_idempotent(self, stage: Stage) -> None:
        """A repeated launch makes one process, with one end."""
        ready = stage.launch()
        stage.backend.launch(stage.spec, 1)
        assert stage.rig.exists(ready.instance)
        stage.kill()
        assert not stage.rig.exists(ready.instance)
        stage.quiet()

    def test_a_new_launch_ends_the_earlier_one_first(self, stage: Stage) -> None:
        """A higher generation ends an earlier one, and reports that before its own Ready."""
        first = stage.launch(1).instance
        stage.backend.launch(stage.spec, 2)
        stage.wait(Ended, 1)
        assert not stage.rig.exists(first)
        second = stage.wait(Ready, 2).instance
        assert second != first
        assert stage.rig.exists(second)

    def test_terminate_ends_it_in_good_order(self, stage: Stage) -> None:
        """After terminate exactly one Ended follows, orderly, with its method; nothing is left."""
        ready = stage.launch()
        stage.backend.terminate(stage.name, 1, stage.rig.patience)
        ended = stage.wait(Ended, 1)
        assert ended.exit.clean
        assert ended.failure is None
        assert ended.method in {StopMethod.SHUTDOWN, StopMethod.SIGTERM}
        assert not stage.rig.exists(ready.instance)
        stage.quiet()

    def test_kill_ends_it_at_once(self, stage: Stage) -> None:
        """After kill exactly one Ended follows, and nothing is left."""
        ready = stage.launch()
        ended = stage.kill()
        assert ended.method is StopMethod.SIGKILL
        assert not ended.exit.clean
        assert not stage.rig.exists(ready.instance)
        stage.quiet()

    def test_ending_nothing_ends(self, stage: Stage) -> None:
        """After terminate or kill an Ended follows even if nothing existed."""
        stage.backend.terminate(stage.name, 3, 1.0)
        assert stage.wait(Ended, 3).method is StopMethod.NONE
        assert stage.kill(4).method is StopMethod.NONE

    def test_nothing_is_observed_as_gone(self, stage: Stage) -> None:
        """An observation of an unknown server returns Gone and causes no report."""
        assert stage.backend.observe(stage.name, 1) == Gone()
        stage.quiet()

    def test_death_from_outside_is_reported(self, stage: Stage) -> None:
        """A server killed from outside has exactly one Ended, with a cause and no stop method."""
        ready = stage.launch()
        stage.rig.strike(ready.instance)
        ended = stage.wait(Ended, 1)
        assert not ended.exit.clean
        assert ended.method is StopMethod.NONE
        assert ended.failure is not None
        assert ended.failure.exit == ended.exit
        stage.quiet()
        assert not isinstance(stage.backend.observe(stage.name, 1), Seen)

    def test_a_second_backend_takes_over(self, stage: Stage) -> None:
        """After a second backend has returned Seen, it reports Ready again, and later the end."""
        ready = stage.launch()
        successor = stage.succeed()
        assert isinstance(successor.observe(stage.name, 1), Seen)
        assert stage.wait(Ready, 1).instance == ready.instance
        assert stage.rig.exists(ready.instance)
        successor.terminate(stage.name, 1, stage.rig.patience)
        stage.wait(Ended, 1)
        assert not stage.rig.exists(ready.instance)
        stage.quiet()

    def test_a_death_between_two_backends_is_found(self, stage: Stage) -> None:
        """Observing a server that died unwatched returns its end or Gone; another launch, Gone."""
        ready = stage.launch()
        stage.crash()
        stage.rig.strike(ready.instance)
        successor = stage.succeed()
        found = successor.observe(stage.name, 1)
        assert isinstance(found, Ended | Gone)
        assert not (isinstance(found, Ended) and found.exit.clean)
        assert successor.observe(stage.name, 2) == Gone()
        stage.quiet()

    def test_the_log_outlives_the_server(self, stage: Stage) -> None:
        """The log remains after the end, to read and follow; forgetting it is idempotent."""
        ready = stage.launch()
        stage.kill()
        lines = list(stage.backend.log(stage.name, None))
        assert lines
        assert not any(line.endswith("\n") for line in lines)
        assert not any(ready.endpoint.token in line for line in lines)
        assert list(stage.backend.log(stage.name, 1)) == lines[-1:]
        followed = list(stage.backend.follow(stage.name, None, lambda: False))
        assert [line for line in followed if line] == [f"{line}\n" for line in lines]
        stage.backend.forget(stage.name)
        stage.backend.forget(stage.name)
        assert not list(stage.backend.log(stage.name, None))

    def test_following_ends_with_the_server(self, stage: Stage) -> None:
        """Following a log yields "" while nothing is new, and ends with the server."""
        stage.launch()
        lives = True
        lines = stage.backend.follow(stage.name, 1, lambda: lives)
        assert any(line == "" for line in lines)
        stage.kill()
        lives = False
        assert not any(line == "" for line in list(lines)[1:])

    def test_following_ends_when_the_log_is_forgotten(self, stage: Stage) -> None:
        """Following a log ends with it, and does not continue with a later server of that name."""
        stage.launch()
        lines = stage.backend.follow(stage.name, 1, lambda: True)
        assert any(line == "" for line in lines)
        stage.kill()
        stage.backend.forget(stage.name)
        stage.launch(2)
        assert len(list(itertools.islice(lines, _FEW))) < _FEW

    def test_what_lives_is_measured_and_nothing_else(self, stage: Stage) -> None:
        """A living server's usage is reported, and CPU time never decreases; others have none."""
        stage.launch()
        first = stage.backend.usage([stage.name, QualifiedName("unknown")])
        assert set(first) == {stage.name}
        assert first[stage.name].memory > 0
        assert first[stage.name].threads >= first[stage.name].processes >= 1
        assert (
            0
            <= first[stage.name].cpu_seconds
            <= stage.backend.usage([stage.name])[stage.name].cpu_seconds
        )
        stage.kill()
        assert not stage.backend.usage([stage.name])

    def test_what_nobody_knows_is_named_and_swept_but_its_log(self, stage: Stage) -> None:
        """After a crash an unknown server is a stray; sweeping frees its name and keeps its log."""
        ready = stage.launch()
        successor = stage.succeed()
        assert stage.name not in successor.strays([stage.name])
        assert stage.name in successor.strays([])
        assert stage.rig.exists(ready.instance)
        successor.sweep(stage.name)
        assert not stage.rig.exists(ready.instance)
        assert stage.name not in successor.strays([])
        assert successor.observe(stage.name, 1) == Gone()
        assert list(successor.log(stage.name, None))
        stage.quiet()
        stage.launch(2)

    def test_servers_of_two_owners_share_a_name(self, stage: Stage) -> None:
        """The end of one owner's server does not affect another owner's server of that name."""
        mine, ready = stage.spec, stage.launch()
        stage.spec = replace(mine, owner=Owner("other"), port=None)
        other = stage.launch(2)
        assert stage.rig.exists(ready.instance)
        assert other.instance != ready.instance
        stage.kill(2)
        assert not stage.rig.exists(other.instance)
        stage.backend.forget(stage.name)
        stage.spec = mine
        assert stage.backend.observe(stage.name, 1) == Seen(answers=True)
        assert list(stage.backend.log(stage.name, None))

    def test_a_refused_launch_leaves_nothing(self, stage: Stage) -> None:
        """A refused launch starts nothing and reports nothing."""
        spec = stage.rig.refused()
        with pytest.raises(BackendRefused, match=r"^cannot "):
            stage.backend.launch(spec, 1)
        assert stage.backend.observe(spec.qualified_name, 1) == Gone()
        stage.quiet()
