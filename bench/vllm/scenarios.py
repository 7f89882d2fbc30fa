"""The scenarios of ``python -m bench vllm``: a deployment, the requests that come, what was to be reached.

A made workload is drawn from distributions and has no trace in it; the same seed gives the same requests. A
recorded trace can take the place of any of them. Rates are those of 8 ranks; other numbers of ranks get a share
of them.

*dense*: ranks that step by themselves. A step takes 8 ms + 0.04 ms a prompt token + 0.02 ms a request + 65 ns a
held token: an 8-billion-parameter model on an H100, as `dpshm.sim.step_cost` derives it.

*lockstep*: the same step, and a mixture of experts, so that each step is as long as the longest rank's.

*decode*: lockstep ranks behind a pool that computes the prompts. A prompt token costs what it takes to load its
keys and values, 131,072 bytes at 50 GB/s: 0.0026 ms.
"""

from __future__ import annotations

from collections.abc import Callable
from math import exp, log
from random import Random
from typing import NamedTuple

from dpshm.sim.workloads.agents import BLOCK_TOKENS
from dpshm.sim.workloads.chat import chat_arrivals
from dpshm.sim.workloads.traces import Arrival

RANKS = 8
"""The rates are for so many."""
MAX_CONTEXT = 131_072
CHAT_PER_S = 5.0
"""Of `chat_arrivals` as they are made."""


class Deployment(NamedTuple):
    """How the server of a scenario is started.

    Attributes:
        model: ``dense`` or ``moe``.
        step_ms: of a step: base, per prompt token, per request, per held token.
        arguments: of ``vllm serve``.
    """

    model: str
    step_ms: str
    arguments: tuple[str, ...]


_LIMITS = ("--max-num-batched-tokens", "4096", "--max-num-seqs", "64", "--max-model-len", str(MAX_CONTEXT))
DEPLOYMENTS = {
    "dense": Deployment("dense", "8,0.04,0.02,0.000065", _LIMITS),
    "lockstep": Deployment("moe", "8,0.04,0.02,0.000065", _LIMITS),
    "decode": Deployment("moe", "8,0.0026,0.02,0.000065", _LIMITS),
}


class Scenario(NamedTuple):
    """One of them.

    Attributes:
        name: on the command line.
        deployment: a key of `DEPLOYMENTS`.
        seconds: for how long requests come.
        speed: a recorded trace is played so many times faster.
        make: the requests of so many seconds, from a seed.
        goals: the ratio to stock that was to be reached, by figure.
        text: for the tables.
    """

    name: str
    deployment: str
    seconds: float
    speed: float
    make: Callable[[float, int], list[Arrival]]
    goals: dict[str, float]
    text: str


def faster(arrivals: list[Arrival], speed: float, seconds: float) -> list[Arrival]:
    """The requests of the first seconds, played faster; those that a rank's context cannot hold are left out."""
    return [
        a._replace(time_s=a.time_s / speed)
        for a in arrivals
        if a.time_s < seconds * speed and a.prompt_tokens + a.output_tokens <= MAX_CONTEXT
    ]


def _chat(per_s: float) -> Callable[[float, int], list[Arrival]]:
    def make(seconds: float, seed: int) -> list[Arrival]:
        return faster(chat_arrivals(round(per_s * seconds * 1.5) + 50, seed), per_s / CHAT_PER_S, seconds)

    return make


BURST, BURST_S, BURSTS_PER_S = 48, 0.02, 60.0


def bursts(seconds: float, seed: int) -> list[Arrival]:
    """`BURSTS_PER_S` requests a second; half of them come `BURST` within `BURST_S`, the others one by one."""
    random = Random(seed)
    times: list[float] = []
    time_s = 0.0
    while (time_s := time_s + random.expovariate(BURSTS_PER_S / 2)) < seconds:
        times.append(time_s)
    time_s, gap_s = 0.0, BURST / (BURSTS_PER_S / 2)
    while (time_s := time_s + gap_s * random.uniform(0.5, 1.5)) < seconds:
        times += [time_s + random.uniform(0, BURST_S) for _ in range(BURST)]
    sizes = [(_tokens(random, 500, 1.2, 12_000), _tokens(random, 60, 0.8, 400)) for _ in times]
    return [Arrival(time_s, *size) for time_s, size in zip(sorted(times), sizes, strict=True)]


