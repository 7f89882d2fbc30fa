"""A fake vLLM in this process, and its log."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from tests.unit.vllm.fakes import HOOKED_CLASSES, Vllm


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Vllm:
    """A vLLM that imports find. What a test puts on its classes, or removes from them, ends with the test."""
    for kind in HOOKED_CLASSES:
        for name, value in list(vars(kind).items()):
            if not name.startswith("__"):
                monkeypatch.setattr(kind, name, value)
    fake = Vllm()
    for name, module in fake.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return fake


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[str], int]:
    """`log(text)` gives how many lines of the plugin's log have a text."""
    caplog.set_level("INFO", logger="vllm.dpshm")
    return lambda text: sum(
        text in record.getMessage() for record in caplog.records if record.name == "vllm.dpshm"
    )
