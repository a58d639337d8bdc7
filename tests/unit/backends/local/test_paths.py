"""The paths of specs: root directories and files of this machine."""

from __future__ import annotations

import os
import pwd

import pytest

from labkeeper.backends.local.paths import Paths, resolved
from labkeeper.core.access import ANYBODY, Caller, Scope, TokenLimits
from labkeeper.core.errors import InvalidSpec, NotAllowed
from labkeeper.schema.requests.servers import Defaults, ServerRequest

MANAGER = Caller("token:m", Scope.MANAGE)
OURSELVES = pwd.getpwuid(os.geteuid()).pw_name
GATEWAY = "http://g:1"
DEFAULTS = Defaults("127.0.0.1", 8888)


@pytest.fixture
def notebooks(tmp_path):
    """A notebook directory with a directory, a file, and two links."""
    root = tmp_path / "notebooks"
    (root / "inner").mkdir(parents=True)
    (root / "ca.pem").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "key.pem").touch()
    (root / "out").symlink_to(tmp_path / "other")
    (root / "about").symlink_to(root / "inner")
    return root


@pytest.fixture
def paths(notebooks):
    return Paths(notebooks)


def made(paths, caller=ANYBODY, **fields):
    return ServerRequest.model_validate(fields).spec(DEFAULTS, caller, paths.validate)


# Roots


def test_a_root_must_be_within_the_notebook_directory_or_allowed_roots(notebooks, paths, tmp_path):
    assert made(paths).root_dir == str(notebooks)
    assert made(paths, root_dir="inner").root_dir == str(notebooks / "inner")
    both = Paths(notebooks, (notebooks, tmp_path / "other"))
    assert made(both, root_dir=str(tmp_path / "other")).root_dir == str(tmp_path / "other")


@pytest.mark.parametrize("caller", [MANAGER, ANYBODY])
@pytest.mark.parametrize(
    "root", ["..", "inner/../..", "/", "/etc", "out", "/no/such/place", "../notebooks-of-another"]
)
def test_a_root_outside_is_refused_whether_or_not_it_exists(notebooks, paths, root, caller):
    """The error names the allowed roots, and does not reveal a link's target."""
    (notebooks.parent / "notebooks-of-another").mkdir()
    with pytest.raises(InvalidSpec) as caught:
        made(paths, caller, root_dir=root)
    (mistake,) = caught.value.details["errors"]
    rule = f"must be within {notebooks} (LABKEEPER_ALLOWED_ROOTS), after links are resolved"
    assert mistake == {"field": "root_dir", "rule": rule}


def test_the_target_of_a_linked_root_cannot_contain_control_characters(notebooks, paths):
    (notebooks / "a\x1b]0;b").mkdir()
    (notebooks / "plain").symlink_to(notebooks / "a\x1b]0;b")
    with pytest.raises(InvalidSpec, match="without control characters, after links are resolved"):
        made(paths, root_dir="plain")


def test_links_in_a_root_are_resolved(notebooks, paths, tmp_path):
    assert made(paths, root_dir="about").root_dir == str(notebooks / "inner")
    (tmp_path / "link").symlink_to(notebooks)
    assert made(Paths(tmp_path / "link"), root_dir="inner").root_dir == str(notebooks / "inner")


def test_each_user_has_its_own_root(tmp_path):
    for name in ("alice", "bob", OURSELVES):
        (tmp_path / name).mkdir()
    paths = Paths(tmp_path / "%u")
    assert made(paths, user="alice").root_dir == str(tmp_path / "alice")
    assert made(paths).root_dir == str(tmp_path / OURSELVES)
    for root in (tmp_path / "bob", "../bob", tmp_path):
        with pytest.raises(InvalidSpec, match=f"must be within {tmp_path / 'alice'} "):
            made(paths, user="alice", root_dir=str(root))


def test_a_user_without_a_name_is_represented_by_its_uid(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 2**31 - 7)
    assert resolved(tmp_path / "%u", None) == str(tmp_path / str(2**31 - 7))


def test_a_token_limited_to_a_user_cannot_use_another_users_root(tmp_path):
    for name in ("alice", "bob"):
        (tmp_path / name).mkdir()
    paths = Paths(tmp_path / "%u")
    alice = Caller("token:a", Scope.MANAGE, TokenLimits(users=("alice",)))
    spec = made(paths, alice)
    assert (spec.user, spec.root_dir) == ("alice", str(tmp_path / "alice"))
    with pytest.raises(NotAllowed, match="your token is for alice"):
        made(paths, alice, user="bob")


# Files


def test_every_caller_may_use_files_within_the_roots_and_links_are_resolved(notebooks, paths):
    (notebooks / "link.pem").symlink_to(notebooks / "ca.pem")
    spec = made(
        paths,
        MANAGER,
        gateway_url=GATEWAY,
        gateway_ca_certs=str(notebooks / "link.pem"),
    )
    assert spec.gateway.ca_certs == str(notebooks / "ca.pem")


@pytest.mark.parametrize(
    "path", ["{}/other/key.pem", "{}/notebooks/out/key.pem", "{}/no-such-file", "/etc/passwd"]
)
@pytest.mark.parametrize("field", ["gateway_ca_certs", "gateway_client_cert"])
def test_other_files_require_admin_and_others_do_not_learn_whether_they_exist(
    notebooks, paths, tmp_path, field, path
):
    asked = {"gateway_url": GATEWAY, field: path.format(tmp_path)}
    with pytest.raises(NotAllowed) as caught:
        made(paths, MANAGER, **asked)
    assert caught.value.details == {"scope": "admin"}
    assert caught.value.message == (
        f"cannot use a file outside of {notebooks} as {field}:"
        " that needs the scope 'admin', and yours is 'manage'"
    )
    if "no-such" in path:
        with pytest.raises(InvalidSpec, match="must be a file that the keeper can read"):
            made(paths, **asked)
    else:
        assert made(paths, **asked).gateway is not None
