"""Run as `python .../forkserver MODE FD`; FD is a Unix socket.

`fork` listens on the socket; `exec` reads its launch from it; `kernels` forks zygotes for it, and
`zygote` is one. For these two, the names of libraries to load follow, separated by commas.
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

if __name__ == "__main__":
    _mode, _descriptor = sys.argv[1], int(sys.argv[2])
    # Each of them returns only in its children, so that they begin with a clean stack. Kernels must
    # not have the modules of servers.
    if _mode in {"kernels", "zygote"}:
        from . import forked_kernel, kernel_loader, zygote

        _serve = kernel_loader.serve if _mode == "kernels" else kernel_loader.load_for
        _names = [name for name in sys.argv[3].split(",") if name]
        _connection, _loaded = _serve(_descriptor, _names)
        forked_kernel.become_kernel(zygote.run(_connection, _loaded), _loaded)
    else:
        from . import main, server

        server.end_fast()
        server.become_server(
            main.serve(_descriptor) if _mode == "fork" else server.receive(_descriptor)
        )
