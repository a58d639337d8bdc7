"""Libraries that are loaded before their kernel are as those that a kernel imports itself."""

from __future__ import annotations

import json
import os
import re
import uuid

import pytest

from debugger import Debugger
from harness import until
from kernel_state import assert_same, expect_of_forked, normal, snapshot
from odd_libraries import PRELOADED, UNFIT

IMPORT = "import numpy as np, pandas as pd, matplotlib, matplotlib.pyplot as plt\n"


@pytest.fixture(scope="session")
def kernel_servers(library_servers):
    """Here all kernels have the libraries."""
    return library_servers


# Equality

REPORT = """
import contextlib, ctypes, decimal, io, json, locale, os, re, sys, threading, warnings

def shown(function, *given, **named):
    with contextlib.redirect_stdout(io.StringIO()) as output:
        value = function(*given, **named)
    return [output.getvalue(), repr(value)]

def threads_of_blas():
    with open("/proc/self/maps") as maps:
        paths = set(re.findall(r"(/\\S*openblas\\S*[.]so\\S*)", maps.read()))
    names = [f"{prefix}openblas_get_num_threads{suffix}"
             for prefix in ("", "scipy_") for suffix in ("", "64_", "_64")]
    return sorted(getattr(ctypes.CDLL(path), name)()
                  for path in paths for name in names if hasattr(ctypes.CDLL(path), name))

def values(parameters):
    return {name: re.sub("0x[0-9a-f]+", "N", repr(value)) for name, value in parameters.items()}

def report():
    # From here on both have all threads of BLAS; those of forked kernels start when needed.
    np.ones((1000, 1000)) @ np.ones((1000, 1000))
    return {
        "pandas": {
            text.split()[0]: text
            for text in re.split("\\n(?=\\\\w)", pd.describe_option(_print_desc=False))
        },
        "columns": pd.get_option("display.max_columns"),
        "plots": values(matplotlib.rcParams),
        "plots by default": values(matplotlib.rcParamsDefault),
        "plots originally": values(matplotlib.rcParamsOrig),
        "backend": matplotlib.get_backend(),
        "directories": [matplotlib.get_configdir(), matplotlib.get_cachedir()],
        "rc file": matplotlib.matplotlib_fname(),
        "styles": sorted(plt.style.available),
        "interactive": [plt.isinteractive(), matplotlib.is_interactive()],
        "figures": plt.get_fignums(),
        "fonts": sorted({font.fname for font in matplotlib.font_manager.fontManager.ttflist}),
        "displayhook": [type(sys.displayhook).__name__, str(plt.rcParams["figure.dpi"])],
        "numpy printing": repr(np.get_printoptions()),
        "numpy errors": [repr(np.geterr()), repr(np.geterrcall())],
        "numpy build": shown(np.show_config),
        "threads of BLAS": threads_of_blas(),
        "warnings": sorted({str(entry) for entry in warnings.filters}),
        "environment": dict(os.environ),
        "flags": str(sys.flags),
        "decimals": str(decimal.getcontext()),
        "locale": locale.setlocale(locale.LC_ALL),
        "threads": sorted(re.sub("[0-9]+", "N", thread.name) for thread in threading.enumerate()),
        "tasks": len(os.listdir("/proc/self/task")),
        "setter": os.environ.get("ODD_SET"),
        "files": [sys.modules[name].__file__ for name in ("numpy", "pandas", "matplotlib")],
        "events": {
            what: sorted(f"{callback.__module__}.{callback.__qualname__}" for callback in callbacks)
            for what, callbacks in get_ipython().events.callbacks.items()
        },
        "types to display": {
            kind: sorted(map(str, [*formatter.type_printers, *formatter.deferred_printers]))
            for kind, formatter in get_ipython().display_formatter.formatters.items()
        },
        "show": f"{plt.show.__module__}.{plt.show.__qualname__}",
        "frame": pd.DataFrame(np.arange(90).reshape(3, 30)).to_string(),
        "shown frame": repr(pd.DataFrame(np.arange(90).reshape(3, 30))),
    }

print(json.dumps(report()))
"""


@pytest.mark.parametrize("first", ["", "%matplotlib inline\n"])
def test_libraries_are_set_up_as_in_an_executed_kernel(kernel, executed, first):
    code = f"{first}{IMPORT}import odd_setter\n{REPORT}"
    ours, theirs = (json.loads(normal(one.run(code), one)) for one in (kernel, executed))
    assert_same(ours, theirs)
    assert ours["columns"] == 20
    assert ours["setter"] == "42"
    assert not {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"} - set(os.environ) & {
        *ours["environment"]
    }


