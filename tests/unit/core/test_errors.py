"""The tree of errors is whole, and its drawing true."""

from __future__ import annotations

import inspect
import re

from labkeeper.core import errors
from labkeeper.core.errors import LabkeeperError, tree

CLASSES = [
    cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, LabkeeperError)
]


def drawn():
    """Read the drawing at the head of the module: (indent, name) of each line."""
    block = errors.__doc__.split("\n\n")[1]
    return [(len(line) - len(line.lstrip()), line.split()[0]) for line in block.splitlines()]


def test_the_tree_has_every_class():
    """No error class is missing where the client and the API look classes up by code."""
    assert set(CLASSES) <= set(tree().values())


def test_codes_are_unique_and_stable_words():
    """A code names one class, in snake case, made of the class's own name."""
    codes = [cls.code for cls in CLASSES]
    assert len(set(codes)) == len(codes)
    for cls in CLASSES:
        assert cls.code == re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
        assert tree()[cls.code] is cls


def test_the_drawing_names_each_class_under_its_parent():
    """The drawing in the docstring has each class once, indented below the class that it inherits from."""
    names = [name for _, name in drawn()]
    assert sorted(names) == sorted(cls.__name__ for cls in CLASSES)
    path = []
    for indent, name in drawn():
        path = [(depth, above) for depth, above in path if depth < indent]
        if path:
            assert getattr(errors, name).__base__.__name__ == path[-1][1]
        path.append((indent, name))


def test_an_error_carries_message_and_details():
    """What is said to a person and what is said to a program travel together."""
    for cls in CLASSES:
        error = cls("cannot do this", field="port")
        assert str(error) == error.message == "cannot do this"
        assert error.details == {"field": "port"}
