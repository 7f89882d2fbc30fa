"""``python -m bench gpu``: measures reporting, freshness and waking with lockstep ranks that compute.

The ranks are real (`dpshm.sim.torch.engine`). Each has a GPU of its own if there are enough; else several share
one, or all run on the CPU. The coordinator is a process, and this process is the front-end. In this order, on one
set of ranks:

- *steps*: under a steady load the ranks alternate between no reports, the board and the broadcast's reports
  (`bench.gpu_rank`). Of each way: the time of a turn of the engine's loop, of pure decode steps alone; and, over
  the rounds of alternation, what a way adds to the median turn without reports of the same round.
- *publish*: the time of each `publish()` call in these busy engines.
- *freshness*: meanwhile a reader reads the board as fast as it can. The time runs from the call of `publish()`
  until the reader sees that report, or a newer one of the same rank; and from its last store.
- *wake*: requests at random times, most of them to paused ranks. Every request must be answered, and every wave
  end. For those to paused ranks, from just before `route()`: until the engine has the request (*arrive*), until it
  enters its step (*enter*), until the last of the others, woken by START, enters it too (*others*: what waking
  adds), until all know that (*exchange*), until the first token is there (*compute*), until the reply (*reply*).
- *fault*: under load one rank is killed during a step; the time of each reaction; new ranks on the same board.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
import zmq

from bench.distribution import quantiles
from bench.processes import Worker
from dpshm import CoordinatorProcess, Frontend, NoEngineAvailable, Route
from dpshm.rules.waves import Phase
from dpshm.sim.demo.messages import (
    EngineSettings,
    ReplyMessage,
    RequestMessage,
    engine_address,
    frontend_address,
    new_prefix,
)

try:
    from bench.gpu_rank import BLOCK, WAYS, run_rank, watch
except ModuleNotFoundError as e:
    sys.exit(f"python -m bench gpu needs PyTorch ({e}): pip install 'dpshm[torch]'")

STEP_LIMIT_S = 20.0
"""A rank whose step lasts longer prints its stacks and ends."""
TIMEOUT_S = 60.0
LOAD_PER_RANK = 16
LOAD_PROMPT_TOKENS = 256
SPARE_OUTPUT_TOKENS = 64
SETTLE_STEPS = 2
"""Steps at the start of a block that the comparison leaves out."""
RESAMPLES = 2000
WAKE_PROMPT_TOKENS = 32
SPLIT = ("arrive", "enter", "others", "exchange", "compute", "reply", "wake", "all")
"""Parts of the time to first token of a request that wakes the ranks; the first six are consecutive."""


class Stuck(Exception):
    """A condition did not hold in time."""


class Driver:
    """The front-end: sends requests to ranks of its choice and receives the replies.

    Attributes:
        out: the routes of outstanding requests, by request.
        replied_ns: the time when the reply with the first token came, by request.
    """

    def __init__(self, group: str, dp_size: int) -> None:
        self.frontend = Frontend.attach(group, owner="bench")
        self.dp_size = dp_size
        self.out: dict[int, Route] = {}
        self.replied_ns: dict[int, int] = {}
        self._next_id = 0
        self._context: zmq.Context[Any] = zmq.Context()
        self._replies = self._context.socket(zmq.PULL)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decoder = msgspec.msgpack.Decoder(ReplyMessage)

    def connect(self, prefix: str) -> None:
        """Connects to a set of ranks; gives up the outstanding requests at the previous set."""
        for route in self.out.values():
            route.done()
        self.out.clear()
        self._replies.bind(frontend_address(prefix, 0))
        self._requests = [self._context.socket(zmq.PUSH) for _ in range(self.dp_size)]
        for rank, socket in enumerate(self._requests):
            socket.connect(engine_address(prefix, rank))

    def send(self, rank: int, prompt_tokens: int, output_tokens: int) -> int:
        """Sends a request; returns its number."""
        number = self._next_id
        self._next_id += 1
        route = self.out[number] = self.frontend.route(prompt_tokens, dp_rank=rank)
        message = RequestMessage.of(number, self.frontend.index, route, output_tokens)
        self._requests[rank].send(self._encode(message))
        return number

    def receive_replies(self, timeout_ms: int = 0) -> None:
        """Receives replies; waits up to `timeout_ms` for the first."""
        while self._replies.poll(timeout_ms):
            reply = self._decoder.decode(self._replies.recv())
            now = time.monotonic_ns()
            for number in reply.first:
                self.replied_ns[number] = now
            for number in (*reply.completed, *reply.refused):
                if number in self.out:
                    self.out.pop(number).done()
            timeout_ms = 0

    def wait(self, condition: Callable[[], object], what: str, patience_s: float = TIMEOUT_S) -> None:
        """Receives replies until the condition holds.

        Raises:
            Stuck: it did not hold in time.
        """
        deadline = time.monotonic() + patience_s
        while not condition():
            self.receive_replies(1)
            if time.monotonic() > deadline:
                raise Stuck(f"{what}: not within {patience_s:g} s; the board:\n{self.frontend.snapshot()}")

    def paused(self) -> bool:
        """Whether the coordinator says that the group is paused, and no rank runs."""
        board = self.frontend.board
        return board.phase is Phase.PAUSED and not any(
            word & 1 for word in board.engine_state[: self.dp_size].tolist()
        )

    def close(self) -> None:
        """Leaves."""
        self._context.destroy(linger=0)
        self.frontend.close()


def start_ranks(stack: ExitStack, group: str, dp_size: int, steps: int) -> tuple[list[Worker], str, list[Any]]:
    """Starts all ranks; returns them, the prefix of their sockets, and each rank's device."""
    store = str(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-gpu-"))) / "store")
    prefix = new_prefix()
    ranks = [
        stack.enter_context(
            Worker(
                run_rank,
                EngineSettings(os.getpid(), group, prefix, "board", rank, dp_size, 1, -1, STEP_LIMIT_S),
                store,
                steps,
            )
        )
        for rank in range(dp_size)
    ]
    places = [rank.result() for rank in ranks]
    for rank in ranks:
        rank.wait_ready()
    for rank in ranks:
        rank.tell()
    return ranks, prefix, places


def notes_of(ranks: Sequence[Worker]) -> list[dict[str, Any]]:
    """The ranks' notes since the last call."""
    for rank in ranks:
        rank.tell("notes")
    return [rank.result() for rank in ranks]


def measure_steps(driver: Driver, ranks: Sequence[Worker], reader: Worker, steps: int) -> dict[str, Any]:
    """Measures steps, publish and freshness, under a load that outlasts the steps."""
    notes_of(ranks)
    reader.tell()
    for _ in range(LOAD_PER_RANK):
        for rank in range(driver.dp_size):
            driver.send(rank, LOAD_PROMPT_TOKENS, steps + SPARE_OUTPUT_TOKENS)
    began = time.monotonic()
    driver.wait(lambda: not driver.out, "the end of the steady load", patience_s=TIMEOUT_S + steps * 0.5)
    took_s = time.monotonic() - began
    driver.wait(driver.paused, "the pause after the load")
    reader.tell()
    seen = reader.result()
    notes = notes_of(ranks)
    result: dict[str, Any] = {"requests_per_rank": LOAD_PER_RANK, "seconds": took_s, "turn_ms": {}}
    steps_of_all = np.concatenate([n["steps"] for n in notes])
    full_decode = (steps_of_all[:, 4] == 0) & (steps_of_all[:, 3] == LOAD_PER_RANK)
    alternating = np.concatenate([np.arange(len(n["steps"])) < steps for n in notes])
    for way, name in enumerate(WAYS):
        of_way = full_decode & alternating & (steps_of_all[:, 0] == way)
        result["turn_ms"][name] = quantiles((steps_of_all[of_way, 2] - steps_of_all[of_way, 1]) / 1e6)
    result["adds_ms"] = {
        name: added([n["steps"][:steps] for n in notes], way) for way, name in enumerate(WAYS) if way
    }
    begun, ended = steps_of_all[full_decode, 1].min(), steps_of_all[full_decode, 2].max()
    publishes = [n["publishes"] for n in notes]
    publishes = [p[(p[:, 0] > begun) & (p[:, 1] < ended)] for p in publishes]  # under load alone
    result["publish_us"] = quantiles(np.concatenate([p[:, 1] - p[:, 0] for p in publishes]) / 1e3)
    result["pub_queue_us"] = quantiles(np.concatenate([n["puts"] for n in notes]) / 1e3)
    result["pub_send_us"] = quantiles(np.concatenate([n["sends"] for n in notes]) / 1e3)
    ages = []
    for rank, p in enumerate(publishes):
        _, beats, seen_ns = seen[seen[:, 0] == rank].T  # beats grow; the load outlasts the last of `p`
        ages.append(seen_ns[np.searchsorted(beats, p[:, 2])][:, None] - p[:, [0, 2]])
    called, stored = np.concatenate(ages).T / 1e3
    result["freshness_us"] = quantiles(called)
    result["freshness_since_stored_us"] = quantiles(stored)
    return result


def added(steps_of_ranks: Sequence[Any], way: int) -> dict[str, float]:
    """Milliseconds that a way adds to the median turn without reports, over the rounds of the alternation.

    Returns:
        The median over the rounds of all ranks, and a 95 % interval of it from resampled rounds.
    """
    differences = []
    for steps in steps_of_ranks:
        for start in range(0, len(steps) - BLOCK * len(WAYS) + 1, BLOCK * len(WAYS)):
            turns: dict[int, Any] = {}
            for block in range(start, start + BLOCK * len(WAYS), BLOCK):
                settled = steps[block + SETTLE_STEPS : block + BLOCK]
                settled = settled[(settled[:, 4] == 0) & (settled[:, 3] == LOAD_PER_RANK)]
                if len(settled) == BLOCK - SETTLE_STEPS:
                    turns[int(settled[0, 0])] = np.median(settled[:, 2] - settled[:, 1]) / 1e6
            if len(turns) == len(WAYS):
                differences.append(turns[way] - turns[0])
    if not differences:
        raise Stuck("no round of alternation was under load from start to end: more --steps are needed")
    sample = np.array(differences)
    picks = np.random.default_rng(0).integers(len(sample), size=(RESAMPLES, len(sample)))
    low, high = np.quantile(np.median(sample[picks], axis=1), (0.025, 0.975))
    return {"median": float(np.median(sample)), "low": float(low), "high": float(high), "rounds": len(sample)}


def measure_wakes(
    driver: Driver, ranks: Sequence[Worker], cycles: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Wakes the ranks until `cycles` waves are over."""
    board, random = driver.frontend.board, Random(2)
    notes_of(ranks)
    first_wave, asleep, sent_ns = board.wave, {}, {}
    requests = 0
    typical_cycle_s = 0.1
    while board.wave - first_wave < cycles:
        began = time.monotonic()
        if random.random() < 0.7:
            driver.wait(driver.paused, "a pause")
            wait_s = random.random() * 0.02
        else:
            wait_s = random.random() * 1.3 * typical_cycle_s  # into running, pausing and paused ranks alike
        time.sleep(wait_s)
        was_asleep = driver.paused()
        both = random.random() < 0.2
        order = random.sample(range(driver.dp_size), 2 if both and driver.dp_size > 1 else 1)
        for rank in order:
            now = time.monotonic_ns()
            number = driver.send(rank, WAKE_PROMPT_TOKENS, random.choice((1, 1, 1, 3)))
            sent_ns[number] = now
            requests += 1
            if was_asleep and len(order) == 1:
                asleep[number] = (rank, driver.out[number].wave)
            time.sleep(random.random() * 0.003 if len(order) > 1 else 0)
        driver.wait(lambda: not driver.out, "a reply")
        typical_cycle_s = 0.9 * typical_cycle_s + 0.1 * min(2.0, time.monotonic() - began)
        if requests % 50 == 0:
            tell(f"waking: {board.wave - first_wave} of {cycles} waves")
    driver.wait(driver.paused, "the last pause")
    notes = notes_of(ranks)
    first = {int(n): times for note in notes for n, *times in note["first"]}
    entered = [{int(wave): int(at) for wave, _, at in note["woken"]} for note in notes]
    split: dict[str, list[float]] = {name: [] for name in SPLIT}
    start_came_first = 0
    for number, (rank, wave) in asleep.items():
        sent, (taken, agreed, computed), replied = sent_ns[number], first[number], driver.replied_ns[number]
        own, last = entered[rank][wave], max(e[wave] for e in entered)
        if own < taken:  # its engine heard START before the request, which waited for the end of an empty step
            start_came_first += 1
            own = last = agreed
        times = (sent, taken, own, last, agreed, computed, replied)
        for name, begin, end in zip(SPLIT, times, times[1:], strict=False):
            split[name].append((end - begin) / 1e6)
        split["wake"].append((agreed - sent) / 1e6)
        split["all"].append((replied - sent) / 1e6)
    return {
        "waves": board.wave - first_wave,
        "requests": requests,
        "of_them_to_sleeping_ranks_alone": len(asleep),
        "start_came_first": start_came_first,
        "hangs": 0,  # else `Stuck` was raised, or a rank's watchdog ended it
        "to_first_token_ms": {name: quantiles(values) for name, values in split.items()},
    }


def measure_fault(driver: Driver, ranks: Sequence[Worker], restart: Callable[[], str]) -> dict[str, Any]:
    """Kills the last rank during a step, then restarts all ranks."""
    board, victim = driver.frontend.board, driver.dp_size - 1
    for _ in range(4):
        for rank in range(driver.dp_size):
            driver.send(rank, LOAD_PROMPT_TOKENS, 2000)
    words, at_steps = board.words, board.index("steps", victim)
    steps = words[at_steps]
    driver.wait(lambda: words[at_steps] > steps + 20, "some steps under load")
    while not board.step_start[victim]:
        pass
    os.kill(ranks[victim].pid, signal.SIGKILL)
    killed = time.monotonic()
    result: dict[str, Any] = {}
    while "route_raises_ms" not in result:
        elapsed_ms = (time.monotonic() - killed) * 1e3
        verdicts = board.snapshot()["verdict"].tolist()
        if verdicts[victim] == "dead":
            result.setdefault("killed_rank_dead_ms", elapsed_ms)
        try:
            route = driver.frontend.route(1)
            if route.dp_rank == victim:
                result["last_chosen_ms"] = elapsed_ms
            route.cancel()
        except NoEngineAvailable as e:
            result["route_raises_ms"] = elapsed_ms
            result["route_says"] = str(e)
        if elapsed_ms > TIMEOUT_S * 1e3:
            raise Stuck(f"route() goes on; the board:\n{board.snapshot()}")
        time.sleep(0.0005)
    result["all_dead"] = board.snapshot()["verdict"].tolist() == ["dead"] * driver.dp_size
    survivors = [r for i, r in enumerate(ranks) if i != victim]
    result["survivors_exit_status"] = [survivor.exit_status() for survivor in survivors]
    began = time.monotonic()
    prefix = restart()
    result["restart_s"] = time.monotonic() - began
    driver.connect(prefix)
    driver.wait(driver.paused, "the new ranks to be idle")
    for rank in range(driver.dp_size):
        driver.send(rank, LOAD_PROMPT_TOKENS, 20)
    driver.wait(lambda: not driver.out, "replies of the new ranks")
    driver.wait(driver.paused, "a pause of the new ranks")
    result["answered_after_restart"] = driver.dp_size
    return result


def run(dp_size: int, steps: int, cycles: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Runs all measurements."""
    group = f"bench-gpu-{os.getpid()}"
    with ExitStack() as stack:
        coordinator = CoordinatorProcess(group=group, dp_size=dp_size)
        stack.callback(coordinator.close)
        tell("starting the ranks")
        ranks, prefix, places = start_ranks(stack, group, dp_size, steps)
        reader = stack.enter_context(Worker(watch, group, dp_size))
        reader.wait_ready()
        driver = Driver(group, dp_size)
        stack.callback(driver.close)
        driver.connect(prefix)
        driver.wait(driver.paused, "the ranks to be idle")
        result: dict[str, Any] = {"ranks": places, "cores": os.cpu_count()}
        tell(f"{steps} steps under a steady load, alternating")
        result["steps"] = measure_steps(driver, ranks, reader, steps)
        tell(json.dumps(result["steps"]))
        result["wake"] = measure_wakes(driver, ranks, cycles, tell)
        tell(json.dumps(result["wake"]))
        tell("killing a rank in mid-step")

        def restart() -> str:
            new, new_prefix_, _ = start_ranks(stack, group, dp_size, 0)
            ranks[:] = new
            return new_prefix_

        result["fault"] = measure_fault(driver, tuple(ranks), restart)
        for rank in ranks:
            rank.tell("end")
        for rank in ranks:
            rank.result()
    return result


def show(result: dict[str, Any]) -> str:
    """The figures as tables in Markdown."""
    steps, wake, fault = result["steps"], result["wake"], result["fault"]
    places = ", ".join(f"{p['device']} ({p['place']}, {p['backend']})" for p in result["ranks"])
    lines = [
        f"{len(result['ranks'])} ranks: {places}; torch {result['ranks'][0]['torch']}; {result['cores']} cores.",
        "",
        "| figure | p50 | p99 | p99.9 | of |",
        "|---|---|---|---|---|",
    ]

    def row(name: str, q: dict[str, float], unit: str) -> None:
        figures = " | ".join(f"{q[key]:.3f} {unit}" for key in ("p50", "p99", "p99.9"))
        lines.append(f"| {name} | {figures} | {q['count']:,} |")

    for way, text in zip(WAYS, ("no report", "the board", "the PUB path"), strict=True):
        row(f"turn of a busy engine's loop, {text}", steps["turn_ms"][way], "ms")
    row("`publish()` in it", steps["publish_us"], "us")
    row("queueing a PUB report in it", steps["pub_queue_us"], "us")
    row("encoding and sending it in its thread", steps["pub_send_us"], "us")
    row("freshness, from the call of `publish()`", steps["freshness_us"], "us")
    row("freshness, from its last store", steps["freshness_since_stored_us"], "us")
    for name, text in (
        ("arrive", "request at paused ranks: until its engine has it"),
        ("enter", "its engine enters the step"),
        ("others", "the last of the other ranks does (what waking adds)"),
        ("exchange", "all know that"),
        ("wake", "these four together"),
        ("compute", "its first token computed"),
        ("reply", "the reply"),
        ("all", "all together"),
    ):
        row(text, wake["to_first_token_ms"][name], "ms")
    for way, text in (("board", "The board"), ("pub", "The PUB path")):
        a = steps["adds_ms"][way]
        lines += [
            "",
            f"{text} adds {a['median']:+.3f} ms to a turn (95 %: {a['low']:+.3f} to {a['high']:+.3f}; "
            f"{a['rounds']} rounds).",
        ]
    lines += [
        "",
        f"{wake['waves']} pause/wake cycles, {wake['requests']} requests at random times, {wake['hangs']} hangs. "
        f"Of {wake['of_them_to_sleeping_ranks_alone']} requests that woke the ranks, {wake['start_came_first']} "
        "came to their engine after START and waited for the end of a step without them.",
        "",
        f"A rank killed in mid-step: called dead after {fault['killed_rank_dead_ms']:.1f} ms; `route()` raises "
        f"after {fault['route_raises_ms']:.1f} ms: {fault['route_says']!r}. The survivors ended with exit status "
        f"{fault['survivors_exit_status']}. New ranks on the same board took {fault['restart_s']:.1f} s to start "
        f"and answered {fault['answered_after_restart']} requests.",
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Runs what the command line says; gives the exit status."""
    parser = argparse.ArgumentParser(
        "python -m bench gpu", description="Lockstep ranks that compute (extra: torch)."
    )
    parser.add_argument("--ranks", type=int, default=2, help="how many; one a GPU if there are as many")
    parser.add_argument("--steps", type=int, default=6000, help="steps under a steady load")
    parser.add_argument("--cycles", type=int, default=520, help="pause/wake cycles")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result there too")
    options = parser.parse_args(argv)
    began = time.monotonic()

    def tell(text: str) -> None:
        sys.stderr.write(f"bench gpu: {time.monotonic() - began:.0f} s: {text}\n")

    try:
        result = run(options.ranks, options.steps, options.cycles, tell)
    except Stuck as e:
        sys.stderr.write(f"bench gpu: stuck: {e}\n")
        return 1
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(show(result))
    return 0
