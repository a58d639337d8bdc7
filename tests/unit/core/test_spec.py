"""Rules of specs, endpoints, exits and snapshots."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from itertools import product

import pytest
from pydantic import TypeAdapter

from labkeeper.core.lifecycle import Goal, State
from labkeeper.core.server import Endpoint, Exit, Snapshot
from labkeeper.core.spec import Gateway, ServerSpec, server_name
from labkeeper.testing.fakes import a_spec


@pytest.mark.parametrize("name", ["a", "lab", "lab-1", "0", "x" * 63])
def test_a_dns_label_is_a_valid_name(name):
    """Hosts, containers and pods have such names."""
    assert server_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "Lab", "-lab", "lab-", "la_b", "la.b", "x" * 64, "lab\n", "lab/..", "läb"]
)
def test_other_names_are_refused(name):
    """They could leave their directory, or be refused by a backend."""
    with pytest.raises(ValueError, match="1 to 63"):
        server_name(name)


def test_equal_specs_do_not_differ():
    spec = ServerSpec(
        server_name("lab"), "/notebooks", env={"A": "1"}, gateway=Gateway("http://g", "ws://g")
    )
    assert spec.differs(replace(spec, env={"A": "1"})) == ()


def test_differences_are_field_names():
    """Values may be secret."""
    spec = ServerSpec(server_name("lab"), "/notebooks", env={"TOKEN": "secret"})
    assert spec.differs(replace(spec, port=8888, env={})) == ("port", "env")


@pytest.mark.parametrize(
    ("end", "clean", "text"),
    [
        (Exit(code=0), True, "exit code 0"),
        (Exit(code=1), False, "exit code 1"),
        (Exit(signal="SIGKILL"), False, "killed by SIGKILL"),
        (Exit(), False, "ended, cause unknown"),
    ],
)
def test_an_exit_describes_itself(end, clean, text):
    """Only exit code 0 is clean."""
    assert end.clean is clean
    assert str(end) == text


def test_secrets_are_not_in_the_repr():
    """Otherwise they could reach a log."""
    endpoint = Endpoint("u", "hush", "/", "h", 1, secure=False, password=False, root_dir="/n")
    gateway = Gateway("http://g", "ws://g", auth_token="hush", headers={"Authorization": "hush"})
    spec = ServerSpec(server_name("lab"), "/notebooks", env={"TOKEN": "hush"}, gateway=gateway)
    assert "hush" not in repr((endpoint, spec))


def test_only_a_stopped_server_that_is_to_be_deleted_is_forgotten():
    """Until its end is proven, a deleted server is kept."""
    for state, goal in product(State, Goal):
        snapshot = Snapshot(a_spec("lab"), state, goal, since=0.0, created_at=0.0)
        assert snapshot.forgotten is (state is State.STOPPED and goal is Goal.ABSENT)
        assert snapshot.name == "lab"


def test_specs_are_frozen():
    with pytest.raises(FrozenInstanceError):
        a_spec().port = 1


def test_a_gateway_has_the_user_of_its_server():
    """Also in a revised spec, and in one that was stored before gateways had users."""
    plain = Gateway("http://g", "ws://g")
    spec = ServerSpec(server_name("lab"), "/", gateway=plain, user="ada")
    assert spec.gateway == replace(plain, user="ada")
    assert replace(spec, user="bob").gateway.user == "bob"
    assert replace(spec, gateway=plain).gateway.user == "ada"
    stored = TypeAdapter(ServerSpec).dump_python(spec, mode="json")
    del stored["gateway"]["user"]
    assert TypeAdapter(ServerSpec).validate_python(stored) == spec
