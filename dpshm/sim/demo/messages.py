"""The messages between the demo's processes, and their addresses.

    demo -> child            stdin    a line of JSON: its settings
    demo -> front-end        stdin    one more: `Go`
    child -> demo            stdout   lines of JSON: `Ready`; `Progress`; last `EngineReport` or `FrontendReport`
    front-end -> engine      PUSH     `RequestMessage`, msgpack
    engine -> front-end      PUSH     `ReplyMessage`, msgpack: one a step and front-end, as vLLM's engines do

The ZMQ sockets are abstract ipc addresses (unix(7)). They have no file, so none remains when a process dies. All
of them start with a prefix that names the run and holds a random part.
"""

from __future__ import annotations

import os
import secrets
from typing import Literal, Self

import msgspec

from dpshm.frontend.route import Route

Stats = Literal["board", "pub"]
EngineKind = Literal["sim", "torch"]


class EngineSettings(msgspec.Struct):
    """An engine's orders."""

    parent_pid: int
    group: str
    prefix: str
    stats: Stats
    dp_rank: int
    dp_size: int
    num_frontends: int
    # What `dpshm.sim.demo.lockstep` needs; with PyTorch an empty file for the ranks to meet in; -1: each rank
    # steps on its own.
    lockstep_fd: int
    step_limit_s: float = 60.0  # with PyTorch: a step that lasts longer is stuck
    block_tokens: int = 0  # of the prefix cache; 0: the engine has none
    prefix_index: bool = True  # whether it shows its prefix cache to front-ends


class FrontendSettings(msgspec.Struct):
    """A front-end's orders.

    An arrival is its time (seconds after `Go.start_ns`), prompt and output tokens, and the hashes of its blocks.
    """

    parent_pid: int
    group: str
    prefix: str
    stats: Stats
    policy: str
    index: int
    dp_size: int
    num_frontends: int
    arrivals: list[tuple[float, int, int, tuple[int, ...]]]
    block_tokens: int = 0  # of the blocks; 0: there are none
    repeat_s: float = 0.0  # the arrivals begin again after so many seconds; 0: they do not
    retries: bool = False  # requests whose rank died are sent again
    first_id: int = 0  # of its requests: replies to a predecessor have other numbers


class CoordinatorSettings(msgspec.Struct):
    """The coordinator's orders."""

    parent_pid: int
    group: str
    dp_size: int
    waves: bool = True
    stall_timeout_s: float = 60.0


class BroadcastSettings(msgspec.Struct):
    """The orders of the process that broadcasts stats on the PUB path."""

    parent_pid: int
    prefix: str
    dp_size: int


class Go(msgspec.Struct):
    """Time 0 of the replay on CLOCK_MONOTONIC, the same for all front-ends."""

    start_ns: int


class Ready(msgspec.Struct, tag=True):
    """The child is ready to work."""


class Progress(msgspec.Struct, tag=True):
    """The progress of a front-end."""

    sent: int
    answered: int  # completed or refused


class FrontendReport(msgspec.Struct, tag=True):
    """A front-end's results, with figures by request."""

    sent: int
    completed: int
    refused: int
    ttft_ms: list[float]
    staleness_us: list[float]


class EngineReport(msgspec.Struct, tag=True):
    """An engine's figures that the board does not hold."""

    preemptions: int
    malformed: int
    prompt_tokens: int = 0  # of the prompts that it accepted
    cached_tokens: int = 0  # of those, found in its prefix cache


class RequestMessage(msgspec.Struct, array_like=True, frozen=True):
    """One request; `request_id` is the front-end's own."""

    request_id: int
    frontend: int
    wave: int
    prompt_tokens: int
    booked_tokens: int  # of the prompt, what its front-end expects to be computed
    output_tokens: int
    blocks: tuple[int, ...]  # hashes of the prompt's blocks
    reply_to: int  # which front-end of the demo; `frontend` is its row on the board

    @classmethod
    def of(
        cls,
        request_id: int,
        frontend: int,
        route: Route,
        output_tokens: int,
        *,
        blocks: tuple[int, ...] = (),
        reply_to: int = 0,
    ) -> Self:
        """The message of a request that was routed."""
        prompt_tokens = route.prompt_tokens + route.cached_tokens
        return cls(
            *(
                request_id,
                frontend,
                route.wave,
                prompt_tokens,
                route.prompt_tokens,
                output_tokens,
                blocks,
                reply_to,
            )
        )


class ReplyMessage(msgspec.Struct, array_like=True, frozen=True):
    """The request ids whose first token, last token or refusal a step brought.

    `queue_s` says of each request in `first` how long it waited in the engine's queue.
    """

    first: list[int]
    completed: list[int]
    refused: list[int]
    queue_s: list[float]


def new_prefix() -> str:
    """The prefix of the addresses of one run; no other run has it."""
    return f"ipc://@dpshm-demo-{os.getpid()}-{secrets.token_hex(6)}"


def engine_address(prefix: str, dp_rank: int) -> str:
    """The address where an engine receives requests."""
    return f"{prefix}-engine-{dp_rank}"


def frontend_address(prefix: str, index: int) -> str:
    """The address where a front-end receives replies."""
    return f"{prefix}-frontend-{index}"


def reports_address(prefix: str) -> str:
    """The address where the broadcaster receives the engines' reports."""
    return f"{prefix}-reports"


def broadcast_address(prefix: str) -> str:
    """The address where the broadcaster publishes."""
    return f"{prefix}-broadcast"
