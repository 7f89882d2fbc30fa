"""One run of the routing laboratory: a discrete-event simulation of engines and front-ends.

There are three kinds of events, in the order of their times: the end of a rank's step, a tick of the information
model, and the arrival of a request. A request is routed at once, by the same policy code that front-ends run, from
the view that the information model gives its front-end. The result depends only on the arguments.

A front-end takes its time to read a request (`RequestTime`), and decides then. So of requests that come together
the short ones are sent, and computed, first. The simulation leaves out the time of a message and of a decision
(tens of microseconds, beside steps of milliseconds), and everything that the cost model of `dpshm.sim.batching`
leaves out.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from dpshm.frontend.turns import first_turn
from dpshm.policies import Request
from dpshm.sim.batching import Batcher
from dpshm.sim.demo.lockstep import AGREEMENT_INTERVAL
from dpshm.sim.lab.information import check_information, make_information
from dpshm.sim.lab.oracle import soonest
from dpshm.sim.lab.plant import Plant
from dpshm.sim.lab.rank import Job, Pace, SimRank
from dpshm.sim.lab.rivals import rival_or_policy

ORACLE = "oracle"
_decided_s = itemgetter(0)
RAMP_S = 10.0
"""Closed loop: the clients start one after another over this time, as in a load test."""
_NEVER_S = float("inf")


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run. Lists have one item per request in the order of arrival, without refused requests.

    Attributes:
        ttft_s: seconds from the time when the request was due to its first token.
        e2e_s: seconds from the same time to its last token.
        tpot_s: seconds per output token after the first; only requests with more than one token.
        seconds: time from the first arrival to the last token.
        requests_per_s: rate of arrivals; in a closed loop, of completions. 0 if all came at once.
        output_tokens: output tokens of all requests.
        imbalance: most less fewest requests on a rank, mean over the arrivals.
        prefix_hit_rate: share of prompt tokens that no rank had to compute; None if the workload has no blocks.
        refused: requests that can never fit.
        preemptions: number of times that a request lost its room.
        by_rank: requests that each rank got.
    """

    ttft_s: NDArray[np.float64]
    e2e_s: NDArray[np.float64]
    tpot_s: NDArray[np.float64]
    seconds: float
    requests_per_s: float
    output_tokens: int
    imbalance: float
    prefix_hit_rate: float | None
    refused: int
    preemptions: int
    by_rank: list[int]


def run(plant: Plant, jobs: Sequence[Job], policy: str, information: str) -> Outcome:
    """Plays jobs, which it fills in, through a plant.

    Args:
        plant: engines and front-ends.
        jobs: in the order of arrival; each has its front-end.
        policy: a name that `dpshm.policies.by_name` knows, or `ORACLE`.
        information: a name that `dpshm.sim.lab.information` knows; the oracle ignores it.

    Raises:
        SettingError: no policy or information model has that name.
    """
    return _Run(plant, jobs, policy, information).play()


