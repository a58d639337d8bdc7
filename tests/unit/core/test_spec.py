"""The nouns keep their rules."""

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
def test_a_dns_label_is_a_name(name):
    """Names are what a host, container or pod may be called."""
    assert server_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "Lab", "-lab", "lab-", "la_b", "la.b", "x" * 64, "lab\n", "lab/..", "läb"]
)
def test_anything_else_is_no_name(name):
    """A name that could leave its directory, or be refused by a backend, is refused with the rule."""
    with pytest.raises(ValueError, match="1 to 63"):
        server_name(name)


def test_equal_specs_do_not_differ():
    """Two specs with the same values ask for the same server."""
    spec = ServerSpec(
        server_name("lab"), "/notebooks", env={"A": "1"}, gateway=Gateway("http://g", "ws://g")
    )
    assert spec.differs(replace(spec, env={"A": "1"})) == ()


def test_specs_differ_by_the_names_of_fields():
    """Only names are told: the values may be secret."""
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
def test_an_exit_says_how_it_ended(end, clean, text):
    """Only exit code 0 is good order; each end has its words."""
    assert end.clean is clean
    assert str(end) == text


def test_secrets_are_not_shown():
    """The token, the gateway's credentials and the environment do not get into a log by repr."""
    endpoint = Endpoint("u", "hush", "/", "h", 1, secure=False, password=False, root_dir="/n")
    gateway = Gateway("http://g", "ws://g", auth_token="hush", headers={"Authorization": "hush"})
    spec = ServerSpec(server_name("lab"), "/notebooks", env={"TOKEN": "hush"}, gateway=gateway)
    assert "hush" not in repr((endpoint, spec))


def test_only_a_stopped_and_unwanted_server_is_forgotten():
    """A deleted server is kept until it is proven gone."""
    for state, goal in product(State, Goal):
        snapshot = Snapshot(a_spec("lab"), state, goal, since=0.0, created_at=0.0)
        assert snapshot.forgotten is (state is State.STOPPED and goal is Goal.ABSENT)
        assert snapshot.name == "lab"


def test_nouns_are_frozen():
    """What was handed to a reader never changes under it."""
    with pytest.raises(FrozenInstanceError):
        a_spec().port = 1


def test_a_gateway_is_shown_what_the_user_of_its_server_can_show_and_no_other():
    """Also when the server is revised, and when the store has it of a keeper that did not know of this."""
    plain = Gateway("http://g", "ws://g")
    spec = ServerSpec(server_name("lab"), "/", gateway=plain, user="ada")
    assert spec.gateway == replace(plain, user="ada")
    assert replace(spec, user="bob").gateway.user == "bob"
    assert replace(spec, gateway=plain).gateway.user == "ada"
    stored = TypeAdapter(ServerSpec).dump_python(spec, mode="json")
    del stored["gateway"]["user"]
    assert TypeAdapter(ServerSpec).validate_python(stored) == spec
