"""Imports run one way, and few things are imported."""

from __future__ import annotations

import ast
import graphlib
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import dpshm

PACKAGE = Path(dpshm.__file__).parent


def module_name(path: Path) -> str:
    """The name under which a file is imported."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str) -> set[str]:
    """What a module imports, in functions too; not what it imports for type checkers alone."""
    found: set[str] = set()

    def look(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in node.orelse:
                look(other)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in FILES else str(node.module))
        for child in ast.iter_child_nodes(node):
            look(child)

    look(ast.parse(FILES[name].read_text(encoding="utf-8")))
    return found


@cache
def graph() -> dict[str, set[str]]:
    """What each module imports."""
    return {name: imports(name) for name in FILES}


def reach(name: str) -> set[str]:
    """Everything that a module imports, directly or not, itself not counted; foreign modules included."""
    seen: set[str] = set()
    todo = [name]
    while todo:
        for other in graph().get(todo.pop(), set()) - seen:
            seen.add(other)
            todo.append(other)
    return seen


def test_the_graph_is_the_real_one():
    """Guards against a test of imports that sees none."""
    assert {"dpshm.engine.handle", "dpshm.errors", "dpshm.cli", "dpshm.sim"} <= FILES.keys()
    assert {"dpshm.net.wire", "dpshm.board.board", "zmq"} <= graph()["dpshm.engine.handle"]
    assert "dpshm.board.board" not in graph()["dpshm.coordinator.wave_thread"]  # for type checkers alone
    assert "dpshm.rules.waves" in reach("dpshm.policies")  # through the layout


def test_imports_run_one_way():
    """Guards against two modules that need each other, also where one hides it in a function."""
    ours = {name: {other for other in others if other in FILES} for name, others in graph().items()}
    order = list(graphlib.TopologicalSorter(ours).static_order())  # raises CycleError, naming the cycle
    assert set(order) == FILES.keys()


FLOORS = (
    ("errors", "version"),
    ("rules", "linux"),
    ("board",),
    ("net", "policies"),
    ("engine", "frontend", "coordinator"),
    ("ops",),
    ("service",),
    ("ray", "sim", "vllm"),
    ("cli",),
)
"""The rooms of the package, from the ground up. A file imports from its own room and from lower floors."""

FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room_of(name: str) -> str:
    """The folder, or the file beside the folders, that a module is in."""
    return name.split(".")[1]


INNER = sorted(FILES.keys() - {"dpshm", "dpshm.__main__"})


def test_every_room_has_a_floor():
    """Guards against a new folder that no rule covers, and a rule for one that is gone."""
    assert {room_of(name) for name in INNER} == FLOOR.keys()


@pytest.mark.parametrize("name", INNER)
def test_a_room_imports_from_below_alone(name: str):
    """Guards against roles that know each other, rules that know memory, and a core that knows its tools."""
    room = room_of(name)
    imported = {room_of(other) for other in graph()[name] if other in FILES and other != "dpshm"} - {room}
    upwards = {other for other in imported if FLOOR[other] >= FLOOR[room]}
    assert upwards == set()


def test_no_room_imports_the_public_names():
    """Guards against a role that reaches the others by way of `from dpshm import`."""
    users = {room_of(name) for name in INNER if "dpshm" in graph()[name]}
    assert users <= {"sim", "vllm", "cli"}


PURE = (
    "board.layout",
    "coordinator.readiness",
    "coordinator.step_counts",
    "errors",
    "net.wire",
    "policies",
    "rules",
)


@pytest.mark.parametrize("place", PURE)
def test_what_decides_is_pure(place: str):
    """Guards against a decision that looks at a clock, a socket or a memory map by itself."""
    names = [name for name in FILES if f"{name}.".startswith(f"dpshm.{place}.")]
    assert names
    foreign = {other.partition(".")[0] for name in names for other in reach(name) if other not in FILES}
    allowed = {"__future__", "array", "bisect", "collections", "enum", "functools", "hashlib", "itertools", "math"}
    allowed |= {"operator", "struct", "typing", "msgspec", "numpy"}
    assert foreign <= allowed, foreign - allowed


def test_the_core_imports_neither_tools_nor_simulations():
    """Guards against engines that load the command line, and simulated peers in a real group."""
    heavy = {name for name in FILES if name.startswith(("dpshm.cli", "dpshm.sim", "dpshm.vllm"))}
    assert reach("dpshm") & heavy == set()


def loaded(imported: str) -> set[str]:
    """The foreign packages that an import loads into a new interpreter."""
    code = f"import sys; before = set(sys.modules); import {imported}; print(*set(sys.modules) - before)"
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()} - set(sys.stdlib_module_names)


def test_import_dpshm_loads_three_foreign_packages():
    """Guards against a dependency that every engine and API server would pay for, also through another one."""
    assert loaded("dpshm") == {"dpshm", *loaded("zmq, msgspec, numpy")}
    assert {"zmq", "msgspec", "numpy"} <= loaded("dpshm")


def test_no_module_of_ours_hides_one_of_pythons():
    """Guards against `process` or `select` meaning two things when a file is run by its path."""
    ours = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert "errors" in ours
    assert ours & set(sys.stdlib_module_names) == set()


UNPICKLERS = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "copyreg", "multiprocessing"}
"""multiprocessing: its connections and queues unpickle what comes in."""
TURN_DATA_INTO_CODE = {"eval", "exec", "compile", "recv_pyobj", "loads", "unsafe_load", "recv_serialized"}


def test_nothing_is_ever_unpickled():
    """Guards against a message, a file or shared memory that runs code of its writer."""
    # The one exception is the pool of `dpshm simulate`: its own children, over pipes that no other process has.
    foreign = {name: {other.partition(".")[0] for other in others} for name, others in graph().items()}
    found = {name for name, others in foreign.items() if others & UNPICKLERS}
    assert found == {"dpshm.sim.lab.mapping"}
    called = {
        (name, ast.unparse(node.func))
        for name, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in TURN_DATA_INTO_CODE
    }
    assert {(name, call) for name, call in called if call not in ("re.compile", "tomllib.loads")} == set()
    keywords = {
        name
        for name, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle"
    }
    assert keywords == set()


def test_only_tools_read_another_users_board():
    """Guards against a server, an engine or the plugin that believes what another user wrote."""
    asking = {name.split(".")[1] for name, path in FILES.items() if "any_owner=True" in path.read_text()}
    assert asking == {"ops", "cli"}
