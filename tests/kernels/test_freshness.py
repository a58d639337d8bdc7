"""Kernels share nothing with their siblings, and see what is on disk when they start."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

from kernel import models

RANDOM = """
import multiprocessing, os, random, secrets, ssl, sys, tempfile, uuid

values = {
    "random": random.random(),
    "Random": random.Random().random(),
    "SystemRandom": random.SystemRandom().random(),
    "uuid1": uuid.uuid1().hex,
    "uuid4": uuid.uuid4().hex,
    "secrets": secrets.token_hex(),
    "urandom": os.urandom(8).hex(),
    "openssl": ssl.RAND_bytes(8).hex(),
    "temporary name": next(tempfile._get_candidate_names()),
    "temporary file": os.path.basename(tempfile.mktemp()),
    "multiprocessing": multiprocessing.current_process().authkey.hex(),
    "session": get_ipython().kernel.session.session,
    "key": get_ipython().kernel.session.key.hex(),
    "ident": get_ipython().kernel.ident,
    "history": get_ipython().history_manager.session_number,
    "comm": __import__("comm").create_comm(target_name="x").comm_id,
    "display": __import__("IPython").display.DisplayHandle().display_id,
}
try:
    import numpy
    values["numpy"] = numpy.random.random()
except ImportError:
    pass
"""


def test_kernels_share_no_random_numbers_ids_or_keys(start, server):
    kernels = [start(server) for _ in range(2)]
    found = []
    for kernel in kernels:
        kernel.run(RANDOM)
        found.append(kernel.value("values"))
    kernels[0].restart()
    kernels[0].run(RANDOM)
    found.append(kernels[0].value("values"))
    # Those stay over a restart.
    same = {"key"}
    for what in found[0]:
        expected = 2 if what in same else 3
        assert len({json.dumps(each[what]) for each in found}) == expected, what


def test_state_of_one_kernel_is_not_seen_in_the_next(start, server):
    start(server).run(
        "import builtins, json, os, sys, signal, logging\n"
        "builtins.added = json.added = 42\n"
        "os.environ['ADDED'] = '42'\n"
        "sys.path.append('/added')\n"
        "os.umask(0o012)\n"
        "logging.root.setLevel('DEBUG')\n"
        "signal.signal(signal.SIGUSR1, signal.SIG_IGN)"
    )
    kernel = start(server)
    assert (
        kernel.value(
            "import builtins, json, os, sys, signal, logging\n"
            "[hasattr(builtins, 'added'), hasattr(json, 'added'), 'ADDED' in os.environ,\n"
            " '/added' in sys.path, os.umask(0o022) == 0o012,\n"
            " logging.root.level == logging.DEBUG,\n"
            " signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN]"
        )
        == [False] * 7
    )


# Modules on disk


def test_module_written_after_the_start_of_the_server_is_imported(profile, start, server, tmp_path):
    (profile / "startup" / "path.py").write_text(f"import sys\nsys.path.append({str(tmp_path)!r})")
    first = start(server)
    assert first.execute("import written_later").error.startswith("ModuleNotFoundError")
    for value in ("1", "22"):
        (tmp_path / "written_later.py").write_text(f"value = {value}")
        assert start(server).value("import written_later\nwritten_later.value") == int(value)
    assert first.value("import written_later\nwritten_later.value") == 22


BESIDE = {
    # Of the standard library, before which the notebook's directory is not searched.
    "random": False,
    "queue": False,
    "colorsys": False,
    # Installed, and loaded by every kernel.
    "psutil": False,
    "tornado": False,
    # Installed, and loaded by the server but not by its kernels.
    "jinja2": True,
    "jupyter_server": True,
    "yaml": True,
    "requests": True,
    # Not installed.
    "tasks": True,
}
"""Modules, and whether one of this name beside the notebook is imported instead."""


def test_modules_beside_the_notebook_shadow_those_that_a_kernel_does_not_need(
    start, server, directory
):
    for name in BESIDE:
        (directory / f"{name}.py").write_text("")
    kernel = start(server, path=directory.name)
    assert kernel.value("import os\nos.getcwd()") == str(directory)
    found = kernel.value(
        "import importlib\n"
        f"found = {{name: importlib.import_module(name).__file__ for name in {list(BESIDE)}}}\n"
        "{name: os.path.dirname(file) == os.getcwd() for name, file in found.items()}"
    )
    assert found == BESIDE


# Many


def test_twenty_kernels_requested_at_once_all_answer(start, server):
    before = set(models(server))
    with ThreadPoolExecutor(10) as beside:
        kernels = list(beside.map(lambda _: start(server), range(20)))
        answers = list(
            beside.map(lambda kernel: kernel.value("__import__('os').getpid()"), kernels)
        )
    assert len(set(answers)) == 20
    assert set(models(server)) - before == {kernel.id for kernel in kernels}