class Sessions(NamedTuple):
    """Requests that go on: each prompt is the last one, its answer and more. Lengths are log-normal.

    Attributes:
        per_s: requests a second.
        turns: of a session, on average; their number is geometric.
        gap_s: between two turns, on average; exponential, after `least_gap_s`.
        shared_blocks: at the beginning of all prompts, the same for all sessions.
        first, more, output: median and deviation of the logarithm: of a session's first prompt beyond the shared
            blocks, of what each turn adds, of the answers.
    """

    per_s: float
    turns: float
    least_gap_s: float
    gap_s: float
    shared_blocks: int
    first: tuple[int, float]
    more: tuple[int, float]
    output: tuple[int, float]

    def make(self, seconds: float, seed: int) -> list[Arrival]:
        """The requests of so many seconds; sessions that began earlier are under way."""
        random = Random(seed)
        found: list[Arrival] = []
        shared = tuple(range(self.shared_blocks))
        next_id = self.shared_blocks
        began_s = -2 * self.turns * (self.least_gap_s + self.gap_s)
        while (began_s := began_s + random.expovariate(self.per_s / self.turns)) < seconds:
            time_s, blocks = began_s, list(shared)
            tokens = len(shared) * BLOCK_TOKENS + _tokens(random, *self.first, MAX_CONTEXT // 2)
            while time_s < seconds:
                output = _tokens(random, *self.output, 1_500)
                new = range(next_id, next_id + tokens // BLOCK_TOKENS - len(blocks))
                next_id, blocks = new.stop, [*blocks, *new]
                if time_s >= 0.0:
                    found.append(Arrival(time_s, tokens, output, tuple(blocks)))
                if random.random() < 1 / self.turns:
                    break
                tokens += output + _tokens(random, *self.more, MAX_CONTEXT // 4)
                time_s += self.least_gap_s + random.expovariate(1 / self.gap_s)
        return faster(sorted(found, key=lambda a: a.time_s), 1.0, seconds)


AGENTS = Sessions(30.0, 6.0, 1.0, 3.0, 4, (400, 0.8), (350, 1.0), (50, 0.8))
CONVERSATIONS = Sessions(5.6, 3.5, 2.0, 10.0, 0, (5_000, 1.2), (1_500, 1.2), (260, 0.7))
"""Means are about those published of the Mooncake conversation trace (Qin et al., FAST 2025): prompts of 12,000
tokens, answers of 340; the rest is ours."""


DECODE_PER_S, LONG_SHARE = 12.0, 0.2


def long_decodes(seconds: float, seed: int) -> list[Arrival]:
    """Long answers, at very uneven contexts: one request in five has 8,000 to 60,000 tokens of it, others 700."""
    random = Random(seed)
    found: list[Arrival] = []
    time_s = 0.0
    while (time_s := time_s + random.expovariate(DECODE_PER_S)) < seconds:
        long = random.random() < LONG_SHARE
        prompt = random.randint(8_000, 60_000) if long else _tokens(random, 500, 0.8, 6_000)
        found.append(Arrival(time_s, prompt, _tokens(random, 400, 0.5, 1_200)))
    return found


def _tokens(random: Random, median: int, log_deviation: float, most: int) -> int:
    return max(1, min(most, round(exp(random.gauss(log(median), log_deviation)))))


SCENARIOS = {
    s.name: s
    for s in (
        Scenario(
            *("chat", "dense", 28.0, 8.2, _chat(41.0)),
            {"ttft_mean": 0.62, "ttft_p99": 0.50, "per_token": 1.01, "total": 1.00},
            "dense chat, 41 requests/s",
        ),
        Scenario(
            *("bursts", "dense", 20.0, 8.2, bursts),
            {"ttft_mean": 1.02, "ttft_p99": 1.02},
            "dense, half of the requests in bursts of 48 within 20 ms",
        ),
        Scenario(
            *("lockstep-chat", "lockstep", 30.0, 4.2, _chat(21.0)),
            {"ttft_mean": 0.80, "ttft_p99": 0.85, "per_token": 0.90, "total": 0.91},
            "lockstep chat, 21 requests/s",
        ),
        Scenario(
            *("lockstep-decode", "decode", 36.0, 1.0, long_decodes),
            {"ttft_mean": 1.02, "ttft_p99": 1.02, "per_token": 0.87, "total": 0.88},
            "lockstep, long answers at uneven contexts",
        ),
        Scenario(
            *("conversation", "dense", 60.0, 2.0, CONVERSATIONS.make),
            {"ttft_mean": 0.45, "ttft_p99": 0.55, "per_token": 0.80, "total": 0.80},
            "dense, conversations with prefix caching",
        ),
        Scenario(
            *("agents", "dense", 25.0, 6.0, AGENTS.make),
            {"ttft_mean": 0.40, "ttft_p99": 0.45, "per_token": 0.85, "total": 0.80},
            "dense, agents that share a prompt of 2,048 tokens",
        ),
    )
}


def thinned(arrivals: list[Arrival], ranks: int, seed: int) -> list[Arrival]:
    """The share of them that fewer ranks get: each is kept or left out by chance."""
    if ranks >= RANKS:
        return arrivals
    random = Random(seed)
    return [a for a in arrivals if random.random() < ranks / RANKS]
