"""What the doctor says of certificates."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme

from certificates import NAMES, Authority
from labkeeper.doctor import certificates
from labkeeper.doctor.case import Case
from labkeeper.doctor.certificates import tls, validity
from labkeeper.serve.edge import certificate
from labkeeper.settings.model import Settings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the edge needs Linux")


def findings(directory, **chosen):
    return list(tls(Case(Settings(state_dir=directory / "state", **chosen), "1")))


def only(found):
    (one,) = found
    return one


def issue(directory, *, begins=-1, ends=1):
    """Write a certificate that is valid from and until some days from now; return its settings."""
    now = datetime.now(UTC)
    times = {"not_before": now + timedelta(begins), "not_after": now + timedelta(ends)}
    leaf = trustme.CA().issue_cert(*NAMES, **times)
    cert_file, key_file = directory / "cert.pem", directory / "key.pem"
    leaf.cert_chain_pems[0].write_to_path(cert_file)
    leaf.private_key_pem.write_to_path(key_file)
    key_file.chmod(0o600)
    return {"cert_file": cert_file, "key_file": key_file}


def test_a_certificate_says_for_whom_and_until_when_it_is_valid(tmp_path):
    files = issue(tmp_path, begins=-2, ends=100)
    found = validity(*files.values())
    until, since = (datetime.fromtimestamp(at, UTC) for at in (found.ends, found.begins))
    assert abs((until - datetime.now(UTC)).days - 100) <= 1
    assert abs((datetime.now(UTC) - since).days - 2) <= 1
    assert found.names == ("labs.example.org", "*.labs.example.org", "localhost", "127.0.0.1")


@pytest.mark.parametrize(
    ("days", "status", "says"),
    [
        ((-1, 100), "ok", "is valid until"),
        ((-1, 5), "warning", "expires soon, at"),
        ((-9, -2), "problem", "expired at"),
        ((2, 100), "problem", "is not valid before"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "lab_"])
def test_the_time_of_a_certificate_is_judged(tmp_path, prefix, days, status, says):
    files = issue(tmp_path, begins=days[0], ends=days[1])
    given = {f"{prefix}{name}": path for name, path in files.items()}
    first = findings(tmp_path, **given)[0]
    assert (first.status, says in first.message) == (status, True)
    assert (first.mend is None) == (status == "ok")


def test_certbot_renews_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(certificates, "_CERTBOT", tmp_path.resolve())
    assert only(findings(tmp_path, **issue(tmp_path, ends=-1))).mend == "sudo certbot renew"


def test_a_key_that_others_can_read_is_a_warning_that_the_command_mends(tmp_path):
    files = issue(tmp_path, ends=100)
    files["key_file"].chmod(0o644)
    found = only(findings(tmp_path, **files))
    assert found.status == "warning"
    subprocess.run(found.mend, shell=True, check=True)
    assert only(findings(tmp_path, **files)).status == "ok"
    assert not certificate.is_readable_by_others(tmp_path / "none")


@pytest.mark.programs("openssl")
def test_missing_files_are_made_by_the_command(tmp_path):
    files = {"cert_file": tmp_path / "the cert.pem", "key_file": tmp_path / "key.pem"}
    found = only(findings(tmp_path, **files))
    assert (found.status, "cannot read the file" in found.message) == ("problem", True)
    subprocess.run(found.mend, shell=True, check=True, capture_output=True)
    found = only(findings(tmp_path, **files))
    assert (found.status, "for localhost" in found.message) == ("ok", True)


def test_one_missing_file_is_not_replaced_by_another_certificate(tmp_path):
    files = issue(tmp_path, ends=100)
    files["key_file"].unlink()
    found = only(findings(tmp_path, **files))
    assert (found.status, "openssl" in found.mend) == ("problem", False)


@pytest.mark.programs("openssl")
def test_an_encrypted_key_is_written_in_the_clear_by_the_command(tmp_path):
    files = issue(tmp_path, ends=100)
    clear, key = tmp_path / "was.pem", files["key_file"]
    key.rename(clear)
    command = ["openssl", "pkey", "-in", clear, "-out", key, "-aes256", "-passout", "pass:secret"]
    subprocess.run(command, check=True)
    found = only(findings(tmp_path, **files))
    assert (found.status, "is encrypted" in found.message) == ("problem", True)
    command = found.mend.partition(" && ")[0].replace(" -out", " -passin pass:secret -out")
    subprocess.run(command, shell=True, check=True)
    assert f"export LABKEEPER_KEY_FILE={key}.clear" in found.mend
    files["key_file"] = Path(f"{key}.clear")
    files["key_file"].chmod(0o600)
    assert only(findings(tmp_path, **files)).status == "ok"


def test_files_that_do_not_belong_together_are_a_problem(tmp_path):
    files = issue(tmp_path, ends=100)
    trustme.CA().issue_cert("x").private_key_pem.write_to_path(files["key_file"])
    found = only(findings(tmp_path, **files))
    assert (found.status, "do not belong together" in found.message) == ("problem", True)
    assert found.mend.endswith("both as PEM")


@pytest.mark.root
def test_files_of_root_cannot_be_read_by_another_user(passable, user):
    files = Authority(passable).issue()
    os.setresuid(user.pw_uid, user.pw_uid, 0)
    try:
        found = only(findings(passable, **files))
    finally:
        os.setresuid(0, 0, 0)
    assert (found.status, "Permission denied" in found.message) == ("problem", True)
    assert found.mend.startswith("sudo chown $(id -u) ")


def test_what_clients_would_refuse_is_a_problem(tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("unsupported certificate purpose")

    monkeypatch.setattr(certificates, "validity", refuse)
    found = only(findings(tmp_path, **issue(tmp_path)))
    assert (found.status, "clients would refuse" in found.message) == ("problem", True)


@pytest.mark.parametrize(("host", "status"), [("127.0.0.1", "ok"), ("0.0.0.0", "warning")])
def test_without_tls_only_this_machine_should_reach_the_api(tmp_path, host, status):
    assert only(findings(tmp_path, host=host)).status == status
