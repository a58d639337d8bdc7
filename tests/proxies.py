"""Other proxies in front of the edge, configured as the documentation says."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from pathlib import Path

import httpx

import environments
from certificates import DOMAIN, Resolved
from harness import free_port, until

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "put-behind-a-proxy.md"

NGINX = """
daemon off;
user {user};
pid {directory}/nginx.pid;
error_log {directory}/nginx.log;
events {{}}
http {{
  access_log off;
  client_body_temp_path {directory};
  proxy_temp_path {directory};
  fastcgi_temp_path {directory};
  uwsgi_temp_path {directory};
  scgi_temp_path {directory};
  {documented}
}}
"""
CADDY = """
{{
  admin off
  auto_https disable_redirects
  servers {{
    protocols h1 h2
  }}
}}
{documented}
"""


def documented(name, directory, edge, port):
    """Return the configurations of a proxy in the documentation, with our ports and files."""
    section = PAGE.read_text().partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```\w+\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    assert blocks
    replaced = {
        "/etc/labkeeper/": f"{directory}/",
        "127.0.0.1:8000": f"127.0.0.1:{edge}",
        "listen 443": f"listen 127.0.0.1:{port}",
        '":443"': f'"127.0.0.1:{port}"',
        "labs.example.org, *.labs.example.org {": f"https://labs.example.org:{port}, "
        f"https://*.labs.example.org:{port} {{\n  bind 127.0.0.1",
    }
    for old, new in replaced.items():
        blocks = [block.replace(old, new) for block in blocks]
    return blocks


def nginx(directory, edge, port):
    (block,) = documented("nginx", directory, edge, port)
    user = "root" if os.geteuid() == 0 else "nobody"
    text = NGINX.format(user=user, directory=directory, documented=block)
    (directory / "nginx.conf").write_text(text)
    return ["nginx", "-c", directory / "nginx.conf", "-p", directory]


def caddy(directory, edge, port):
    (block,) = documented("Caddy", directory, edge, port)
    (directory / "Caddyfile").write_text(CADDY.format(documented=block))
    return [_program("caddy"), "run", "--config", directory / "Caddyfile"]


def traefik(directory, edge, port):
    static, dynamic = documented("Traefik", directory, edge, port)
    (directory / "static.yml").write_text(static)
    (directory / "traefik.yml").write_text(dynamic)
    return [_program("traefik"), f"--configfile={directory / 'static.yml'}"]


def _program(name):
    return environments.create(environments.PROXIES) / "bin" / name


PROXIES = {"nginx": nginx, "caddy": caddy, "traefik": traefik}


@contextlib.contextmanager
def running(name, authority, edge):
    """Run a proxy with an authority's certificate in front of an edge's port; yield its own."""
    directory, port = authority.directory, free_port()
    command = PROXIES[name](directory, edge, port)
    env = {"PATH": os.environ["PATH"], "HOME": str(directory)}
    with (directory / f"{name}.out").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=directory)
    try:
        with httpx.Client(transport=Resolved(verify=authority.context())) as client:
            url = f"https://{DOMAIN}:{port}/edge/healthz"
            until(lambda: passes(client, url, process), what=f"{name} to pass requests on")
        yield port
    finally:
        process.terminate()
        process.wait()


def passes(client, url, process):
    assert process.poll() is None
    # It may listen before it has its certificate, and have that before it has its rules.
    with contextlib.suppress(httpx.TransportError):
        return client.get(url).status_code == 200
    return False
