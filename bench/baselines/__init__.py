"""The peers: designs by which front-ends learn the load of engines, one file each, behind one interface.

    board       dpshm: shared memory, bookings, no process in the path
    pub         the broadcast design: engines push, a coordinator publishes, front-ends keep a copy
    flock       one file in shared memory, msgpack slots, one lock over the whole file
    vllm        vLLM's own coordinator process, in an interpreter of its own

A peer has a *middle*, the process or file through which the ends communicate, and *ends* in the engines' and
front-ends' processes. A `Spec` tells an end how to reach the middle; it can be sent to another process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import zmq


class Spec(NamedTuple):
    """The addresses and sizes of a running peer.

    Attributes:
        module: the module of this package that has its ends.
        dp_size: number of engines.
        num_frontends: number of front-ends.
        where: the group's name, addresses or path that its ends need.
    """

    module: str
    dp_size: int
    num_frontends: int
    where: Any


class EngineEnd(Protocol):
    """An engine's end."""

    def publish(self, waiting: int, running: int) -> None:
        """Reports a new load."""

    def close(self) -> None:
        """Leaves."""


class WaveEngineEnd(EngineEnd, Protocol):
    """An engine's end, of a peer that runs request waves."""

    def wait_ready(self) -> None:
        """Waits until what is sent to all engines reaches this one."""

    def register(self, poller: zmq.Poller) -> None:
        """Makes a poller return when START may have come."""

    def receive_start(self) -> bool:
        """Handles START if it has come; returns whether this rank runs. Rank 0 confirms, as vLLM's engines do."""

    def accept_request(self, wave: int) -> None:
        """Handles a request stamped with that wave; it wakes this rank."""

    def wave_complete(self) -> None:
        """Ends the wave because all ranks are idle; rank 0 reports it."""


class FrontendEnd(Protocol):
    """A front-end's end.

    Attributes:
        index: the index by which engines know it.
    """

    index: int

    def known(self) -> Sequence[Any]:
        """Its present knowledge, one item for each rank. An item changes with each update that it learns of."""

    def waiting(self, item: Any) -> int:
        """The waiting count in an item of `known`."""

    def wait(self, timeout_ms: int) -> None:
        """Receives waiting messages, and for `timeout_s` those that still come."""

    def sockets(self) -> list[Any]:
        """The sockets to poll for updates; empty for a peer without messages."""

    def beliefs(self) -> tuple[list[int], list[int]]:
        """The requests that it believes to be at each rank: as reported, and with bookings."""

    def choose(self) -> int:
        """The engine for one request, which is booked there."""

    def finished(self, dp_rank: int) -> None:
        """Records the end of a request that this front-end sent there."""

    def close(self) -> None:
        """Leaves."""


class WaveFrontendEnd(FrontendEnd, Protocol):
    """A front-end's end, of a peer that runs request waves."""

    def first_request(self, send: Callable[[int, int], None]) -> None:
        """Chooses an engine for a request while the ranks are paused, calls `send(rank, wave)`, and wakes them."""

    def paused(self) -> bool:
        """Whether it believes that the ranks are paused in a wave that it has not woken yet."""


class Middle(Protocol):
    """A running peer.

    Attributes:
        spec: the spec for its ends.
        pids: its own processes, without engines and front-ends.
    """

    spec: Spec
    pids: list[int]

    def close(self) -> None:
        """Ends it."""


Start = Callable[[int, int], Middle]
"""Starts a peer's middle for so many engines and front-ends."""


def engine_end(spec: Spec, dp_rank: int) -> Any:
    """An engine's end of a running peer."""
    return import_module(f"bench.baselines.{spec.module}").engine_end(spec, dp_rank)


def frontend_end(spec: Spec, index: int) -> Any:
    """A front-end's end of a running peer."""
    return import_module(f"bench.baselines.{spec.module}").frontend_end(spec, index)
