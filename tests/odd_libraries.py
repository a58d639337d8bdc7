"""Small modules that do at their import what libraries do, and whether kernels can share them."""

from __future__ import annotations

import compileall

FIT = {
    "odd_plain": "value = 42",
    "odd_user": "import odd_plain\nvalue = odd_plain.value",
    "odd_reader": "import os\nvalue = os.environ.get('ODD_READ', 'unset')",
    "odd_setter": "import os\nos.environ['ODD_SET'] = '42'",
    "odd_looker": """
shell = get_ipython()
value = shell.__class__.__name__, "IPKernelApp" in shell.config, __IPYTHON__
del shell
""",
    "odd_file": "import os\nkept = open(__file__), open(os.devnull)",
    "odd_ended": """
import subprocess, threading
subprocess.run(["true"])
thread = threading.Thread(target=int)
thread.start()
thread.join()
""",
}
"""Sources of libraries that kernels can share, by name."""

UNFIT = {
    "odd_absent": (None, "importing it raises ModuleNotFoundError"),
    "odd_raiser": ("1 / 0", "importing it raises ZeroDivisionError"),
    "odd_leaver": ("raise SystemExit", "importing it raises SystemExit"),
    "odd_thread": (
        """
import threading
ended = threading.Event()
thread = threading.Thread(target=ended.wait, daemon=True)
thread.start()
""",
        r"importing it starts a thread \(.*\)",
    ),
    "odd_program": (
        "import subprocess\nprogram = subprocess.Popen(['sleep', '1000'])",
        r"importing it starts a program \(\d+\)",
    ),
    "odd_orphan": (
        "import os\nos.system('setsid sleep 1000 > /dev/null 2>&1 &')",
        r"importing it starts a program \(\d+\)",
    ),
    "odd_place": (
        "import os\nos.chdir('/')",
        "importing it changes the working directory, the umask or signal handlers",
    ),
    "odd_handler": (
        "import signal\nsignal.signal(signal.SIGUSR1, print)",
        "importing it changes the working directory, the umask or signal handlers",
    ),
    "odd_umask": (
        "import os\nos.umask(0o027)",
        "importing it changes the working directory, the umask or signal handlers",
    ),
    "odd_socket": (
        "import socket\nkept = socket.socket()",
        r"importing it keeps something open \(socket:\[\d+\]\)",
    ),
    "odd_pipe": ("import os\nends = os.pipe()", r"importing it keeps something open \(pipe:.*\)"),
    "odd_memory": (
        "import mmap\nmemory = mmap.mmap(-1, 4096)",
        r"importing it shares memory with other processes \(.*\)",
    ),
    "odd_mapped": (
        """
import mmap, tempfile
with tempfile.TemporaryFile() as file:
    file.truncate(4096)
    memory = mmap.mmap(file.fileno(), 4096)
""",
        r"importing it shares memory with other processes \(.*\)",
    ),
    "odd_temporary": (
        "import tempfile\ndirectory = tempfile.mkdtemp()",
        "importing it leaves temporary files",
    ),
    "odd_magic": (
        "get_ipython().register_magic_function(print, magic_name='odd')",
        "importing it raises AttributeError",
    ),
    "odd_quiet_magic": (
        """
import contextlib
with contextlib.suppress(AttributeError):
    get_ipython().register_magic_function(print, magic_name="quiet")
""",
        "it uses the kernel that imports it",
    ),
    "odd_keeper": ("shell = get_ipython()", "it uses the kernel that imports it"),
    "odd_kernel": (
        "from ipykernel.kernelapp import IPKernelApp\nvalue = IPKernelApp.initialized()",
        "it uses the kernel that imports it",
    ),
    "odd_main": ("import __main__", "it uses the kernel that imports it"),
    "odd_quitter": ("import os\nos._exit(3)", r"importing it ends the process \(wait status 768\)"),
    "odd_crasher": (
        "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
        r"importing it ends the process \(wait status (11|139)\)",
    ),
}
"""Sources of libraries that they cannot share, and patterns of the reasons, by name."""

PRELOADED = [
    # First, so that the other ones are not imported again to find the next unfit one.
    *("odd_thread", "odd_magic", "odd_memory"),
    *("odd_reader", "odd_setter", "odd_looker"),
    *("numpy", "pandas", "matplotlib.pyplot"),
]
"""Libraries to load for kernels; the first ones are unfit."""


def write_odd_libraries(directory):
    """Write the modules, compiled: that a loader compiles them would count as a change on disk."""
    sources = FIT | {name: source for name, (source, _) in UNFIT.items() if source is not None}
    for name, source in sources.items():
        (directory / f"{name}.py").write_text(source)
    assert compileall.compile_dir(directory, quiet=1)