class _Run:
    def __init__(self, plant: Plant, jobs: Sequence[Job], policy: str, information: str) -> None:
        check_information(information)
        self._plant = plant
        chosen = None if policy == ORACLE else rival_or_policy(policy)
        holds = Batcher(plant.cost)
        self._jobs = [job for job in jobs if holds.fits(job.prompt_tokens, job.output_tokens)]
        self._refused = len(jobs) - len(self._jobs)
        n = plant.engines
        self._ranks = [self._new_rank(e) for e in range(n)]
        self._own = [[0] * n for _ in range(plant.frontends)]
        self._information = make_information(information, self._ranks, self._own)
        self._information.lockstep = plant.lockstep
        self._policies = (
            None if chosen is None else [self._information.suited(chosen, f) for f in range(plant.frontends)]
        )
        self._turns = [first_turn(f, plant.engines) for f in range(plant.frontends)]
        self._chosen = list(range(n))  # the ranks that may be chosen
        self._unfinished = [0] * n
        self._steps: list[tuple[float, int]] = []  # a heap: when a rank's step ends; in lockstep, rank 0 alone
        self._free_s = [0.0] * plant.frontends  # when it has read what has come
        self._lockstep_s = 0.0  # how long the common step takes
        self._round = 0
        self._spread = 0
        self._by_rank = [0] * n
        self._preemptions = 0

    def _new_rank(self, rank: int) -> SimRank:
        plant = self._plant
        spells = [(at_s, at_s + for_s, factor) for r, factor, at_s, for_s in plant.spells if r == rank]
        pace = Pace(plant.noise, spells, rank) if plant.noise or spells else None
        return SimRank(plant.cost_of(rank), plant.frontends, plant.coefficients, plant.block_tokens, pace)

    def play(self) -> Outcome:
        plant, information, steps = self._plant, self._information, self._steps
        waiting = deque(self._jobs)  # not yet due; closed loop: not yet sent
        due: deque[tuple[float, Job]] = deque()  # each with the time of its decision, in that order
        if plant.clients:
            for i in range(min(plant.clients, len(waiting))):
                waiting[0].due_s = RAMP_S * (i + 1) / plant.clients
                insort(due, self._read(waiting.popleft()), key=_decided_s)
        else:
            due = deque(sorted(map(self._read, waiting), key=_decided_s))
            waiting = deque()
        outage = deque(_outage(plant.restart))
        while due or steps:
            due_s = due[0][0] if due else _NEVER_S
            step_s = steps[0][0] if steps else _NEVER_S
            # At equal times a step ends first, then comes a tick, then an arrival, which sees both.
            if step_s <= due_s and step_s <= information.next_tick_s:
                if outage and outage[0][0] <= step_s:
                    self._switch(*outage.popleft())
                    continue
                now_s, rank = heappop(steps)
                for _ in range(self._end_step(rank, now_s)):
                    if waiting:
                        job = waiting.popleft()
                        job.due_s = now_s
                        insort(due, self._read(job), key=_decided_s)  # clients may still be beginning
            elif information.next_tick_s <= due_s:
                information.tick(information.next_tick_s)
            else:
                if outage and outage[0][0] <= due_s:
                    self._switch(*outage.popleft())
                    continue
                self._arrive(*due.popleft())
        return self._outcome()

    def _read(self, job: Job) -> tuple[float, Job]:
        """When the request's front-end, which reads those before it first, decides about it; and the request."""
        any_s, token_s = self._plant.request_time
        begin_s = max(job.due_s, self._free_s[job.frontend])
        decided_s = self._free_s[job.frontend] = begin_s + any_s + token_s * job.prompt_tokens
        return decided_s, job

    def _arrive(self, decided_s: float, job: Job) -> None:
        self._spread += max(self._unfinished) - min(self._unfinished)
        self._dispatch(job, decided_s)

    def _dispatch(self, job: Job, now_s: float) -> None:
        ranks, f = self._chosen, job.frontend
        turn = self._turns[f] = (self._turns[f] + 1) % len(ranks)
        order = ranks[turn:] + ranks[:turn]
        if self._policies is None:
            rank = soonest(self._ranks, order, job, now_s)
        else:
            view = self._information.view(f, order, now_s)
            cached = self._information.cached(job, now_s)
            rank = self._policies[f](view, Request(job.prompt_tokens, job.key, cached))
            job.booked_tokens = job.prompt_tokens - (cached[rank] if cached else 0)
        job.rank = rank
        self._own[f][rank] += 1
        self._unfinished[rank] += 1
        self._by_rank[rank] += 1
        self._ranks[rank].send(job)
        self._information.sent(job)
        if self._plant.lockstep:
            if not self._steps:
                self._begin_all(now_s)
        elif self._ranks[rank].busy_until_s < 0:
            self._begin(rank, now_s)

    def _begin(self, rank: int, now_s: float) -> None:
        sim = self._ranks[rank]
        step = sim.begin(now_s)
        sim.busy_until_s = now_s + step.seconds
        heappush(self._steps, (sim.busy_until_s, rank))
        self._information.published(rank, now_s)

    def _begin_all(self, now_s: float) -> None:
        self._round += 1
        self._lockstep_s = max(sim.begin(now_s).seconds for sim in self._ranks)
        for rank, sim in enumerate(self._ranks):
            sim.busy_until_s = now_s + self._lockstep_s
            self._information.published(rank, now_s)
        heappush(self._steps, (now_s + self._lockstep_s, 0))

    def _end_step(self, rank: int, now_s: float) -> int:
        """Ends a step and begins the next if there is work; returns the number of complete requests."""
        if not self._plant.lockstep:
            sim = self._ranks[rank]
            completed = self._end_one(rank, now_s, sim.step.seconds)
            if sim.unfinished:
                self._begin(rank, now_s)
            else:
                sim.publish()
                self._information.published(rank, now_s)
            return completed
        completed = sum(self._end_one(e, now_s, self._lockstep_s) for e in range(len(self._ranks)))
        self._information.step_ended()
        if self._round % AGREEMENT_INTERVAL or any(self._unfinished):
            self._begin_all(now_s)
        else:
            for e, sim in enumerate(self._ranks):
                sim.publish()
                self._information.published(e, now_s)
        return completed

    def _end_one(self, rank: int, now_s: float, seconds: float) -> int:
        sim = self._ranks[rank]
        sim.busy_until_s = -1.0
        completed = sim.end(now_s, seconds)
        for job in completed:
            self._own[job.frontend][rank] -= 1
        self._unfinished[rank] -= len(completed)
        return len(completed)

    def _switch(self, now_s: float, rank: int, away: bool) -> None:
        """Takes a rank away, or brings it back empty. Its requests are sent again, to other ranks."""
        if not away:
            self._chosen = sorted({*self._chosen, rank})
            return
        lost = self._ranks[rank]
        jobs = [job for job in self._jobs if job.rank == rank and job.done_s < 0]
        self._preemptions += lost.batcher.preemptions
        self._ranks[rank] = self._new_rank(rank)  # the list that the information model reads, too
        self._information.published(rank, now_s)
        if not self._plant.lockstep:
            self._steps[:] = [step for step in self._steps if step[1] != rank]
            self._steps.sort()
        elif lost.busy_until_s >= 0:
            self._ranks[rank].begin(now_s)  # it joins the common step, empty
        self._chosen = [e for e in self._chosen if e != rank]
        for job in jobs:
            self._own[job.frontend][rank] -= 1
            self._unfinished[rank] -= 1
            job.first_s = -1.0
            self._dispatch(job, now_s)

    def _outcome(self) -> Outcome:
        jobs = self._jobs
        due = np.array([job.due_s for job in jobs])
        first = np.array([job.first_s for job in jobs])
        done = np.array([job.done_s for job in jobs])
        outputs = np.array([job.output_tokens for job in jobs])
        several = outputs > 1
        prompts = sum(job.prompt_tokens for job in jobs)
        hits = sum(job.hit_tokens for job in jobs)
        span_s = float((done if self._plant.clients else due).max()) if jobs else 0.0
        return Outcome(
            ttft_s=first - due,
            e2e_s=done - due,
            tpot_s=(done - first)[several] / (outputs[several] - 1),
            seconds=float(done.max() - due.min()) if jobs else 0.0,
            requests_per_s=len(jobs) / span_s if span_s > 0 else 0.0,
            output_tokens=int(outputs.sum()),
            imbalance=self._spread / max(1, len(jobs)),
            prefix_hit_rate=hits / prompts if any(job.blocks for job in jobs) else None,
            refused=self._refused,
            preemptions=self._preemptions + sum(sim.batcher.preemptions for sim in self._ranks),
            by_rank=self._by_rank,
        )


def _outage(restart: tuple[int, float, float] | None) -> list[tuple[float, int, bool]]:
    if restart is None:
        return []
    rank, at_s, for_s = restart
    return [(at_s, rank, True), (at_s + for_s, rank, False)]
