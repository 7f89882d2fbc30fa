"""``dpshm simulate``: compares policies and information models on the same arrivals, over several seeds.

A *combination* is a policy with an information model. Each combination runs once per seed. The seed decides which
front-end gets which request. It also decides the arrivals of the built-in workload, or the point of a trace where
the replay begins (the trace is a ring). Ratios are computed seed by seed, on the same arrivals, and then averaged.
Intervals are Student's, 95 %.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from random import Random

from dpshm.errors import SettingError
from dpshm.policies import key_of
from dpshm.sim.lab.figures import Combination, Comparison, Figures, figures_of, result_of
from dpshm.sim.lab.information import check_information
from dpshm.sim.lab.mapping import mapping
from dpshm.sim.lab.plant import Plant
from dpshm.sim.lab.rank import Job
from dpshm.sim.lab.rivals import RIVALS, rival_or_policy
from dpshm.sim.lab.run import ORACLE, run
from dpshm.sim.workloads.agents import agents_arrivals, fan_out_arrivals
from dpshm.sim.workloads.chat import chat_arrivals
from dpshm.sim.workloads.formats import MAX_TOKENS
from dpshm.sim.workloads.long_context import long_context_arrivals
from dpshm.sim.workloads.traces import OF_A_TRACE, Arrival, Trace, TraceError, Units, check_units, read_trace

DEFAULT_REQUESTS = 12_000
MAX_REQUESTS = 1_000_000
BASELINE = ("vllm", "broadcast")
WORKLOADS = {
    "chat": chat_arrivals,
    "agents": agents_arrivals,
    "fan-out": fan_out_arrivals,
    "long-context": long_context_arrivals,
}
"""The built-in ones by name: how many requests, and a seed, to arrivals."""
_BROADCAST_BY_DEFAULT = ("vllm", "round_robin")


@dataclass(frozen=True)
class SimulationSettings:
    """What is compared, and on what.

    Attributes:
        plant: engines and front-ends.
        policies: names; `dpshm.sim.lab.run.ORACLE` is one. ``NAME@INFORMATION`` says what that one knows, whatever
            `information` says.
        information: names; empty: `vllm` and `round_robin` get the broadcast, the others the live board.
        trace: a file to replay; None is a built-in workload.
        time_unit: of the trace's times; empty: as its format says.
        block_tokens: prompt tokens that a hash of the trace is for; 0: as its format and its lines say.
        workload: which of `WORKLOADS`, without a trace.
        rate: how many times the recorded speed.
        requests: at most so many; None: all of a trace, `DEFAULT_REQUESTS` of the built-in workload.
        skew: front-end i gets a share proportional to ``1 / (i + 1) ** skew``; 0 is even.
        seeds: how many runs of each combination.
        first_seed: the seed of the first.
        key_tokens: the key of a request, for `affinity`, is the hash of the leading blocks of its prompt that have
            so many tokens together; of one block at least.
        oracle: run the oracle too, for the regret.

    Raises:
        SettingError: a value is out of range.
    """

    plant: Plant = field(default_factory=Plant)
    policies: tuple[str, ...] = ("vllm", "round_robin", "least_loaded", "power_of_two", "least_work")
    information: tuple[str, ...] = ()
    trace: Path | None = None
    time_unit: str = ""
    block_tokens: int = 0
    workload: str = "chat"
    rate: float = 1.0
    requests: int | None = None
    skew: float = 0.0
    seeds: int = 3
    first_seed: int = 0
    key_tokens: int = 1024
    oracle: bool = True

    def __post_init__(self) -> None:
        for name, number, most in (
            ("engines", self.plant.engines, 4096),
            ("frontends", self.plant.frontends, 4096),
            ("seeds", self.seeds, 1000),
            ("requests", 1 if self.requests is None else self.requests, MAX_REQUESTS),
            ("key_tokens", self.key_tokens, MAX_TOKENS),
        ):
            if not 1 <= number <= most:
                raise SettingError(f"{name} is {number}: choose 1 to {most}")
        if not (isfinite(self.rate) and self.rate > 0):
            raise SettingError(f"rate is {self.rate}: choose a number above 0")
        if not (isfinite(self.skew) and self.skew >= 0):
            raise SettingError(f"skew is {self.skew}: choose 0 (even) or more")
        check_units(Units(self.time_unit, self.block_tokens))
        if self.trace is None and (self.time_unit or self.block_tokens):
            raise SettingError(OF_A_TRACE)
        if self.workload not in WORKLOADS:
            raise SettingError(f"no workload {self.workload!r}: choose one of {', '.join(WORKLOADS)}")
        if not self.policies:
            raise SettingError("there is nothing to compare: name at least one policy")
        for policy in self.policies:
            _check_combination(policy)
        for information in self.information:
            check_information(information)

    @property
    def combinations(self) -> list[Combination]:
        """The combinations to run, each once."""
        pairs = []
        for policy in self.policies:
            name, at, information = policy.partition("@")
            if name != ORACLE:
                pairs += [
                    (name, i) for i in ((information,) if at else self.information or (_information_of(name),))
                ]
        if ORACLE in self.policies or (self.oracle and not self.plant.lockstep):
            pairs.append((ORACLE, "live"))
        return list(dict.fromkeys(pairs))


def make_jobs(settings: SimulationSettings, seed: int, trace: Trace | None = None) -> list[Job]:
    """The requests of one run, shared among the front-ends.

    Args:
        settings: the comparison's settings.
        seed: the run's seed.
        trace: the trace, if it has been read already.

    Raises:
        TraceError: the trace cannot be read.
    """
    random = Random(seed)
    block_tokens = settings.plant.block_tokens
    if trace := trace or read_for(settings):
        recorded = trace.arrivals
        # Seed 0 replays it as it was recorded.
        start = random.randrange(len(recorded)) if seed else 0
        arrivals = _turned(recorded, start)[: settings.requests]
        block_tokens = trace.block_tokens
    else:
        arrivals = WORKLOADS[settings.workload](settings.requests or DEFAULT_REQUESTS, seed)
    key_blocks = max(1, settings.key_tokens // max(1, block_tokens))
    shares = [1 / (f + 1) ** settings.skew for f in range(settings.plant.frontends)]
    frontends = random.choices(range(len(shares)), shares, k=len(arrivals))
    return [
        Job(
            arrival.time_s / settings.rate,
            frontend,
            arrival.prompt_tokens,
            arrival.output_tokens,
            key_of(repr(arrival.block_hashes[:key_blocks])) if arrival.block_hashes else None,
            arrival.block_hashes,
        )
        for arrival, frontend in zip(arrivals, frontends, strict=True)
    ]


def read_for(settings: SimulationSettings, show: Callable[[int], None] = lambda _: None) -> Trace | None:
    """The trace of a comparison; as much of it as is replayed. None is the built-in workload.

    Args:
        settings: what is compared.
        show: called now and then with how many arrivals have been read.

    Raises:
        TraceError: it cannot be read, or nothing tells how many tokens a hash is for.
    """
    if settings.trace is None:
        return None
    # Each seed but 0 begins somewhere in the whole of it.
    most = settings.requests if settings.seeds == 1 and settings.first_seed == 0 else None
    units = Units(settings.time_unit, settings.block_tokens)
    trace = read_trace(settings.trace, units, most=most, show=show)
    if settings.block_tokens and not any(arrival.block_hashes for arrival in trace.arrivals):
        raise TraceError(f"the trace {settings.trace} has no hashes of blocks: leave --block-tokens out")
    if not trace.block_tokens and any(arrival.block_hashes for arrival in trace.arrivals):
        raise TraceError(
            f"the trace {settings.trace} has hashes whose number does not tell how many prompt tokens one is for: "
            "say so with --block-tokens, such as --block-tokens 16"
        )
    return trace


def _turned(arrivals: Sequence[Arrival], start: int) -> list[Arrival]:
    """Rotates a trace: begins at one arrival, ends at the one before it; the first arrival is at 0 s."""
    if not start:
        return list(arrivals)
    from_s = arrivals[start].time_s
    # The gap where the end meets the beginning is the mean one.
    length_s = arrivals[-1].time_s + arrivals[-1].time_s / max(1, len(arrivals) - 1)
    later = [a._replace(time_s=a.time_s - from_s) for a in arrivals[start:]]
    return later + [a._replace(time_s=a.time_s - from_s + length_s) for a in arrivals[:start]]


def compare(
    settings: SimulationSettings,
    processes: int = 1,
    show: Callable[[int, int], None] = lambda *_: None,
    show_reading: Callable[[int], None] = lambda _: None,
) -> Comparison:
    """Runs every combination on every seed.

    Args:
        settings: the comparison's settings.
        processes: number of runs at a time; more than 1 uses child processes.
        show: called with the number of runs that are done, and of all runs.
        show_reading: called now and then with how many arrivals of the trace have been read.

    Raises:
        TraceError: the trace cannot be read.
        SettingError: the workload has no requests that fit.
        DpshmError: a child process was killed.
    """
    trace = read_for(settings, show_reading)
    combinations = settings.combinations
    seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
    tasks = [(combination, seed) for seed in seeds for combination in combinations]
    found: dict[tuple[Combination, int], Figures] = {}
    show(0, len(tasks))
    with mapping(_run_task, (settings, trace), min(processes, len(tasks))) as figures_of_tasks:
        for task, figures in figures_of_tasks(tasks):
            found[task] = figures
            show(len(found), len(tasks))
    workload = f"{settings.trace} ({trace.described})" if trace else f"built-in {settings.workload}"
    return _put_together(settings, workload, combinations, [[found[c, s] for s in seeds] for c in combinations])


def _run_task(
    given: tuple[SimulationSettings, Trace | None], task: tuple[Combination, int]
) -> tuple[tuple[Combination, int], Figures]:
    settings, trace = given
    (policy, information), seed = task
    jobs = make_jobs(settings, seed, trace)
    if not jobs:
        raise SettingError("the workload has no requests")
    plant = (
        replace(settings.plant, block_tokens=trace.block_tokens)
        if trace and trace.block_tokens
        else settings.plant
    )
    return task, figures_of(run(plant, jobs, policy, information))


def _put_together(
    settings: SimulationSettings, workload: str, combinations: list[Combination], runs: list[list[Figures]]
) -> Comparison:
    by_combination = dict(zip(combinations, runs, strict=True))
    baseline = BASELINE if BASELINE in by_combination else combinations[0] if len(combinations) > 1 else None
    if baseline and baseline[0] == ORACLE:
        baseline = None
    oracle = by_combination.get((ORACLE, "live"))
    results = [
        result_of(combination, figures, baseline and by_combination[baseline], oracle)
        for combination, figures in by_combination.items()
    ]
    first = runs[0]
    return Comparison(
        workload=workload,
        engines=settings.plant.engines,
        frontends=settings.plant.frontends,
        rate=settings.rate,
        seeds=settings.seeds,
        requests=first[0].requests,
        requests_per_s=sum(f.requests_per_s for f in first) / len(first),
        baseline=baseline,
        results=results,
    )


def _check_combination(policy: str) -> None:
    name, at, information = policy.partition("@")
    if name != ORACLE:
        rival_or_policy(name)
    if at:
        check_information(information)


def _information_of(policy: str) -> str:
    if policy in _BROADCAST_BY_DEFAULT:
        return "broadcast"
    return "live-index" if policy in RIVALS and policy not in ("shortest_kv", "br_0") else "live"
