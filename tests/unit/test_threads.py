"""Threads of ours do not override what the standard library's Thread keeps for itself."""

from __future__ import annotations

import ast
import threading
from pathlib import Path

import dpshm

# What newer Pythons added: 3.13, 3.14.
RESERVED = {*dir(threading.Thread()), "_handle", "_os_thread_handle", "_context"} - {"run", "__init__", "__doc__"}


def test_no_thread_of_ours_hides_an_attribute_of_its_base():
    """Guards against a method that Python 3.13's Thread replaces: a `_handle` of the wave thread once was, and no
    wave began there.
    """
    found = []
    for path in Path(dpshm.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any(ast.unparse(b).endswith("Thread") for b in node.bases):
                names = {method.name for method in node.body if isinstance(method, ast.FunctionDef)}
                names |= {
                    n.attr
                    for n in ast.walk(node)
                    if isinstance(n, ast.Attribute)
                    and isinstance(n.ctx, ast.Store)
                    and ast.unparse(n.value) == "self"
                }
                found.append((node.name, names & RESERVED))
    assert ("WaveThread", set()) in found
    assert [name for name, hidden in found if hidden] == []
