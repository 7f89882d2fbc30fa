"""Strict type checkers and editors know the settings where users pass them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Required, get_origin, get_type_hints

import msgspec
import pytest

import dpshm
from dpshm.coordinator.settings import Settings, SettingsDict

USER = """
from dpshm import Coordinator, CoordinatorProcess

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
"""


def test_the_keyword_arguments_are_the_settings():
    """Guards against a setting that a user's type checker refuses, or takes with another type."""
    hints = get_type_hints(SettingsDict)
    fields = {field.name: field for field in msgspec.structs.fields(Settings)}
    assert hints == {name: field.type for name, field in fields.items()}
    extras = get_type_hints(SettingsDict, include_extras=True)
    required = {name for name, hint in extras.items() if get_origin(hint) is Required}
    assert required == {name for name, field in fields.items() if field.required}


@pytest.mark.slow
def test_a_users_code_is_checked(tmp_path: Path):
    """Guards against settings that are `Any` to a user's mypy: a misspelt one is then found at run time."""
    pytest.importorskip("mypy", reason="mypy is not installed: pip install 'dpshm[lint]'")
    user = tmp_path / "user.py"
    user.write_text(USER)
    root = Path(dpshm.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--config-file", "", str(user)],
        cwd=root,  # its cache of the package is used
        env={"MYPYPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    # dpshm's own lines are not reported to a user: there an optional library may be missing, such as setproctitle.
    lines = [line for line in done.stdout.splitlines() if user.name in line and ": error: " in line]
    found = {int(line.split(":")[1]) for line in lines}
    wrong = {number for number, line in enumerate(USER.splitlines(), start=1) if line.endswith("# WRONG")}
    assert found == wrong, done.stdout + done.stderr
