"""Plots of matplotlib that is loaded before its kernel, and the settings that it reads."""

from __future__ import annotations

import base64
import contextlib
import json
from pathlib import Path

import pytest

from harness import PassableKeeper, forked, until
from users import USER

PLOT = "import matplotlib.pyplot as plt\nplt.plot([1, 2], [3, 5])\nplt.title('Größe $x^2$')\n"


@pytest.fixture(scope="session")
def kernel_servers(library_servers):
    """Here all kernels have the libraries."""
    return library_servers


# Display


@pytest.mark.parametrize("last", ["plt.show()", "None"])
@pytest.mark.parametrize("first", ["", "%matplotlib inline\n"])
def test_plot_is_shown_as_in_an_executed_kernel(kernel, executed, first, last):
    ours, theirs = (one.show(f"{first}{PLOT}{last}") for one in (kernel, executed))
    (shown,) = ours
    assert base64.b64decode(shown["image/png"]).startswith(b"\x89PNG")
    assert ours == theirs
    # It is closed then.
    assert kernel.value("plt.get_fignums()") == []


def test_format_of_figures_can_be_configured(kernel):
    (shown,) = kernel.show(f"%config InlineBackend.figure_formats = ['svg']\n{PLOT}plt.show()")
    assert "</svg>" in shown["image/svg+xml"]
    assert "image/png" not in shown


def test_another_backend_shows_nothing_and_saves_files(kernel, directory):
    place = directory / "plot.png"
    code = f"import matplotlib\nmatplotlib.use('agg')\n{PLOT}plt.savefig({str(place)!r})"
    assert kernel.show(code) == []
    assert kernel.value("matplotlib.get_backend()") == "agg"
    assert place.read_bytes().startswith(b"\x89PNG")


# Settings

WIDTH = "import matplotlib\n(matplotlib.rcParams['lines.linewidth'], matplotlib.matplotlib_fname())"


def test_matplotlibrc_beside_the_notebook_applies(start, server, kernels_by, directory):
    file = directory / "matplotlibrc"
    file.write_text("lines.linewidth: 42")
    reason = f"{file} takes effect only when libraries are loaded" if kernels_by == "fork" else None
    kernel = start(server, launched_by="exec", reason=reason, path=directory.name)
    # It finds its working directory by another name.
    assert kernel.value(WIDTH) == (42.0, "matplotlibrc")


BACKEND = {"MPLBACKEND": "agg"}


def assert_backend_applies(start, server, kernels_by, **options):
    reason = "MPLBACKEND takes effect only when a program starts" if kernels_by == "fork" else None
    kernel = start(server, launched_by="exec", reason=reason, **options)
    assert kernel.show(PLOT) == []
    assert kernel.value("plt.get_backend()") == "agg"


@pytest.mark.parametrize("field", ["kernel_env", "env"])
def test_backend_in_the_environment_of_a_server_applies(start_server, start, kernels_by, field):
    assert_backend_applies(start, start_server(**{field: BACKEND}), kernels_by)


def test_backend_of_a_kernelspec_applies(add_kernelspec, start, server, kernels_by):
    assert_backend_applies(start, server, kernels_by, name=add_kernelspec(env=BACKEND))


def test_configuration_directory_of_the_environment_is_used(
    add_kernelspec, start, server, kernels_by, tmp_path
):
    (tmp_path / "matplotlibrc").write_text("lines.linewidth: 42")
    name = add_kernelspec(env={"MPLCONFIGDIR": str(tmp_path)})
    reason = "MPLCONFIGDIR takes effect only" if kernels_by == "fork" else None
    kernel = start(server, name=name, launched_by="exec", reason=reason)
    assert kernel.value(WIDTH) == (42.0, str(tmp_path / "matplotlibrc"))


# Homes

PLACES = """
import json, matplotlib.font_manager, matplotlib.style, matplotlib.texmanager
from matplotlib import font_manager, style, texmanager
print(json.dumps({
    "configuration": matplotlib.get_configdir(),
    "cache": matplotlib.get_cachedir(),
    "fonts": list(map(str, font_manager.X11FontDirectories)),
    "home": str(font_manager._HOME),
    "styles": list(map(str, style.USER_LIBRARY_PATHS)),
    "tex": str(texmanager.TexManager._cache_dir),
}))
"""


def write_style(home):
    """Write a style and a font directory of a user; return the path that a library reads."""
    place = home / ".config" / "matplotlib" / "stylelib"
    place.mkdir(parents=True)
    (place / "own.mplstyle").write_text("lines.linewidth: 42")
    return place


def test_styles_of_the_user_are_available(start_server, start, kernels_by, tmp_path):
    place = write_style(tmp_path)
    server = start_server(env={"HOME": str(tmp_path)})
    code = "import matplotlib.pyplot as plt\nplt.style.use('own')\nplt.rcParams['lines.linewidth']"
    reason = f"{place} takes effect only when libraries are loaded"
    reason = reason if kernels_by == "fork" else None
    assert start(server, launched_by="exec", reason=reason).value(code) == 42.0
    if kernels_by == "fork":
        # The server loads the libraries again, with what this user has.
        assert until(lambda: next_kernel(start, server), what="a fork").value(code) == 42.0


def next_kernel(start, server):
    """Start a kernel; return None if it was executed."""
    with contextlib.suppress(AssertionError):
        return start(server)
    return None


def test_directories_of_a_user_are_below_their_home(start_server, start, tmp_path, kernel_servers):
    kernel = start(start_server(env={"HOME": str(tmp_path)}))
    text = kernel.run(PLACES)
    places = json.loads(text)
    assert places["configuration"] == str(tmp_path / ".config" / "matplotlib")
    assert places["cache"] == str(tmp_path / ".cache" / "matplotlib")
    assert Path(places["home"]) == tmp_path
    assert str(kernel_servers.keeper.base) not in text
    # It made the cache, not only its name.
    assert (tmp_path / ".cache" / "matplotlib").is_dir()


@pytest.fixture(scope="module")
def of_root(passable, user):
    keeper = PassableKeeper(passable / "keeper", runtime_dir=passable / "run", launch_by="fork")
    keeper.base.chmod(0o755)
    keeper.notebook_dir.chmod(0o777)
    keeper.variables["LABKEEPER_PRELOAD"] = "matplotlib.pyplot"
    yield keeper.start_to_fork()
    keeper.close()


@pytest.mark.root
def test_kernel_of_another_user_has_nothing_of_the_keeper(of_root, user, kernels_by, start):
    server = forked(of_root, f"{kernels_by}-plots", user=USER, kernels_by=kernels_by)
    try:
        kernel = start(server)
        text = kernel.run(PLACES)
        places = json.loads(text)
        home = Path(user.pw_dir)
        assert places["configuration"] == str(home / ".config" / "matplotlib")
        assert places["cache"] == str(home / ".cache" / "matplotlib")
        assert (home / ".cache" / "matplotlib").stat().st_uid == user.pw_uid
        assert places["styles"] == [str(home / ".config" / "matplotlib" / "stylelib")]
        assert places["tex"].startswith(str(home))
        assert str(of_root.base) not in text
        (shown,) = kernel.show(f"{PLOT}plt.show()")
        assert "image/png" in shown
    finally:
        assert of_root.delete(server["name"], force="true").status_code == 200
