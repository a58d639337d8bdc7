"""Which environment variables modules read, and which of them matter."""

from __future__ import annotations

import os
from types import ModuleType

import pytest

from labkeeper.forkserver.readings import recorded, that_matter, that_matter_to_libraries


def reader(name, source):
    """Return a function of a module with this name."""
    module = ModuleType(name)
    exec(f"import os, subprocess, tempfile\ndef read():\n    {source}", vars(module))
    return module.read


@pytest.mark.parametrize(
    "source",
    ["os.environ.get('A')", "os.getenv('A')", "'A' in os.environ", "os.environ.setdefault('A','')"],
)
def test_each_way_of_reading_is_recorded_with_its_reader(monkeypatch, source):
    monkeypatch.setenv("A", "1")
    read = reader("library.inner", source)
    with recorded() as readings:
        read()
    assert readings["A"] == {"library"}
    read()
    assert type(os.environ).__name__ == "_Environ"


def test_standard_library_reads_for_its_caller():
    with recorded() as readings:
        reader("library", "os.path.expanduser('~')")()
    assert readings == {"HOME": {"library"}}


def test_variables_whose_use_is_renewed_do_not_matter():
    readings = {"HOME": {"ipykernel"}, "PATH": {"ipykernel"}, "X": {"ipykernel"}}
    assert that_matter(readings) == {"X"}


def test_use_by_a_library_matters_unless_it_is_known_to_be_renewed():
    readings = {
        "HOME": {"matplotlib"},
        "PATH": {"matplotlib"},
        "JPY_SESSION_NAME": {"library"},
        "X": {"library"},
    }
    assert that_matter_to_libraries(readings) == {"PATH", "X"}
    assert that_matter_to_libraries({"HOME": {"matplotlib", "library"}}) == {"HOME"}
