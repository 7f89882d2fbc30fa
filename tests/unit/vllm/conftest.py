"""A fake vLLM in this process, its log, and a real group of two ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dpshm import Board, Coordinator, Engine, Frontend
from dpshm.vllm import hooks, metrics
from dpshm.vllm.client_link import LINK
from dpshm.vllm.find import owner_name
from dpshm.vllm.options import Options
from tests.unit.vllm.fake_client import DPAsyncMPClient
from tests.unit.vllm.fake_core import INPUTS, EngineCoreProc
from tests.unit.vllm.fakes import HOOKED_CLASSES, Vllm


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Vllm:
    """A vLLM that imports find. What a test puts on its classes, or removes from them, ends with the test."""
    for kind in HOOKED_CLASSES:
        for name, value in list(vars(kind).items()):
            if name == "__init__" or not name.startswith("__"):
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


@pytest.fixture
def coordinator(group: str, using: Callable[[Any], Any]) -> Any:
    """A coordinator of two ranks."""
    return using(Coordinator(group=group, dp_size=2))


@pytest.fixture
def board(group: str, using: Callable[[Any], Any], coordinator: Any) -> Any:
    """The board of the group."""
    return using(Board.attach(group))


@pytest.fixture
def engines(group: str, using: Callable[[Any], Any], coordinator: Any) -> list[Engine]:
    """Both ranks, alive and paused."""
    return [using(Engine.attach(group, rank)) for rank in range(2)]


@pytest.fixture
def frontend(group: str, using: Callable[[Any], Any], coordinator: Any) -> Any:
    """A front-end in the row of API server 1; rank 1 is there, so that a front-end always finds an engine."""
    using(Engine.attach(group, 1))
    return using(Frontend.attach(group, owner=owner_name(1, INPUTS[1])))


@pytest.fixture
def make_core(vllm: Vllm, coordinator: Any) -> Callable[..., EngineCoreProc]:
    """`make_core()` gives a lockstep core of rank 0, `make_core(waves=False)` one that is on its own."""

    def make(waves: bool = True, **kwargs: Any) -> Any:
        kind = vllm.core.DPEngineCoreProc if waves else vllm.core.EngineCoreProc
        return kind(coordinator.stats_publish_address, inputs=INPUTS, **kwargs)

    return make


@pytest.fixture
def make_client(
    vllm: Vllm, coordinator: Any, engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., DPAsyncMPClient]]:
    """`make_client()` gives a client that balances over both ranks, with the plugin's hooks on its class."""
    monkeypatch.setattr(metrics, "install", lambda: None)  # this process's page stays: `test_hooks` tests that
    made: list[DPAsyncMPClient] = []

    def make(kind: str = "DPLBAsyncMPClient", address: str | None = None, **options: Any) -> DPAsyncMPClient:
        hooks.install(Options(**options))
        made.append(getattr(vllm.client, kind)(address or coordinator.stats_publish_address))
        return made[-1]

    yield make
    for client in made:
        if (link := vars(client).get(LINK)) is not None:
            link.close()
        client.close()
