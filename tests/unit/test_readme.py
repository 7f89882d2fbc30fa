"""The README's example is what users copy: it has to run as it stands. The tests that it names have to exist."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
NAMED = re.compile(r"`([\w/]+\.py)::(test_\w+)")


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


def promises() -> list[str]:
    """The rows of the README's table of promises."""
    text = README.read_text(encoding="utf-8")
    section = re.search(r"^## What it promises\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    rows = re.findall(r"^\|.*\|$", section.group(1), re.MULTILINE) if section else []
    if not rows:
        pytest.skip("the README has no table of promises")
    return rows[2:]


def test_every_promise_names_a_test() -> None:
    """Guards against a promise that nobody keeps."""
    rows = promises()
    assert len(rows) > 20
    assert [row for row in rows if not NAMED.search(row)] == []


@pytest.mark.parametrize("page", ["README.md", "tests/README.md"])
def test_every_named_test_exists(page: str) -> None:
    """Guards against a test that was renamed or removed, and is still said to keep a promise."""
    missing = []
    for path, name in set(NAMED.findall((ROOT / page).read_text(encoding="utf-8"))):
        file = ROOT / "tests" / path
        tree = ast.parse(file.read_text(encoding="utf-8")) if file.is_file() else ast.Module([], [])
        if name not in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}:
            missing.append(f"{path}::{name}")
    assert missing == []
