"""Strict type checkers and editors know the settings where users pass them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Required, get_origin, get_type_hints

import msgspec
import pytest

import dpshm
from dpshm.coordinator.settings import Settings, SettingsDict

USER = """
from typing import ClassVar

from dpshm import Coordinator, CoordinatorProcess, Engine, Frontend, Route, State
from dpshm.policies import Request, View, sees_work

with Coordinator(group="g", dp_size=2, stall_timeout_s=5, balancing="hybrid", metrics_port=0) as c:
    host, port = c.metrics_address or ("", 0)
    c.drain(port)
    c.board.segment.group.upper()
process = CoordinatorProcess(group="g", dp_size=2, waves=False, start_timeout_s=1.0)
process.proc.pid.bit_length()
Coordinator(gruop="g", dp_size=2)  # WRONG
Coordinator(group="g")  # WRONG
Coordinator(group="g", dp_size="2")  # WRONG
Coordinator(group="g", dp_size=2, balancing="round robin")  # WRONG
CoordinatorProcess(group="g", dp_size=2, max_engine=4)  # WRONG
CoordinatorProcess(group="g", dp_size=2, waves="no")  # WRONG
process.stats_adress  # WRONG


@sees_work
def shortest_backlog(view: View, request: Request) -> int:
    return view.least(view.work.tokens)


class ShortestQueue:
    sees_work: ClassVar[bool] = True

    def __call__(self, view: View, request: Request) -> int:
        return view.least([n + m for n, m in zip(view.waiting, view.work.step_tokens, strict=True)])


def one_argument(view: View) -> int:
    return view.ranks[0]


async def serve(engine: Engine) -> None:
    frontend = Frontend.attach("g", policy=shortest_backlog, max_requests=8, weights={0: 2}, timeout_s=30)
    Frontend.attach("g", policy=ShortestQueue(), on_change=print)
    await frontend.wait_ready(30)
    async for change in frontend.changes():
        change.kind.upper()
    route: Route = frontend.route(512, exclude={3})
    engine.receive(route.stamp)
    engine.receive([int(number) for number in route.stamp])
    stalled = [row["dp_rank"] for row in frontend.snapshot().to_dicts() if row["state"] == State.STALLED]
    print(frontend.health().ok, frontend.health().ranks[0] is State.IDLE, stalled)
    Frontend.attach("g", policy=one_argument)  # WRONG
    frontend.route(512, exclude=3)  # WRONG
    frontend.health().okay  # WRONG
    engine.receive("0 512 0")  # WRONG
"""


def test_the_keyword_arguments_are_the_settings():
    """Guards against a setting that a user's type checker refuses, or takes with another type."""
    hints = get_type_hints(SettingsDict)
    fields = {field.name: field for field in msgspec.structs.fields(Settings)}
    assert hints == {name: field.type for name, field in fields.items()}
    extras = get_type_hints(SettingsDict, include_extras=True)
    required = {name for name, hint in extras.items() if get_origin(hint) is Required}
    assert required == {name for name, field in fields.items() if field.required}


ROOT = Path(dpshm.__file__).parents[1]
WRONG = {number for number, line in enumerate(USER.splitlines(), start=1) if line.endswith("# WRONG")}


@pytest.mark.slow
def test_mypy_checks_a_users_code(tmp_path: Path):
    """Guards against settings and policies that are `Any` to a user's mypy, so that it finds no misspelt one."""
    pytest.importorskip("mypy", reason="mypy is not installed: pip install 'dpshm[lint]'")
    user = tmp_path / "user.py"
    user.write_text(USER)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--config-file", "", str(user)],
        cwd=ROOT,  # its cache of the package is used
        env={"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    # dpshm's own lines are not reported to a user: there an optional library may be missing, such as setproctitle.
    lines = [line for line in done.stdout.splitlines() if user.name in line and ": error: " in line]
    assert {int(line.split(":")[1]) for line in lines} == WRONG, done.stdout + done.stderr


@pytest.mark.slow
def test_pyright_checks_a_users_code(tmp_path: Path):
    """Guards against code that mypy accepts and an editor underlines: a policy that is marked with `sees_work`."""
    pytest.importorskip("basedpyright", reason="basedpyright is not installed: pip install 'dpshm[lint]'")
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "pyrightconfig.json").write_text(
        json.dumps({"typeCheckingMode": "strict", "extraPaths": [str(ROOT)], "include": ["user.py"]})
    )
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "-p", str(tmp_path)]
    done = subprocess.run(
        [*command, "--pythonpath", sys.executable],
        capture_output=True,
        text=True,
        check=False,
    )
    found = json.loads(done.stdout)["generalDiagnostics"]
    assert {one["range"]["start"]["line"] + 1 for one in found} == WRONG, done.stdout