def test_process_with_libraries_is_that_of_an_executed_kernel(kernel, executed):
    mark = uuid.uuid4().hex
    for one in (kernel, executed):
        one.run(f"import odd_setter\n{IMPORT}np.ones((1000, 1000)) @ np.ones((1000, 1000));")
    ours, theirs = snapshot(kernel, mark), snapshot(executed, mark)
    if kernel.model["launched_by"] == "fork":
        expect_of_forked(kernel, theirs)
    for one in (ours, theirs):
        # Their order depends on that of imports; all of them are for other modules.
        one["interpreter: warnings"].sort()
    assert_same(ours, theirs)


def modules(kernel):
    # A value of that length would be shortened.
    return set(kernel.run("import sys\nprint(*sys.modules)").split())


def test_imports_load_the_same_modules(kernel, executed, kernels_by):
    before = modules(kernel)
    if kernels_by == "fork":
        assert {"numpy", "pandas", "matplotlib.pyplot"} <= before
    for one in (kernel, executed):
        one.run(f"{IMPORT}import odd_reader, odd_setter, odd_looker")
    assert modules(kernel) == modules(executed)
    if kernels_by == "fork":
        assert not modules(kernel) - before


def test_preloaded_libraries_are_no_names_of_the_notebook(kernel):
    for name in ("numpy", "np", "pandas", "plt"):
        assert kernel.execute(name).error == f"NameError: name '{name}' is not defined"


def test_library_that_only_looks_finds_the_kernel(kernel):
    assert kernel.value("import odd_looker\nodd_looker.value") == (
        "ZMQInteractiveShell",
        True,
        True,
    )


# Threads of BLAS

COUNT = "len(__import__('os').listdir('/proc/self/task'))"
MULTIPLY = """
matrix = np.random.default_rng(1).random((2000, 2000))
product = matrix @ matrix
"""


def test_blas_computes_with_as_many_threads(kernel, executed):
    found = []
    for one in (kernel, executed):
        one.run(IMPORT + MULTIPLY)
        found.append((one.value(COUNT), one.value("float(product.sum()), float(product[42, 42])")))
    (ours, sums), (theirs, expected) = found
    assert ours == theirs
    assert sums == pytest.approx(expected, rel=1e-9)


def test_number_of_threads_in_kernel_env_applies(start_server, start, kernels_by, executed):
    server = start_server(kernel_env={"OPENBLAS_NUM_THREADS": "1"})
    reason = "OPENBLAS_NUM_THREADS takes effect only" if kernels_by == "fork" else None
    kernel = start(server, launched_by="exec", reason=reason)
    counts = []
    for one in (kernel, executed):
        before = one.value(COUNT)
        one.run(IMPORT + MULTIPLY)
        counts.append(one.value(COUNT) - before)
    ours, theirs = counts
    assert ours == theirs - (os.cpu_count() - 1)


# Freshness and isolation

RANDOM = """
import pandas, random, secrets, tempfile, uuid
import numpy as np
values = {
    "numpy": np.random.rand(),
    "generator": np.random.default_rng().random(),
    "bit generator": np.random.PCG64().random_raw(),
    "state": int(np.random.get_state()[1][:8].sum()),
    "frame": tuple(pandas.Series(range(1000)).sample(8)),
    "random": random.random(),
    "uuid": uuid.uuid4().hex,
    "secrets": secrets.token_hex(),
    "temporary": next(tempfile._get_candidate_names()),
    "hash": np.random.SeedSequence().entropy,
}
"""


def test_kernels_draw_different_random_numbers(start, server):
    found = []
    for kernel in (start(server), start(server)):
        kernel.run(RANDOM)
        found.append(kernel.value("values"))
    kernel.restart()
    kernel.run(RANDOM)
    found.append(kernel.value("values"))
    same = [name for name in found[0] if len({str(values[name]) for values in found}) < 3]
    assert not same


INLINE = "module://matplotlib_inline.backend_inline"
SPOIL = """
pd.set_option("display.max_columns", 3)
pd.DataFrame.spoilt = np.spoilt = matplotlib.spoilt = 42
np.set_printoptions(precision=1)
np.seterr(all="raise")
plt.rcParams["lines.linewidth"] = 42
plt.figure()
matplotlib.use("svg")
"""
SPOILT = """
[pd.get_option("display.max_columns"), hasattr(pd.DataFrame, "spoilt"), hasattr(np, "spoilt"),
 hasattr(matplotlib, "spoilt"), np.get_printoptions()["precision"], np.geterr()["over"],
 plt.rcParams["lines.linewidth"], plt.get_fignums(), matplotlib.get_backend()]
"""


def test_what_a_kernel_does_to_libraries_is_not_seen_in_the_next(start, server):
    start(server).run(IMPORT + SPOIL)
    expected = [20, False, False, False, 8, "warn", 1.5, [], INLINE]
    assert start(server).value(IMPORT + SPOILT) == expected


def test_forked_kernel_with_libraries_takes_less_memory_of_its_own(kernel, executed, kernels_by):
    sizes = []
    for one in (kernel, executed):
        one.run(IMPORT)
        sizes.append(one.process.memory_full_info().pss)
    ours, theirs = sizes
    assert kernels_by == "exec" or ours <= 0.6 * theirs, (ours, theirs)


