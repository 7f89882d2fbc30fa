"""The command line as a whole: its help, its errors, its completion."""

from __future__ import annotations

import inspect
import shlex
import subprocess
import sys

import pytest

from dpshm import Coordinator
from dpshm.cli import COMMANDS, load_command
from tests.e2e.load import environment

OPERATORS = (
    "ls",
    "scale",
    "coordinator",
    "top",
    "stat",
    "events",
    "drain",
    "undrain",
    "doctor",
    "dashboard",
    "web",
    "keygen",
)


def test_every_command_of_the_operator_is_there():
    """Guards against a command that is written and not registered."""
    assert set(OPERATORS) <= set(COMMANDS)


@pytest.mark.parametrize("name", OPERATORS)
def test_help_has_an_example(name: str):
    """Guards against options without a help text."""
    command = load_command(name)
    text = inspect.getdoc(command) or ""
    assert "Example" in text
    assert f"dpshm {name}" in text


def test_help_is_printed_as_it_is_written(line):
    """Guards against examples that are filled into one paragraph."""
    _, text, _ = line.run("drain", "--help")
    assert "\n    dpshm drain 3\n" in text
    assert "\\b" not in text


def test_an_unknown_option_says_where_to_look(line):
    """Guards against an error without a way on."""
    status, _, err = line.run("stat", "--jsn")
    assert (status, "No such option: --jsn" in err, "--json" in err) == (2, True, True), err


@pytest.mark.slow
def test_groups_are_completed(group, using):
    """Guards against a completion that offers nothing, or fails in the middle of a command line."""
    using(Coordinator(group=group, dp_size=1))
    # As the shell's function does it, for a command that is called dpshm.
    code = "import sys; sys.argv = ['dpshm']; from dpshm.cli import main; main()"
    asked = {"COMP_WORDS": f"dpshm stat --group {group[:-2]}", "COMP_CWORD": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(_DPSHM_COMPLETE="complete_bash", **asked),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert group in done.stdout.split(), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["stat", "--schema"], ["simulate", "--help"]])
def test_outputs_that_are_full_or_closed(arguments):
    """Guards against a traceback where a disk is full, a reader is gone, or an output was closed."""
    command = shlex.join([sys.executable, "-m", "dpshm", *arguments])
    for redirected, statuses, said in (
        (f"{command} > /dev/full", {1}, "dpshm: error: No space left on device"),
        (f"{command} >&-", {0}, ""),
        (f"{command} 2>&- | true", {0}, ""),
    ):
        run = subprocess.run(
            ["bash", "-c", redirected], capture_output=True, text=True, check=False, env=environment()
        )
        assert (run.returncode in statuses, run.stderr.strip()) == (True, said)


@pytest.mark.parametrize(
    "arguments",
    [
        ["stat", "--watch", "inf"],
        ["stat", "--over", "inf"],
        ["stat", "--over", "nan"],
        ["top", "--interval", "inf"],
        ["web", "--interval", "1e400"],
        ["drain", "0", "--timeout", "inf"],
        ["drain", "²"],
        ["events", "--history", "1" * 30],
        ["demo", "--seconds", "inf"],
        ["simulate", "--rate", "nan"],
        ["simulate", "--step-ms", "8,0.04"],
        ["coordinator", "-g", "x", "--dp-size", "9" * 30],
        ["coordinator", "-g", "x", "--dp-size", "1", "--stall-timeout", "inf"],
    ],
)
def test_numbers_that_are_none_are_refused(line, arguments):
    """Guards against a traceback, or an endless wait, where a number is infinite, huge or no number."""
    status, _, err = line.run(*arguments)
    assert (status, "rror" in err) == (2, True), err
