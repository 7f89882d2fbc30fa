"""Tests of `dpshm.vllm.versions`: what makes the plugin stay off."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from dpshm.vllm import versions
from dpshm.vllm.versions import TRIED, Needed, why_not


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


def test_a_tried_release_is_taken(release, monkeypatch):
    """Guards against a plugin that is off where it was tried."""
    monkeypatch.setattr(versions, "NEEDED", (Needed("vllm.part", "function", ("first",)),))
    release(f"{TRIED[0]}+cpu")
    assert why_not() is None


def test_an_unknown_release_is_named_and_can_be_tried(release, monkeypatch):
    """Guards against hooks on a vLLM that was never tested, and against no way to try it."""
    monkeypatch.setattr(versions, "NEEDED", ())
    release("99.1.0")
    assert "99.1.0" in why_not()
    assert TRIED[0] in why_not()
    assert why_not(any_version=True) is None


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
    release(TRIED[0])
    assert cause in why_not()
