"""Tests of `dpshm.vllm.versions`: what makes the plugin stay off."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from dpshm.vllm import versions
from dpshm.vllm.versions import OLDEST, TESTED, Needed, release_of, why_not


@pytest.fixture
def release(monkeypatch):
    """`release("0.32.0")` makes that the vLLM of this process, with a module ``vllm.part``."""

    def install(version):
        module, part = ModuleType("vllm"), ModuleType("vllm.part")
        module.__version__ = version
        part.function = lambda first, second: None
        monkeypatch.setitem(sys.modules, "vllm", module)
        monkeypatch.setitem(sys.modules, "vllm.part", part)

    return install


@pytest.fixture
def passing(monkeypatch):
    """The dry run passes: `test_dry_run` tests it."""
    monkeypatch.setattr(versions, "dry_run", lambda: None)


@pytest.mark.usefixtures("passing")
@pytest.mark.parametrize(("version", "lines"), [(f"{TESTED[0]}+cpu", 0), ("99.1.0", 1)])
def test_a_release_whose_check_passes_is_taken(release, monkeypatch, log, version, lines):
    """Guards against a plugin that is off on a new release which it could serve, or that hides that it is new."""
    monkeypatch.setattr(versions, "NEEDED", (Needed("vllm.part", "function", ("first",)),))
    release(version)
    assert why_not() is None
    assert log("passed the self-check") == lines


@pytest.mark.usefixtures("passing")
def test_an_old_release_is_named_and_can_be_tried(release, monkeypatch):
    """Guards against hooks on a vLLM that was never tested, and against no way to try it."""
    monkeypatch.setattr(versions, "NEEDED", ())
    release("0.27.9")
    assert "0.27.9 is older than 0.28" in why_not()
    assert why_not(any_version=True) is None


def test_a_dry_run_that_fails_keeps_the_plugin_off(release, monkeypatch):
    """Guards against a release whose names are all there and which does something else."""

    def fails():
        raise RuntimeError("the wave is 0")

    monkeypatch.setattr(versions, "NEEDED", ())
    monkeypatch.setattr(versions, "dry_run", fails)
    release("99.1.0")
    assert "RuntimeError: the wave is 0" in why_not()
    assert why_not(any_version=True) is not None


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("0.33.0+cpu", (0, 33, 0)), ("0.33.1rc2.dev5+gabc", (0, 33, 1)), ("dev", ()), ("0.1.dev9", (0, 1))],
)
def test_the_numbers_of_a_version(version, numbers):
    """Guards against a candidate or a development build that ends the check with an error."""
    assert release_of(version) == numbers
    assert (numbers >= OLDEST) == version.startswith("0.33")


@pytest.mark.parametrize(
    ("needed", "cause"),
    [
        (Needed("vllm.part", "gone"), "has no vllm.part.gone"),
        (Needed("vllm.part", "function.gone"), "has no vllm.part.function.gone"),
        (Needed("vllm.other", "function"), "has no vllm.other.function"),
        (Needed("vllm.part", "function", ("first", "third")), "no parameter third among first, second"),
    ],
)
def test_what_is_missing_is_named(release, monkeypatch, needed, cause):
    """Guards against a server that breaks at its first request because a name was gone."""
    monkeypatch.setattr(versions, "NEEDED", (needed,))
    release("0.32.0")
    assert cause in why_not()


def test_the_page_has_the_same_releases():
    """Guards against a page for operators that says that other releases were tested than the log says."""
    page = (Path(versions.__file__).parent / "README.md").read_text()
    table = page[page.index("## Versions") : page.index("## When it does not help")]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| 0.")]
    tested = [release.strip() for names, runs in rows if runs.strip() == "yes" for release in names.split(",")]
    assert tuple(tested) == TESTED
