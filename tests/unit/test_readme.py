"""The README's example is what users copy: it has to run as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"


def block(marker: str) -> str:
    """The fenced block after a marker comment."""
    found = re.search(rf"<!-- {marker} -->\n```\w+\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found, f"no block {marker!r} in the README"
    return found.group(1)


def test_the_library_example_runs_as_printed() -> None:
    """Guards against a README whose example no longer fits the code."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block("example")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert re.match(r"send it to rank [01] stamped with 0 and 0\n", done.stdout)
    # The other rank may still be on its way from paused to running.
    assert len(re.findall(r"^[01] (?:idle|waking|running) 0 requests$", done.stdout, re.MULTILINE)) == 2


@pytest.mark.parametrize("marker", ["demo", "test"])
def test_each_command_makes_its_own_environment(marker: str) -> None:
    """Guards against a README command that needs something set up before it."""
    command = block(marker)
    assert command.startswith("python3 -m venv .venv && .venv/bin/pip install")
    assert command.count("\n") == 1
