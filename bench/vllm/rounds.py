"""The order of a measurement: all arms play each round of each scenario, and every result is given at once.

Arms play in turn, and the first of them changes from round to round. With `Plan.side_by_side`, all servers are
started at once, each in a lane of its own cores, and the arms of a round play at the same time; they change lanes
from round to round. Dense and lockstep scenarios then play beside each other. That fits more rounds into the time
of a machine, and a slow moment of it meets all arms.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bench.vllm.lane import Lane, Load, Sizes
from bench.vllm.scenarios import DEPLOYMENTS, SCENARIOS, Scenario, faster, thinned
from dpshm.sim.workloads.agents import BLOCK_TOKENS
from dpshm.sim.workloads.traces import Arrival, read_trace

WARM_UP = [Arrival(i * 0.01, 50 + 37 * i % 900, 8) for i in range(400)]
SETTLE_S = 1.0
SPARE_S = 20.0
"""A round must be over so long before the time is."""


class Plan(NamedTuple):
    """What is asked for.

    Attributes:
        scenarios: names, in this order.
        arms: stock first.
        rounds: of each scenario.
        first_round: their numbers begin here; a number is a seed.
        seconds: for how long requests come, in each scenario; None: as the scenario says.
        traces: recorded arrivals, by scenario.
        budget_s: no round begins that would not end in so many seconds, by the last one's length.
    """

    scenarios: list[str]
    arms: list[str]
    rounds: int
    first_round: int
    sizes: Sizes
    seconds: float | None
    traces: dict[str, Path]
    side_by_side: bool
    budget_s: float
    folder: Path


def load_of(plan: Plan, scenario: Scenario, number: int) -> Load:
    """What all arms play in that round: of a recorded trace, a window after that of the round before."""
    seconds = plan.seconds or scenario.seconds
    if scenario.name in plan.traces:
        length_s = scenario.speed * seconds
        trace = read_trace(plan.traces[scenario.name], until_s=number * length_s)
        begin_s = (number - 1) * length_s
        window = [a._replace(time_s=a.time_s - begin_s) for a in trace.arrivals if a.time_s >= begin_s]
        arrivals, block_tokens = faster(window, scenario.speed, seconds), trace.block_tokens
    else:
        arrivals, block_tokens = scenario.make(seconds, number), BLOCK_TOKENS
    return Load(thinned(arrivals, plan.sizes.ranks, number), block_tokens, f"{scenario.name} {number}")


class Rounds:
    """A measurement under way.

    Args:
        plan: of it.
        give: gets each run's figures. Several threads may call it, and `tell`.
        tell: gets lines for a terminal.
    """

    def __init__(self, plan: Plan, give: Callable[[dict[str, Any]], None], tell: Callable[[str], None]) -> None:
        self._plan = plan
        self._give = give
        self._tell = tell
        self._began = time.monotonic()
        self._running: list[Lane] = []

    def stop(self) -> None:
        """Ends all servers, whatever they are doing: plays under way then fail."""
        with ThreadPoolExecutor(max(1, len(self._running))) as pool:
            list(pool.map(Lane.close, self._running))

    def run(self) -> None:
        """Runs the plan."""
        plan = self._plan
        if not plan.side_by_side:
            for deployment, names in _grouped(plan.scenarios, lambda d: d).items():
                with self._lanes([deployment]) as lanes:
                    self._play(names, lanes, [])
            return
        arms = len(plan.arms)
        tracks = list(_grouped(plan.scenarios, lambda d: DEPLOYMENTS[d].model).values())
        cores = sorted(os.sched_getaffinity(0))
        size = len(cores) // (len(tracks) * arms)
        if not size:
            raise ValueError(f"{len(tracks) * arms} servers side by side need as many cores")
        blocks = [cores[i * size : (i + 1) * size] for i in range(len(tracks) * arms)]
        deployments = dict.fromkeys(SCENARIOS[name].deployment for name in plan.scenarios)
        with self._lanes(list(deployments)) as lanes, ThreadPoolExecutor(len(tracks)) as pool:
            playing = [
                pool.submit(self._play, names, lanes, blocks[k * arms : (k + 1) * arms])
                for k, names in enumerate(tracks)
            ]
            try:
                for each in playing:
                    each.result()
            except BaseException:
                self.stop()  # else the pool would wait for plays under way
                raise

    @contextmanager
    def _lanes(self, deployments: list[str]) -> Iterator[dict[str, list[Lane]]]:
        """The servers of some deployments, answering. All end at the same time."""
        plan = self._plan
        with ExitStack() as stack:
            ending = stack.enter_context(ThreadPoolExecutor(len(deployments) * len(plan.arms)))
            lanes: dict[str, list[Lane]] = {}
            for deployment in deployments:
                for arm in plan.arms:
                    lane = Lane(plan.folder / f"{deployment}-{arm}", arm, DEPLOYMENTS[deployment], plan.sizes)
                    stack.callback(ending.submit, lane.close)
                    self._running.append(lane)
                    lanes.setdefault(deployment, []).append(lane)
            for each in lanes.values():
                for lane in each:
                    lane.server.wait_ready()
            self._tell(f"{', '.join(deployments)}: {len(plan.arms)} servers each, answering")
            yield lanes

    def _play(self, names: list[str], lanes: dict[str, list[Lane]], blocks: list[list[int]]) -> None:
        """All rounds of some scenarios. `blocks`: the cores of each lane; none: arms play in turn."""
        plan = self._plan
        for deployment in _grouped(names, lambda d: d):
            _each(lanes[deployment], blocks, 0, Load(WARM_UP[: 50 * plan.sizes.ranks], 0, "warm-up"))
        time.sleep(SETTLE_S)
        lasted: dict[str, float] = {}
        for number in range(plan.first_round, plan.first_round + plan.rounds):
            for name in names:
                at = time.monotonic()
                if at - self._began + lasted.get(name, 0.0) + SPARE_S > plan.budget_s:
                    self._tell(f"{name} round {number}: left out, too little time is left")
                    continue
                load = load_of(plan, SCENARIOS[name], number)
                source = plan.traces[name].name if name in plan.traces else "made"
                for figures in _each(lanes[SCENARIOS[name].deployment], blocks, number, load):
                    self._give({"scenario": name, "round": number, "source": source, **figures})
                lasted[name] = time.monotonic() - at
                self._tell(f"{name} round {number}: took {lasted[name]:.0f} s")


def _grouped(names: list[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    """Scenarios by something of their deployment, in order."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(key(SCENARIOS[name].deployment), []).append(name)
    return groups


def _each(lanes: list[Lane], blocks: list[list[int]], number: int, load: Load) -> list[dict[str, Any]]:
    """Each lane plays it: all at the same time on the cores that are theirs this round, or in turn."""
    turned = [lanes[(k + number) % len(lanes)] for k in range(len(lanes))]
    if not blocks:
        return [lane.play(load) for lane in turned]

    def there(lane: Lane, cores: list[int]) -> dict[str, Any]:
        lane.move(cores)
        return lane.play(load)

    with ThreadPoolExecutor(len(lanes)) as pool:
        return list(pool.map(there, turned, blocks))
