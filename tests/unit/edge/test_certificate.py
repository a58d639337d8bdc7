"""The certificate that keepers read and push: its renewal, and errors in its files."""

from __future__ import annotations

import pytest
import structlog
from cryptography.hazmat.primitives import serialization

from labkeeper.core.errors import SettingsError
from labkeeper.serve.edge.certificate import Certificate, check


@pytest.fixture
def write(authority, tmp_path):
    """Write a new certificate and key over the previous ones, and return their paths."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def write():
        leaf = authority.issue_cert("127.0.0.1")
        for path, content in (
            (key, leaf.private_key_pem.bytes()),
            (cert, leaf.cert_chain_pems[0].bytes()),
        ):
            fresh = path.with_suffix(".new")
            fresh.write_bytes(content)
            fresh.chmod(0o600)
            fresh.replace(path)
        return cert, key

    return write


def test_a_renewed_pair_is_pushed_and_an_unchanged_one_is_not(write):
    certificate = Certificate(*write(), hsts=True)
    before = certificate.message()
    assert not certificate.renew()
    cert, key = write()
    assert certificate.renew()
    after = certificate.message()
    assert after == before | {"chain": cert.read_text(), "key": key.read_text()} != before


def test_an_unusable_pair_is_reported_once_and_the_previous_one_stays_in_use(write):
    cert, key = write()
    certificate = Certificate(cert, key, hsts=True)
    before = certificate.message()
    with structlog.testing.capture_logs() as log:
        for broken in (lambda: key.write_text("no key"), key.unlink):
            broken()
            assert not any(certificate.renew() for _ in range(3))
        assert certificate.message() == before
        write()
        assert certificate.renew()
    assert [entry["log_level"] for entry in log] == ["warning", "warning", "info"]
    assert "must be PEM" in log[0]["reason"]
    assert "cannot read the file" in log[1]["reason"]


USES = [
    lambda cert, key: Certificate(cert, key, hsts=True),
    lambda cert, key: check(cert, key, "LABKEEPER_"),
]


@pytest.mark.parametrize("use", USES, ids=["edge", "servers"])
def test_an_unusable_pair_at_startup_is_a_settings_error(use, write, authority, tmp_path):
    cert, key = write()
    use(cert, key)
    other = tmp_path / "other.pem"
    other.write_bytes(authority.issue_cert("127.0.0.1").private_key_pem.bytes())
    with pytest.raises(SettingsError, match="they do not belong together"):
        use(cert, other)
    secret = serialization.load_pem_private_key(key.read_bytes(), None).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"word"),
    )
    other.write_bytes(secret)
    with pytest.raises(SettingsError, match=r"\(LABKEEPER_KEY_FILE\): it is encrypted"):
        use(cert, other)
    absent = tmp_path / "absent.pem"
    with pytest.raises(SettingsError, match=r"cannot read the file .*pem \(LABKEEPER_CERT_FILE\)"):
        use(absent, key)
    with pytest.raises(SettingsError, match="must be PEM"):
        use(key, cert)


@pytest.mark.parametrize(("mode", "warnings"), [(0o600, 0), (0o640, 1), (0o604, 1)])
def test_a_key_readable_by_others_causes_a_warning(write, mode, warnings):
    cert, key = write()
    key.chmod(mode)
    with structlog.testing.capture_logs() as log:
        Certificate(cert, key, hsts=False)
    assert len(log) == warnings
