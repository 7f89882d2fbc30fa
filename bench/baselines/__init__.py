"""The peers: ways for front-ends to learn the load of engines, one file each, behind one interface.

    board       dpshm: shared memory, bookings, no process in the path
    pub         the broadcast design: engines push, a coordinator publishes, front-ends keep a copy
    flock       one file in shared memory, msgpack slots, one lock over the whole file
    vllm        vLLM's own coordinator process, in an interpreter of its own

A peer has a *middle*, the process or file that the ends meet at, and *ends* in the engines' and front-ends'
processes. `Spec` is what an end has to know; it can be sent to another process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import zmq


class Spec(NamedTuple):
    """Where a running peer can be reached.

    Attributes:
        module: the module of this package that has its ends.
        dp_size: engines.
        num_frontends: front-ends that take part.
        where: what its ends need: a group's name, addresses, a path.
    """

    module: str
    dp_size: int
    num_frontends: int
    where: Any


class EngineEnd(Protocol):
    """An engine's end."""

    def publish(self, waiting: int, running: int) -> None:
        """Makes a new load known."""

    def close(self) -> None:
        """Leaves."""


class WaveEngineEnd(EngineEnd, Protocol):
    """An engine's end, of a peer that runs request waves."""

    def wait_ready(self) -> None:
        """Waits until what is sent to all engines reaches this one."""

    def register(self, poller: zmq.Poller) -> None:
        """Has a poller return when START may have come."""

    def receive_start(self) -> bool:
        """Takes START if it has come; whether this rank now runs. Rank 0 confirms, as vLLM's engines do."""

    def accept_request(self, wave: int) -> None:
        """A request came in, stamped with that wave: it wakes this rank."""

    def wave_complete(self) -> None:
        """All ranks are idle; rank 0 says so."""


class FrontendEnd(Protocol):
    """A front-end's end.

    Attributes:
        index: by which engines know it.
    """

    index: int

    def known(self) -> Sequence[Any]:
        """What it knows at this instant, one item a rank; an item changes with each update that it learns of."""

    def waiting(self, item: Any) -> int:
        """The waiting count in an item of `known`."""

    def wait(self, timeout_ms: int) -> None:
        """Takes in what has been sent to it, and for so long what still comes."""

    def sockets(self) -> list[Any]:
        """What to poll for news; none where there is nothing to be sent."""

    def beliefs(self) -> tuple[list[int], list[int]]:
        """By rank, the requests that it believes to be there: as reported alone, and with what was booked."""

    def choose(self) -> int:
        """The engine for one request, which is booked there."""

    def finished(self, dp_rank: int) -> None:
        """One request that this front-end had sent there ended."""

    def close(self) -> None:
        """Leaves."""


class WaveFrontendEnd(FrontendEnd, Protocol):
    """A front-end's end, of a peer that runs request waves."""

    def first_request(self, send: Callable[[int, int], None]) -> None:
        """Chooses an engine for a request while the ranks are paused, sends it (rank, wave), has them woken."""

    def paused(self) -> bool:
        """Whether it believes the ranks paused, in a wave that it has not woken yet."""


class Middle(Protocol):
    """A running peer.

    Attributes:
        spec: for its ends.
        pids: its processes, those of engines and front-ends apart.
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
