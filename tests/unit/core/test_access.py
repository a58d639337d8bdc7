"""Scopes, and the servers that a token is limited to."""

from __future__ import annotations

import pytest

from labkeeper.core.access import ANYBODY, EVERYTHING, Caller, Scope, TokenLimits
from labkeeper.core.errors import NotAllowed
from labkeeper.core.lifecycle import Goal, State
from labkeeper.core.server import Snapshot
from labkeeper.core.spec import ServerSpec


def spec(name="lab", **fields):
    return ServerSpec(name=name, root_dir="/", **fields)


def test_each_scope_includes_the_scopes_below_it():
    covered = [[scope.covers(needed) for needed in Scope] for scope in Scope]
    assert covered == [[True, False, False], [True, True, False], [True, True, True]]


@pytest.mark.parametrize(
    ("limits", "held"),
    [
        (EVERYTHING, True),
        (TokenLimits(servers=("lab",)), True),
        (TokenLimits(servers=("x", "l?b")), True),
        (TokenLimits(servers=("la",)), False),
        (TokenLimits(labels={"team": "blue"}), True),
        (TokenLimits(labels={"team": "blue", "more": ""}), False),
        (TokenLimits(users=("ada", "bob")), True),
        (TokenLimits(users=("bob",)), False),
        (TokenLimits(("*",), {"team": "red"}), False),
    ],
)
def test_a_server_is_covered_if_all_limits_cover_it(limits, held):
    made = spec(labels={"team": "blue", "x": "y"}, user="ada")
    caller = Caller("token:t", Scope.MANAGE, limits)
    assert caller.sees(Snapshot(made, State.RUNNING, Goal.UP, 1.0, 1.0)) is held
    if held:
        caller.needs_spec(made)
    else:
        with pytest.raises(NotAllowed, match="your token is for"):
            caller.needs_spec(made)


def test_a_refusal_names_the_required_scope():
    with pytest.raises(
        NotAllowed, match="that needs the scope 'admin', and yours is 'read'"
    ) as caught:
        Caller("token:t", Scope.READ).needs(Scope.ADMIN, "do it", variable="X")
    assert caught.value.details == {"scope": "admin", "variable": "X"}
    with pytest.raises(NotAllowed, match="limited to some"):
        Caller("token:t", Scope.READ, TokenLimits(servers=("x",))).needs_everything("do it")
    ANYBODY.needs(Scope.ADMIN, "do it")
    ANYBODY.needs_everything("do it")


def test_the_user_that_a_server_runs_as():
    """Only admins may choose any user; a token's users are its choice, the first its default."""
    manager = Caller("token:t", Scope.MANAGE)
    limited = Caller("token:t", Scope.MANAGE, TokenLimits(users=("ada", "bob")))
    assert [manager.user(None), manager.user(None, "lab"), manager.user("lab", "lab")] == [
        None,
        "lab",
        "lab",
    ]
    assert [limited.user(None, "lab"), limited.user("bob", "lab"), ANYBODY.user("eve", "lab")] == [
        "ada",
        "bob",
        "eve",
    ]
    for caller, asked in ((manager, "eve"), (limited, "lab")):
        with pytest.raises(NotAllowed, match=f"as user '{asked}'"):
            caller.user(asked, "lab")
