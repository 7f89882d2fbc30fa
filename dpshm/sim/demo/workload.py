"""The workload of a demo: a trace or the built-in arrivals, at a given speed, shared among the front-ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from random import Random
from typing import Literal, NamedTuple

from dpshm import policies
from dpshm.errors import SettingError
from dpshm.sim.demo.messages import EngineKind, Stats
from dpshm.sim.workloads import chat, synthetic
from dpshm.sim.workloads.chat import chat_arrivals
from dpshm.sim.workloads.synthetic import synthetic_arrivals
from dpshm.sim.workloads.traces import OF_A_TRACE, Units, check_units, read_trace

MAX_PROCESSES = 64
"""Engines, and front-ends: the room of a board of default size. Each is a process."""
MAX_REQUESTS = 200_000
"""More than any machine can play as processes, and a bound on memory."""

CHAT_ROOM = 3.0
"""So many times the expected chat requests are drawn; those after the end are left out."""

BuiltIn = Literal["code", "chat"]
_RATES = {"code": synthetic.MEAN_RATE_PER_S, "chat": chat.MEAN_RATE_PER_S}

Share = list[tuple[float, int, int, tuple[int, ...]]]
"""A front-end's arrivals: time in seconds, prompt tokens, output tokens, hashes of the prompt's blocks."""


@dataclass(frozen=True)
class DemoSettings:
    """The settings of a demo.

    Attributes:
        seconds: duration of the workload.
        rate: speed of the trace, as a multiple of the recorded speed.
        trace: a file to replay; None is the built-in workload.
        time_unit: of the trace's times; empty: as its format says.
        workload: which built-in one is played without a trace: "code" or "chat".
        stats: "board", or "pub" for the PUB path.
        seed: seed of the built-in workload and of how requests are shared among front-ends.
        engine: "sim", whose model is a sleep, or "torch", which computes one.
        prefix_index: whether front-ends know which blocks of prompts each engine has cached, where a trace has
            hashes of blocks and stats are on the board.
        dense: ranks step on their own, and there are no waves.
        keep: the arrivals begin again until a signal ends the demo.
        chaos: processes are stopped, killed and started again while it runs. Ranks are dense then: in lockstep
            the death of one ends the others.

    Raises:
        SettingError: a value is out of range.
    """

    engines: int = 8
    frontends: int = 4
    seconds: float = 20.0
    rate: float = 1.0
    trace: Path | None = None
    time_unit: str = ""
    workload: BuiltIn = "code"
    stats: Stats = "board"
    policy: str = "least_work"
    seed: int = 0
    engine: EngineKind = "sim"
    prefix_index: bool = True
    dense: bool = False
    keep: bool = False
    chaos: bool = False

    @property
    def waves(self) -> bool:
        """Whether ranks are in lockstep."""
        return not (self.dense or self.chaos)

    def __post_init__(self) -> None:
        for name, number in (("engines", self.engines), ("frontends", self.frontends)):
            if not 1 <= number <= MAX_PROCESSES:
                raise SettingError(f"{name} is {number}: choose 1 to {MAX_PROCESSES}, each is a process")
        for name, value in (("seconds", self.seconds), ("rate", self.rate)):
            if not (isfinite(value) and value > 0):
                raise SettingError(f"{name} is {value}: choose a number above 0")
        check_units(Units(self.time_unit))
        if self.trace is None and self.time_unit:
            raise SettingError(OF_A_TRACE)
        policies.by_name(self.policy)
        if self.engine == "torch" and not self.waves:
            raise SettingError("the ranks of --engine torch step together: leave out --dense and --chaos")
        if self.chaos and self.stats == "pub":
            raise SettingError("--chaos is for the board: leave out --stats pub")
        if self.engine == "torch" and find_spec("torch") is None:
            raise SettingError("--engine torch needs PyTorch, which is not installed: pip install 'dpshm[torch]'")


class Workload(NamedTuple):
    """The workload that is played.

    Attributes:
        shares: by front-end, its arrivals in order of time.
        seconds: its duration; less than the setting if the trace ends before.
        block_tokens: prompt tokens that a block's hash is for; 0: there are no blocks.
    """

    shares: list[Share]
    seconds: float
    block_tokens: int = 0


def make_workload(settings: DemoSettings, show: Callable[[int], None] = lambda _: None) -> Workload:
    """The arrivals of the time that is played, shared among the front-ends.

    Which front-end gets a request is drawn at random, as the kernel or a balancer in front of API servers
    deals out connections.

    Args:
        settings: what to run.
        show: called now and then with how many arrivals of the trace have been read; may raise, to end it.

    Raises:
        TraceError: the trace cannot be read.
        SettingError: there would be more than `MAX_REQUESTS` requests.
    """
    recorded_seconds = settings.seconds * settings.rate
    block_tokens = 0
    if settings.trace:
        units = Units(settings.time_unit)
        trace = read_trace(settings.trace, units, until_s=recorded_seconds, most=MAX_REQUESTS + 1, show=show)
        arrivals, block_tokens = trace.arrivals, trace.block_tokens
    else:
        expected = recorded_seconds * _RATES[settings.workload]
        if expected > 2 * MAX_REQUESTS:
            raise _too_many(f"about {expected:.0f}")
        arrivals = (
            synthetic_arrivals(recorded_seconds, settings.seed)
            if settings.workload == "code"
            else chat_arrivals(round(CHAT_ROOM * expected) + 50, settings.seed)
        )
    shares: list[Share] = [[] for _ in range(settings.frontends)]
    random = Random(settings.seed)
    count = 0
    for arrival in arrivals:
        if arrival.time_s >= recorded_seconds:
            break
        count += 1
        share = shares[random.randrange(settings.frontends)]
        blocks = arrival.block_hashes if block_tokens else ()
        share.append((arrival.time_s / settings.rate, arrival.prompt_tokens, arrival.output_tokens, blocks))
    if count > MAX_REQUESTS:
        raise _too_many(f"more than {MAX_REQUESTS}")
    cut_short = settings.trace and arrivals[-1].time_s < recorded_seconds
    seconds = arrivals[-1].time_s / settings.rate if cut_short else settings.seconds
    return Workload(shares, seconds, block_tokens)


def _too_many(count: str) -> SettingError:
    return SettingError(f"that is {count} requests, and {MAX_REQUESTS} are the most: lower --rate or --seconds")