# Modules beside the notebook


def write_module(directory, name):
    file = directory / name
    file.parent.mkdir(exist_ok=True)
    # IPython looks for the class in any module of the name numpy.
    file.write_text("value = 42\nfloat64 = float")
    return file


@pytest.mark.parametrize("name", ["cycler.py", "pyparsing/__init__.py", "numpy/__init__.py"])
def test_module_beside_the_notebook_is_imported_instead_of_a_library(
    start, server, kernels_by, directory, name
):
    file = write_module(directory, name)
    beside = file.parent if file.name == "__init__.py" else file
    reason = f"{beside} takes effect only when libraries are loaded"
    kernel = start(
        server,
        launched_by="exec",
        reason=reason if kernels_by == "fork" else None,
        path=directory.name,
    )
    module = name.partition("/")[0].removesuffix(".py")
    found = kernel.value(f"import {module}\n{module}.value, {module}.__file__")
    assert found == (42, str(file))


@pytest.mark.parametrize("name", ["random.py", "decimal.py", "tornado.py"])
def test_module_beside_the_notebook_that_no_kernel_imports_is_not_imported(
    start, server, directory, executed, name
):
    """The standard library is searched first; tornado is loaded by every kernel."""
    write_module(directory, name)
    kernel = start(server, path=directory.name)
    module = name.partition("/")[0].removesuffix(".py")
    code = f"import {module}, numpy, pandas\n{module}.__file__, hasattr({module}, 'value')"
    assert kernel.value(code) == executed.value(code)


def test_other_files_beside_the_notebook_do_not_prevent_forking(start, server, directory):
    # No library of these needs six.
    for name in ("tasks.py", "numpy.txt", "six.py", "pandas-data.csv", "numpy_tools.py"):
        write_module(directory, name)
    # A directory without modules is imported only if there is no module of its name.
    (directory / "pandas").mkdir()
    kernel = start(server, path=directory.name)
    assert kernel.value("import six, tasks\nsix.value, tasks.value") == (42, 42)
    assert kernel.value("import pandas\nhasattr(pandas, 'DataFrame')") is True


# Debugger


def test_debugger_steps_into_a_library(kernel):
    kernel.run(IMPORT)
    debugger = Debugger(kernel)
    debugger.begin()
    code = "from matplotlib import colors\nshown = colors.to_hex('red')\nprint(shown)\n"
    cell, thread = debugger.stop_at(2, code)
    debugger.request("stepIn", threadId=thread)
    assert debugger.wait_for("stopped")["reason"] == "step"
    frame = debugger.request("stackTrace", threadId=thread)["stackFrames"][0]
    assert frame["name"] == "to_hex"
    assert frame["source"]["path"].endswith("matplotlib/colors.py")
    debugger.request("continue", threadId=thread)
    assert kernel.finish(cell).stdout == "#ff0000\n"


# What the keeper tells


def test_keeper_tells_which_libraries_are_loaded_and_why_others_are_not(library_servers, server):
    keeper = library_servers.keeper

    def preloaded():
        return {one["name"]: one for one in keeper.http.get("/readyz").json()["preload"]}

    # Executed kernels do not wait for the libraries.
    until(
        lambda: all(one["loaded"] is not None for one in preloaded().values()),
        what="the libraries to be loaded or left out",
    )
    told = preloaded()
    unfit = {name: UNFIT[name][1] for name in PRELOADED if name in UNFIT}
    assert list(told) == PRELOADED
    for name, one in told.items():
        assert one["loaded"] is (name not in unfit)
        assert re.fullmatch(unfit.get(name, "None"), str(one["reason"]))
    shown = keeper.cli("show", server["name"]).stdout
    for name in PRELOADED:
        reason = told[name]["reason"]
        text = f"{name}: not loaded ({reason})" if reason else name
        assert (text in shown) is (server["kernels_by"] == "fork"), shown


def test_kernels_import_libraries_that_were_left_out_with_their_effect(kernel):
    before = kernel.value(COUNT)
    kernel.run("import odd_thread, odd_magic, odd_memory")
    assert kernel.value(COUNT) == before + 1
    assert kernel.value("len(odd_memory.memory)") == 4096
    assert kernel.run("%odd 42") == "42\n"


def test_variable_that_a_library_has_read_needs_an_executed_kernel(
    add_kernelspec, start, server, kernels_by
):
    assert start(server).value("import odd_reader\nodd_reader.value") == "unset"
    name = add_kernelspec(env={"ODD_READ": "42"})
    reason = "ODD_READ takes effect only" if kernels_by == "fork" else None
    kernel = start(server, name=name, launched_by="exec", reason=reason)
    assert kernel.value("import odd_reader\nodd_reader.value") == "42"
