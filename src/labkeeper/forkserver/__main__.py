"""Run as `python .../forkserver fork FD` or `python .../forkserver exec FD`; FD is an open Unix socket.

It listens in the first case; in the second one the launch to run comes out of it.
"""

import sys
import types

if not __package__:
    # Run as a directory, by an interpreter that has no labkeeper, or another one: our siblings get a name that nobody else has,
    # and our directory leaves the path again, so that no import of a server ever finds them under a shorter one.
    __package__, __spec__ = "labkeeper_forkserver", None
    _module = types.ModuleType(__package__)
    _module.__path__ = [sys.path.pop(0)]
    sys.modules[__package__] = _module

from . import main, server

if __name__ == "__main__":
    server.end_fast()
    _descriptor = int(sys.argv[2])
    # The fork server returns only in its children: each becomes a server with nothing of the fork server's on its stack.
    server.become_server(*(main.serve(_descriptor) if sys.argv[1] == "fork" else server.receive(_descriptor)))
