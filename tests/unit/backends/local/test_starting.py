"""What the launch of a server has from its spec and from the backend's options."""

from __future__ import annotations

from pathlib import Path

import pytest

from labkeeper.backends.local.limits import ControlGroups
from labkeeper.backends.local.options import LocalOptions
from labkeeper.backends.local.ports import hold_port
from labkeeper.backends.local.sites import Sites
from labkeeper.backends.local.starting import Starter
from labkeeper.core.spec import Gateway, ServerName, ServerSpec
from labkeeper.jupyter.client import JupyterClient
from labkeeper.threads import ThreadGroup


class TakenError(Exception):
    """Ends a start once its launch is known."""


class TakingLauncher:
    """Keeps the launch that it gets, and launches nothing."""

    def launch(self, request, _log, _hold):
        self.request = request
        raise TakenError


@pytest.fixture
def launch_of(tmp_path):
    """Return a function from a spec and options of the backend to the launch."""

    def launch_of(spec, **options):
        launcher, run = TakingLauncher(), tmp_path / "run"
        groups = ControlGroups(run)
        chosen = LocalOptions(
            python=Path("/no-python"), runtime_dir=run, log_dir=tmp_path / "logs", **options
        )
        sites = Sites(chosen, groups, ThreadGroup(), JupyterClient(), lambda _: None)
        with hold_port(spec) as hold, pytest.raises(TakenError):
            Starter(sites, launcher).start(spec, 1, hold)
        groups.remove(spec.qualified_name)
        return launcher.request

    return launch_of


@pytest.mark.parametrize(
    ("of_keeper", "of_spec", "expected"),
    [
        ("fork", "fork", "fork"),
        ("fork", "exec", "exec"),
        ("exec", "exec", "exec"),
        # The spec was stored before the keeper was told to execute kernels.
        ("exec", "fork", "exec"),
    ],
)
def test_kernels_are_forked_if_both_the_keeper_and_the_spec_allow_it(
    launch_of, tmp_path, of_keeper, of_spec, expected
):
    spec = ServerSpec(ServerName("x"), str(tmp_path), kernels_by=of_spec)
    assert launch_of(spec, kernels_by=of_keeper).kernels_by == expected


def test_a_server_with_a_gateway_keeps_the_choice_of_its_spec(launch_of, tmp_path):
    spec = ServerSpec(ServerName("x"), str(tmp_path), gateway=Gateway("http://g", "ws://g"))
    assert launch_of(spec).kernels_by == "fork"
