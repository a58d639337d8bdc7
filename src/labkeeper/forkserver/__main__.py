"""Run as `python .../forkserver fork FD` or `python .../forkserver exec FD`; FD is a Unix socket.

`fork` listens on the socket; `exec` reads its launch from it.
"""

import sys
import types

if not __package__:
    # Run as a directory, by an interpreter without this labkeeper: the siblings get a unique
    # package name, and their directory leaves the path, so that no server imports them by a shorter
    # name.
    __package__, __spec__ = "labkeeper_forkserver", None
    _module = types.ModuleType(__package__)
    _module.__path__ = [sys.path.pop(0)]
    sys.modules[__package__] = _module

from . import main, server

if __name__ == "__main__":
    server.end_fast()
    _descriptor = int(sys.argv[2])
    # The fork server returns only in its children; each becomes a server with a clean stack.
    server.become_server(
        *(main.serve(_descriptor) if sys.argv[1] == "fork" else server.receive(_descriptor))
    )
