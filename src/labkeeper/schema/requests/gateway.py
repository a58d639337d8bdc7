"""The nested fields of a server's kernel gateway."""

from __future__ import annotations

from urllib.parse import urlsplit, urlunsplit

from pydantic import Field

from labkeeper.core.spec import Gateway
from labkeeper.schema.requests.base import ABSENT, SECRET, Request
from labkeeper.schema.types import Headers, HttpUrl, Line, PathText, Seconds, WebsocketUrl


class GatewayFields(Request):
    """A Jupyter kernel gateway and its options."""

    url: HttpUrl = Field(ABSENT, description="Jupyter kernel gateway that runs the kernels.")
    ws_url: WebsocketUrl = Field(
        ABSENT, description="The gateway's websocket URL; made from its URL when not given."
    )
    auth_token: Line = Field(
        ABSENT, description="Token that the gateway asks for.", json_schema_extra=SECRET
    )
    auth_scheme: Line = Field(
        ABSENT, description="Authentication scheme of the gateway's token; `token` when not given."
    )
    headers: Headers = Field(
        {}, description="HTTP headers of each request to the gateway.", json_schema_extra=SECRET
    )
    ca_certs: PathText = Field(
        ABSENT, description="File with certificates to trust beside the system's."
    )
    client_cert: PathText = Field(
        ABSENT, description="File with the certificate to show to the gateway."
    )
    client_key: PathText = Field(
        ABSENT, description="File with the key of the certificate that is shown to the gateway."
    )
    validate_cert: bool = Field(True, description="Whether the gateway's certificate is checked.")
    connect_timeout: Seconds = Field(ABSENT, description="Seconds to connect to the gateway.")
    request_timeout: Seconds = Field(ABSENT, description="Seconds for a request to the gateway.")
    required: bool = Field(
        True,
        description=(
            "Whether the start fails when the gateway cannot be used; "
            "if not, `gateway` of the answer says so."
        ),
    )

    def at(self, url: str) -> Gateway:
        """Return the gateway at a URL, with these options."""
        headers, scheme, token = dict(self.headers), self.auth_scheme, self.auth_token
        given = next((header for header in headers if header.lower() == "authorization"), None)
        if given is not None and token is None:
            # Jupyter overwrites a given Authorization header; pass its value as scheme and token.
            scheme, _, token = headers.pop(given).partition(" ")
        own = {"url", "ws_url", "headers", "auth_scheme", "auth_token"}
        rest = {name: getattr(self, name) for name in type(self).model_fields.keys() - own}
        return Gateway(
            url,
            self.ws_url or ws_url_of(url),
            headers=headers,
            auth_scheme=scheme,
            auth_token=token,
            **rest,
        )


def ws_url_of(url: str) -> str:
    """Return a gateway's websocket URL: only the scheme differs (Jupyter replaces every "http")."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(scheme={"http": "ws", "https": "wss"}[parts.scheme]))
