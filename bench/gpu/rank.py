"""A rank of ``python -m bench gpu``: the demo's computing engine, with a note of what happened when.

All times are CLOCK_MONOTONIC in nanoseconds. The rank alternates between three ways of reporting its load, in
blocks of `BLOCK` steps. The order of the ways is drawn anew in each round, the same on all ranks:

    none    nothing is stored or sent
    board   dpshm: `publish()` before and after each step, and `step()` around it
    pub     the broadcast design: once a step a report is made and queued; a thread encodes it and sends it to the
            coordinator, as vLLM's engines do (the message is theirs, byte for byte)

After these steps it reports to the board only.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue
from random import Random
from typing import Any

import numpy as np
import torch
import zmq

from bench.processes import Line
from dpshm.board.board import Board
from dpshm.net import wire
from dpshm.sim.batching import SimRequest, Step
from dpshm.sim.demo.engine import SimEngine
from dpshm.sim.demo.messages import EngineSettings, RequestMessage
from dpshm.sim.torch.engine import TorchAccelerator, serve
from dpshm.sim.torch.ranks import Ranks
from dpshm.sim.torch.watchdog import Watchdog
from tests.stock_wire import encode_stats

WAYS = ("none", "board", "pub")
BLOCK = 16
LOOK_S = 0.02
LOOKS_BETWEEN_CHECKS = 2000


class ParentsLine:
    """The rank's line to the measuring process in the place of `dpshm.sim.demo.child.Lifeline`."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._next_look_s = 0.0
        self._ended = False
        self.notes: dict[str, list[Any]] = {}

    def register(self, poller: zmq.Poller) -> None:
        """Makes a poller return when the parent says something."""
        poller.register(self._line.fileno(), zmq.POLLIN)

    def ended(self) -> bool:
        """Whether the rank is to end; hands the notes over when they are asked for."""
        now_s = time.monotonic()
        if not self._ended and now_s >= self._next_look_s:
            self._next_look_s = now_s + LOOK_S
            if self._line.told():
                if self._line.expect() == "notes":
                    self._line.answer({name: np.array(notes) for name, notes in self.notes.items()})
                    for notes in self.notes.values():
                        notes.clear()
                else:
                    self._ended = True
        return self._ended


