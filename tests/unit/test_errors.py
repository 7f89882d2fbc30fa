"""The exception tree."""

from __future__ import annotations

import inspect
import re

import pytest

from dpshm import errors
from dpshm.errors import DpshmError

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, DpshmError)]


def drawn_tree() -> dict[str, str]:
    """The parents of the classes, as drawn at the top of the module."""
    parents: dict[str, str] = {}
    above: list[tuple[int, str]] = [(-1, "Exception")]
    for line in (errors.__doc__ or "").splitlines():
        root = re.fullmatch(r" {4}(DpshmError)", line)
        branch = re.match(r"( +(?:\| +)?)\+-- (\w+)", line)
        if not (root or branch):
            continue
        depth, name = (0, root[1]) if root else (len(branch[1]), branch[2])
        while above[-1][0] >= depth:
            above.pop()
        parents[name] = above[-1][1]
        above.append((depth, name))
    return parents


def test_the_drawn_tree_is_the_real_one():
    """Guards against a reader who catches `SegmentError` by the drawing and misses what was moved elsewhere."""
    assert drawn_tree() == {c.__name__: c.__base__.__name__ for c in CLASSES}


@pytest.mark.parametrize("kind", CLASSES, ids=lambda c: c.__name__)
def test_an_error_crosses_a_process_boundary(kind: type[DpshmError]):
    """Guards against an error that its type's name and message cannot rebuild: the daemon reports just these."""
    again = getattr(errors, kind.__name__)(str(kind("rank 3 is taken")))
    assert type(again) is kind
    assert str(again) == "rank 3 is taken"
