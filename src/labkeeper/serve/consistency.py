"""Whether the settings of a keeper fit together, as far as each value alone does not show it."""

from __future__ import annotations

import sys
from urllib.parse import urlsplit

from labkeeper import addresses
from labkeeper.core.errors import SettingsError
from labkeeper.events.webhooks import key_of
from labkeeper.serve.policies import lab_addresses
from labkeeper.settings.model import Settings


def check(chosen: Settings) -> None:
    """Raise SettingsError if settings contradict each other, or this system cannot do them."""
    _check_sleep(chosen)
    if chosen.edge == "off":
        _check_without_edge(chosen)
    else:
        _check_edge(chosen)
    webhook_target(chosen)


def webhook_target(chosen: Settings) -> tuple[str, bytes] | None:
    """Return the URL and the key of the webhook, or None. Raises SettingsError."""
    if chosen.webhook_url is None:
        return None
    url = chosen.webhook_url.get_secret_value()
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise SettingsError("bad setting LABKEEPER_WEBHOOK_URL: must be such as https://host/path")
    if chosen.webhook_secret is None:
        raise SettingsError(
            "LABKEEPER_WEBHOOK_URL is set, but no LABKEEPER_WEBHOOK_SECRET to sign with; "
            "`openssl rand -base64 32` makes one"
        )
    try:
        return url, key_of(chosen.webhook_secret.get_secret_value())
    except ValueError as error:
        raise SettingsError(f"bad setting LABKEEPER_WEBHOOK_SECRET: {error}") from error


def _check_sleep(chosen: Settings) -> None:
    """Raise SettingsError if servers are to sleep, but could not be woken."""
    if chosen.sleep_after and lab_addresses(chosen).mode == "port":
        raise SettingsError(
            "LABKEEPER_SLEEP_AFTER needs Labs behind the edge, which sees their visitors and wakes "
            "them: set neither LABKEEPER_LAB_ADDRESS=port nor LABKEEPER_EDGE=off"
        )


def _check_edge(chosen: Settings) -> None:
    """Raise SettingsError if there can be no edge with these settings."""
    if sys.platform != "linux":
        raise SettingsError("LABKEEPER_EDGE=on requires Linux")
    if chosen.lab_address == "host" and chosen.lab_domain is None:
        raise SettingsError(
            "LABKEEPER_LAB_ADDRESS=host needs a domain: set LABKEEPER_LAB_DOMAIN, "
            "such as labs.example.org"
        )


def _check_without_edge(chosen: Settings) -> None:
    """Raise SettingsError if settings need the edge: the keeper's own server is for development."""
    needing = {
        "LABKEEPER_CERT_FILE": chosen.certificate,
        "LABKEEPER_LAB_DOMAIN": chosen.lab_domain,
        "LABKEEPER_TRUSTED_PROXIES": chosen.trusted_proxies,
    }
    for name, value in needing.items():
        if value:
            raise SettingsError(f"{name} needs the edge, which LABKEEPER_EDGE=off turns off")
    if not addresses.is_loopback(chosen.host):
        raise SettingsError(
            f"cannot listen on {chosen.host} with LABKEEPER_EDGE=off, which is for development on "
            "this machine; turn the edge on, or choose LABKEEPER_HOST=127.0.0.1"
        )
