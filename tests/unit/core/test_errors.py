"""The tree of errors, and its drawing in the module's docstring."""

from __future__ import annotations

import inspect
import re

from labkeeper.core import errors
from labkeeper.core.errors import LabkeeperError, tree

CLASSES = [
    cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, LabkeeperError)
]


def drawn():
    """Return (indentation, name) for each line of the drawing."""
    block = errors.__doc__.split("\n\n")[1]
    return [(len(line) - len(line.lstrip()), line.split()[0]) for line in block.splitlines()]


def test_the_tree_has_every_class():
    """The client and the API look classes up by code."""
    assert set(CLASSES) <= set(tree().values())


def test_codes_are_unique_and_derived_from_class_names():
    codes = [cls.code for cls in CLASSES]
    assert len(set(codes)) == len(codes)
    for cls in CLASSES:
        assert cls.code == re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
        assert tree()[cls.code] is cls


def test_the_drawing_shows_each_class_below_its_parent():
    names = [name for _, name in drawn()]
    assert sorted(names) == sorted(cls.__name__ for cls in CLASSES)
    path = []
    for indent, name in drawn():
        path = [(depth, above) for depth, above in path if depth < indent]
        if path:
            assert getattr(errors, name).__base__.__name__ == path[-1][1]
        path.append((indent, name))


def test_an_error_has_a_message_and_details():
    """The message is for people, the details are for programs."""
    for cls in CLASSES:
        error = cls("cannot do this", field="port")
        assert str(error) == error.message == "cannot do this"
        assert error.details == {"field": "port"}
