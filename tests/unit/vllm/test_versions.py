"""Tests of `dpshm.vllm.versions`: what makes the plugin stay off."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from dpshm.vllm import versions
from dpshm.vllm.versions import OLDEST, TESTED, Needed, release_of, why_not
from tests.e2e.vllm import tried as tried_tests


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


def test_the_page_and_the_list_say_what_was_tried():
    """Guards against a table, or a list of releases, that says other than what ran."""
    tried = tried_tests.load()
    assert list(TESTED) == tried_tests.releases(tried)
    assert f"{tried_tests.MARK}{tried_tests.table(tried)}\n" in tried_tests.PAGE.read_text()


def test_what_was_tried_is_there():
    """Guards against a record of tests that have another name by now, or are gone."""
    folder = tried_tests.FILE.parent
    for by_file in tried_tests.load().values():
        for file, tests in by_file.items():
            if (folder / file).exists():
                gone = {name.partition("[")[0] for name in tests} - tried_tests.functions(folder / file)
                assert not gone, (file, gone)
            else:
                assert file in (tried_tests.OWN, tried_tests.STOCK)


def test_a_report_is_added_test_by_test(tmp_path):
    """Guards against a test that failed and counts as passed, and a part that replaces the whole."""
    report = tmp_path / "report.xml"
    cases = '<testcase classname="tests.e2e.vllm.test_gone" name="{}">{}</testcase>'
    tried = {}
    report.write_text(f"<a>{cases.format('test_a', '')}{cases.format('test_b', '<failure/>')}</a>")
    tried_tests.add(tried, "0.9.0", report)
    report.write_text(f"<a>{cases.format('test_c', '<skipped/>')}{cases.format('test_a', '<error/>')}</a>")
    tried_tests.add(tried, "0.9.0", report)
    tried_tests.add(tried, "0.10.0", report, tried_tests.OWN)
    assert tried["0.9.0"]["test_gone.py"] == {"test_a": "failed", "test_b": "failed", "test_c": "skipped"}
    report.write_text(f"<a>{cases.format('test_a', '')}</a>")
    tried_tests.add(tried, "0.10.0", report)
    tried_tests.add(tried, "0.9.0", report)
    assert tried_tests.table(tried) == (
        "| tests | 0.10.0 | 0.9.0 |\n| --- | --- | --- |\n"
        "| `tests/e2e/vllm/test_gone.py` | 1 of 1 | 1 of 3, 1 failed, 1 skipped |\n"
        "| vLLM's own, with dpshm | 0 of 2, 1 failed, 1 skipped | not run |\n"
    )


def test_tests_of_a_file_that_were_not_run_are_counted():
    """Guards against "1 of 1" where one test of several ran."""
    first, *others = sorted(tried_tests.functions(tried_tests.FILE.with_name("test_dense.py")))
    (*_, line) = tried_tests.table({"0.9.0": {"test_dense.py": {f"{first}[a]": "passed"}}}).splitlines()
    assert line == f"| `tests/e2e/vllm/test_dense.py` | 1 of 1, {len(others)} not run |"