class PubPath:
    """The broadcast design's report: hands the report to a thread, which encodes and sends it."""

    def __init__(self, address: str, dp_rank: int) -> None:
        self._rank = dp_rank
        self._address = address
        self.sent_ns: list[int] = []  # how long each took
        self._reports: SimpleQueue[wire.SchedulerStats | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def put(self, stats: wire.SchedulerStats) -> None:
        """Queues a report."""
        self._reports.put(stats)

    def _send(self) -> None:
        context: zmq.Context[Any] = zmq.Context()
        socket = context.socket(zmq.PUSH)
        socket.sndhwm = 0  # as vLLM sets it
        socket.connect(self._address)
        while (stats := self._reports.get()) is not None:
            began = time.monotonic_ns()
            socket.send(encode_stats(self._rank, stats, timestamp=time.monotonic()))
            self.sent_ns.append(time.monotonic_ns() - began)
        context.destroy(linger=0)

    def close(self) -> None:
        """Ends the thread."""
        self._reports.put(None)
        self._thread.join()


class MeasuredEngine(SimEngine):
    """Notes its steps, its reports and its first tokens."""

    def __init__(
        self, settings: EngineSettings, line: ParentsLine, accelerator: TorchAccelerator, alternating_steps: int
    ) -> None:
        super().__init__(settings, line, accelerator)
        self._torch = accelerator
        self._pub = PubPath(self._engine.board.segment.header.engine_output_address, self._rank)
        self._ways = _ways(alternating_steps)
        self._way = "board"
        self._at_beat = self._engine.board.index("beat", self._rank)
        self._taken_ns: dict[tuple[int, int], int] = {}
        self._stepped_ns: list[list[int]] = []
        self._published_ns: list[list[int]] = []
        self._put_ns: list[int] = []
        self._first_ns: list[list[int]] = []
        self._woken_ns: list[list[int]] = []
        self._asleep_until_ns = 0
        self._publish_untimed = self._engine.publish
        vars(self._engine)["publish"] = self._publish_timed
        line.notes = {
            "steps": self._stepped_ns,  # way, begun, ended, requests in the batch, prompt tokens
            "publishes": self._published_ns,  # called, returned, the beat that it stored
            "puts": self._put_ns,  # how long
            "sends": self._pub.sent_ns,  # how long, in the thread
            "woken": self._woken_ns,  # wave, awake, enters its first step
            "first": self._first_ns,  # request, taken in, all ranks in the step, computed
        }

    def _accept(self, message: RequestMessage) -> None:
        self._taken_ns[message.reply_to, message.request_id] = time.monotonic_ns()
        super()._accept(message)

    def _receive_requests(self) -> None:
        now, asleep = time.monotonic_ns(), not self._engine.running
        super()._receive_requests()
        if asleep and self._engine.running:
            self._asleep_until_ns = now

    def _step(self) -> None:
        self._way = next(self._ways, "board")
        self._computed = False
        begun = time.monotonic_ns()
        super()._step()
        # From the start of one turn of the loop to its end: taking in, reports, the step, replies.
        ended = time.monotonic_ns()
        self._stepped_ns.append([WAYS.index(self._way), begun, ended, self._batch, self._prompt_tokens])

    def _timed(self, step: Step) -> AbstractContextManager[object]:
        self._batch, self._prompt_tokens, self._computed = step.batch, step.prompt_tokens, True
        if self._asleep_until_ns:
            self._woken_ns.append([self._engine.wave, self._asleep_until_ns, time.monotonic_ns()])
            self._asleep_until_ns = 0
        return super()._timed(step) if self._way == "board" else nullcontext()

    def _publish(self) -> None:
        if self._way == "board":
            super()._publish()
        elif self._way == "pub" and self._computed:
            self._put()

    def _reply(self, first: list[SimRequest], completed: list[SimRequest]) -> None:
        now = time.monotonic_ns()
        for request in first:
            self._first_ns.append([request.key[1], self._taken_ns.pop(request.key), self._torch.agreed_ns, now])
        super()._reply(first, completed)

    def _publish_timed(self, **load: Any) -> None:
        called = time.monotonic_ns()
        self._publish_untimed(**load)
        returned = time.monotonic_ns()
        self._published_ns.append([called, returned, self._engine.board.words[self._at_beat]])

    def _put(self) -> None:
        began = time.monotonic_ns()
        batcher = self._batcher
        self._pub.put(
            wire.SchedulerStats(
                num_running_reqs=batcher.running,
                num_waiting_reqs=batcher.waiting,
                step_counter=self._steps,
                current_wave=self._engine.wave,
                kv_cache_usage=batcher.kv_cache_usage,
            )
        )
        self._put_ns.append(time.monotonic_ns() - began)

    def close(self) -> Any:
        self._pub.close()
        return super().close()


def _ways(steps: int) -> Iterator[str]:
    random = Random(1)
    for _ in range(steps // (BLOCK * len(WAYS))):
        for way in random.sample(WAYS, len(WAYS)):
            yield from [way] * BLOCK


def run_rank(line: Line, settings: EngineSettings, store: str, alternating_steps: int) -> dict[str, str]:
    """Runs one rank until it is told to end."""
    parent_pid = os.getppid()
    ranks = Ranks(store, settings.dp_rank, settings.dp_size)
    accelerator = TorchAccelerator(ranks)
    accelerator.warm_up()
    parents_line = ParentsLine(line)
    engine = MeasuredEngine(settings, parents_line, accelerator, alternating_steps)
    watchdog = Watchdog(engine.board, settings.dp_rank, settings.dp_size, parent_pid, settings.step_limit_s)
    accelerator.watch_with(watchdog)
    on_gpu = ranks.device.type == "cuda"
    line.answer(
        {
            "device": torch.cuda.get_device_name(ranks.device) if on_gpu else "CPU",
            "place": str(ranks.device),
            "backend": ranks.backend,
            "torch": torch.__version__,
        }
    )
    line.ready()
    serve(engine, settings.dp_rank)
    engine.close()
    return {}


def watch(line: Line, group: str, dp_size: int) -> Any:
    """A reader that looks at every rank's beat as fast as it can: (rank, beat, when it was first seen)."""
    seen: list[list[int]] = []
    with Board.attach(group) as board:
        words = board.words
        at = [board.index("beat", rank) for rank in range(dp_size)]
        last = [words[a] for a in at]
        line.ready()
        while not line.told():
            for _ in range(LOOKS_BETWEEN_CHECKS):
                for rank in range(dp_size):
                    beat = words[at[rank]]
                    if beat != last[rank]:
                        seen.append([rank, beat, time.monotonic_ns()])
                        last[rank] = beat
        del words
    return np.array(seen)
