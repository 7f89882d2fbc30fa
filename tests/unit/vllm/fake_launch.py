"""Fakes of what vLLM's launcher starts engines with; the processes and their handshake are real."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from dataclasses import dataclass, field
from multiprocessing import connection
from types import SimpleNamespace
from typing import Any

import msgspec
import zmq

from dpshm import Engine


@dataclass
class Config:
    """``VllmConfig``.

    Attributes:
        group: the group whose row an engine takes.
        fails: whether an engine that starts from now on ends at once.
        changed: by the first start, as vLLM changes its configuration.
    """

    group: str
    fails: bool = False
    changed: bool = False
    parallel_config: Any = field(default_factory=lambda: SimpleNamespace(data_parallel_size=2))
    model_config: Any = field(default_factory=lambda: SimpleNamespace(is_moe=False))


@dataclass
class EngineHandshakeMetadata:
    """What an engine is told at its start."""

    addresses: Any
    parallel_config: dict[str, Any]


@dataclass
class Addresses:
    """Of the API servers."""

    inputs: list[str]


def run_engine_core(
    *, vllm_config: Config, handshake_address: str | None, dp_rank: int, local_dp_rank: int, **_: Any
) -> None:
    """An engine: says HELLO, takes its row, says READY, waits for its end. Without an address: only the row."""
    signal.signal(signal.SIGTERM, lambda *_: exit_in_order())
    assert not vllm_config.changed
    if vllm_config.fails:
        raise SystemExit(3)
    if handshake_address is None:
        with Engine.attach(vllm_config.group, dp_rank):
            wait_for_a_signal()
        return
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.IDENTITY, dp_rank.to_bytes(2, "little"))
        socket.connect(handshake_address)
        hello = {"local": True, "headless": False}
        socket.send(msgspec.msgpack.encode(hello | {"status": "HELLO"}))
        told = msgspec.msgpack.decode(socket.recv(), type=EngineHandshakeMetadata)
        assert told.parallel_config == {}
        assert told.addresses["inputs"]
        with Engine.attach(vllm_config.group, dp_rank):
            socket.send(msgspec.msgpack.encode(hello | {"status": "READY"}))
            wait_for_a_signal()


def wait_for_a_signal() -> None:
    """Waits in turns: Python does not see a signal that comes just before a wait until that wait is over."""
    while True:
        time.sleep(0.1)


def exit_in_order() -> None:
    """As vLLM's engines at a SIGTERM."""
    raise SystemExit(0)


def get_mp_context() -> Any:
    """As where vLLM forks."""
    return multiprocessing.get_context("forkserver")


class CoreEngineProcManager:
    """Starts engines and ends them."""

    def __init__(
        self,
        local_engine_count: int,
        start_index: int,
        local_start_index: int,
        vllm_config: Config,
        local_client: bool,
        handshake_address: str | None,
        client_handshake_address: str | None = None,
    ) -> None:
        named = {"vllm_config": vllm_config, "handshake_address": handshake_address}
        self.processes = [
            get_mp_context().Process(
                target=run_engine_core,
                name=f"EngineCore_DP{start_index + i}",
                kwargs=named | {"dp_rank": start_index + i, "local_dp_rank": local_start_index + i},
            )
            for i in range(local_engine_count)
        ]
        self._finalizer = SimpleNamespace(detach=lambda: None)
        self.manager_stopped = threading.Event()
        self.failed_proc_name: str | None = None
        for process in self.processes:
            process.start()
        vllm_config.changed = True

    def shutdown(self, timeout: float | None = None) -> None:
        """Ends them."""
        self.manager_stopped.set()
        for process in self.processes:
            process.kill()
            process.join(timeout)

    def monitor_engine_liveness(self) -> None:
        """Ends all when one ends."""
        for sentinel in connection.wait([p.sentinel for p in self.processes]):
            (process,) = (p for p in self.processes if p.sentinel == sentinel)
            process.join()
            if process.exitcode != 0:
                self.failed_proc_name = process.name
        self.shutdown()
