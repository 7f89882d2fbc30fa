"""The public names: what they are, and that each says what it does."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import dpshm
from dpshm import errors

PACKAGE = Path(dpshm.__file__).parent
PUBLIC = [getattr(dpshm, name) for name in dpshm.__all__ if name != "__version__"]


def members(kind: type) -> list[tuple[str, object]]:
    """The public members that our own classes give a class: methods, properties, class methods."""
    found: dict[str, object] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.startswith("dpshm"):
            found.update((name, value) for name, value in vars(base).items() if not name.startswith("_"))
    return [
        (name, getattr(value, "__func__", value))
        for name, value in found.items()
        if inspect.isroutine(getattr(value, "__func__", value)) or isinstance(value, property)
    ]


METHODS = [(f"{kind.__name__}.{name}", value) for kind in PUBLIC for name, value in members(kind)]


def test_public_names_are_sorted_and_there():
    """Guards against a name that is promised and missing, or there and not promised."""
    assert list(dpshm.__all__) == sorted(dpshm.__all__)
    assert len(set(dpshm.__all__)) == len(dpshm.__all__)
    assert all(hasattr(dpshm, name) for name in dpshm.__all__)
    classes = {name for name, value in vars(dpshm).items() if inspect.isclass(value)}
    assert classes == set(dpshm.__all__) - {"__version__"}
    assert {"Board", "Coordinator", "CoordinatorProcess", "Engine", "Frontend", "Route"} <= classes


def test_every_error_is_public():
    """Guards against an error that callers can meet and not name."""
    raised = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert raised <= set(dpshm.__all__)


@pytest.mark.parametrize("kind", PUBLIC, ids=lambda kind: kind.__name__)
def test_a_public_class_says_what_it_is(kind: type):
    """Guards against a name that only its author can use."""
    assert len((vars(kind).get("__doc__") or "").strip()) > 15
    assert kind.__module__.startswith("dpshm.")


@pytest.mark.parametrize(("name", "value"), METHODS, ids=[name for name, _ in METHODS])
def test_a_public_method_says_what_it_does(name: str, value: object):
    """Guards against a method whose effect has to be guessed."""
    doc = inspect.getdoc(value)
    assert doc, name
    assert doc.split("\n")[0].endswith((".", ":")), name
    if callable(value):
        missing = [
            p.name for p in inspect.signature(value).parameters.values() if p.annotation is inspect.Parameter.empty
        ]
        assert missing in ([], ["self"], ["cls"]), f"{name}: {missing} without types"


def test_methods_were_found():
    """Guards against a test of docstrings that sees no methods."""
    names = {name for name, _ in METHODS}
    assert {"Engine.publish", "Engine.attach", "Frontend.route", "Route.cancel", "Board.snapshot"} <= names
    assert {"Board.dp_size", "Engine.running", "Coordinator.close", "CoordinatorProcess.shutdown"} <= names


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_opens_with_its_idea(path: Path):
    """Guards against a file that has to be read to know what it is for."""
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)) or (path.name == "__init__.py" and not text)


def test_handles_are_contexts():
    """Guards against a handle that `with` cannot close."""
    for kind in (dpshm.Board, dpshm.Coordinator, dpshm.CoordinatorProcess, dpshm.Engine, dpshm.Frontend):
        assert callable(kind.close)
        assert callable(kind.__enter__)
        assert callable(kind.__exit__)
