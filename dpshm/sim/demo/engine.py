"""A simulated engine: one process, one rank, whose scheduler is `Batcher` and whose accelerator is ``sleep``.

Everything around the model is real: requests and replies cross ZMQ, load goes to the board (and to the
broadcaster with ``--stats pub``), waves come from the coordinator, and the ranks step together. The loop is
that of vLLM's ``DPEngineCoreProc``: receive requests, publish, step with the others, publish, and reply. When all
ranks agree that no rank has work, the wave is complete and the engine sleeps until a request or
a START wakes it. Requests that arrive during a step wait in their socket, in flight, as they do in vLLM.

Replies carry a request's first and last token only: each token in between would cost a message that no front-end
here reads. `dpshm.sim.torch.engine` is the same engine with an accelerator that computes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Protocol

import msgspec
import zmq

from dpshm.board.board import Board
from dpshm.engine.handle import Engine
from dpshm.errors import DpshmError
from dpshm.linux.processes import set_title
from dpshm.sim.batching import Batcher, SimRequest, Step
from dpshm.sim.demo.broadcast import RankReport, StatsSender
from dpshm.sim.demo.child import EndSignal, Lifeline, read_line, write_line
from dpshm.sim.demo.lockstep import Lockstep
from dpshm.sim.demo.messages import (
    EngineReport,
    EngineSettings,
    Ready,
    ReplyMessage,
    RequestMessage,
    engine_address,
    frontend_address,
)
from dpshm.sim.demo.prompts import fingerprint_of, identity_of
from dpshm.sim.lab.prefix_cache import PrefixCache
from dpshm.sim.step_cost import StepCost

IDLE_BEAT_MS = 1000
"""Interval at which an idle engine publishes, so that a reader sees that it lives."""


class Accelerator(Protocol):
    """Computes a rank's steps, together with the other ranks.

    Attributes:
        cost: the limits that the scheduler must keep.
    """

    cost: StepCost

    def compute(self, batcher: Batcher, step: Step, interrupted: Callable[[], bool]) -> bool | None:
        """Computes the step that the batcher planned.

        Returns:
            Whether the ranks agreed in this step that none has work. None if the step was interrupted; this rank
            can then take no more steps.
        """

    def close(self) -> None:
        """Leaves the other ranks."""


class Sleeper:
    """The accelerator of the simulation: agrees with the other ranks and sleeps for the duration of a step."""

    def __init__(self, settings: EngineSettings) -> None:
        self.cost = StepCost()
        self._lockstep = Lockstep(settings.lockstep_fd, settings.dp_rank, settings.dp_size)

    def compute(self, batcher: Batcher, step: Step, interrupted: Callable[[], bool]) -> bool | None:
        agreement = self._lockstep.enter(
            has_work=batcher.unfinished > 0, seconds=step.seconds, interrupted=interrupted
        )
        if agreement is None:
            return None
        time.sleep(agreement.seconds)
        return agreement.all_idle

    def close(self) -> None:
        self._lockstep.close()


class LoneSleeper:
    """The accelerator of a dense model: its rank sleeps its own steps, and waits for no other."""

    def __init__(self) -> None:
        self.cost = StepCost()

    def compute(self, batcher: Batcher, step: Step, interrupted: Callable[[], bool]) -> bool:  # noqa: ARG002
        time.sleep(step.seconds)
        return False

    def close(self) -> None:
        return


class SimEngine:
    """One rank: the handle of the core, the scheduler, the accelerator, and the sockets between them."""

    def __init__(self, settings: EngineSettings, lifeline: EndSignal, accelerator: Accelerator) -> None:
        self._rank = settings.dp_rank
        self._lifeline = lifeline
        self._accelerator = accelerator
        self._batcher = Batcher(accelerator.cost)
        self._steps = self._preemptions = 0
        self._malformed = 0
        self._refused: list[tuple[int, int]] = []
        self._arrived: dict[tuple[int, int], float] = {}  # by request, until it is admitted
        self._queue_s: dict[tuple[int, int], float] = {}  # by request, until its first token
        self._blocks: dict[tuple[int, int], tuple[int, ...]] = {}  # by request, until its prompt is computed
        self._prompt_tokens = self._cached_tokens = 0
        self._decoder = msgspec.msgpack.Decoder(RequestMessage)
        self._encoder = msgspec.msgpack.Encoder()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._requests = context.socket(zmq.PULL)
        self._requests.setsockopt(zmq.RCVHWM, 0)
        self._requests.bind(engine_address(settings.prefix, settings.dp_rank))
        self._replies = [context.socket(zmq.PUSH) for _ in range(settings.num_frontends)]
        for index, socket in enumerate(self._replies):
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.setsockopt(zmq.RECONNECT_IVL, 10)
            socket.connect(frontend_address(settings.prefix, index))
        self._sender = StatsSender(context, settings.prefix) if settings.stats == "pub" else None
        self._engine = Engine.attach(settings.group, dp_rank=settings.dp_rank)
        self._waves = self._engine.board.segment.header.waves
        self._cache = self._open_cache(settings) if settings.block_tokens else None
        self._poller = zmq.Poller()
        self._poller.register(self._requests, zmq.POLLIN)
        self._engine.register(self._poller)
        lifeline.register(self._poller)

    @property
    def board(self) -> Board:
        """The group's board."""
        return self._engine.board

    def _open_cache(self, settings: EngineSettings) -> PrefixCache:
        """A prefix cache, shown to front-ends if they are to know it."""
        cache = PrefixCache(settings.block_tokens)
        if settings.prefix_index:
            shown = self._engine.open_cache(
                _blocks_of(self._accelerator.cost.kv_tokens, settings.block_tokens),
                settings.block_tokens,
                identity=identity_of(settings.block_tokens),
            )
            key = self._engine.board.segment.header.prefix_key

            def show(_now_s: float, block: int, held: bool) -> None:
                (shown.insert if held else shown.evict)([fingerprint_of(block, key)])

            cache.changed = show
        return cache

    def run(self) -> None:
        """Serves until the process is told to end."""
        self._publish()
        while not self._lifeline.ended():
            if self._engine.running if self._waves else self._batcher.unfinished:
                self._step()
            else:
                self._poller.poll(IDLE_BEAT_MS)
                self._receive_requests()
                self._publish()

    def _receive_requests(self) -> None:
        """Moves new requests into the queue, and handles the coordinator's messages."""
        self._engine.poll(timeout_ms=0)
        while True:
            try:
                message = self._decoder.decode(self._requests.recv(zmq.NOBLOCK))
            except zmq.Again:
                break
            except msgspec.MsgspecError:
                self._malformed += 1
                continue
            self._accept(message)
        if self._refused:
            self._reply([], [])

    def _accept(self, message: RequestMessage) -> None:
        try:
            self._engine.receive(message.frontend, message.booked_tokens, message.wave)
        except DpshmError:  # from no front-end of this group
            self._malformed += 1
            return
        key = (message.reply_to, message.request_id)
        cached = 0
        if self._cache is not None and message.blocks:
            cached = self._cache.hit_tokens(message.blocks, message.prompt_tokens)
        try:
            self._batcher.add(SimRequest(key, message.prompt_tokens, message.output_tokens, cached))
        except DpshmError:  # can never fit
            self._refused.append(key)
            return
        self._arrived[key] = time.monotonic()
        self._prompt_tokens += message.prompt_tokens
        if self._cache is not None and message.blocks:
            self._blocks[key] = message.blocks
            self._cached_tokens += cached
            if self._engine.cache is not None:
                self._engine.cache.found(cached)

    def _step(self) -> None:
        self._receive_requests()
        batcher = self._batcher
        step = batcher.plan()
        self._note_admitted(step)
        self._publish()
        with self._timed(step):
            all_idle = self._accelerator.compute(batcher, step, self._lifeline.ended)
        if all_idle is None:
            return
        self._steps += 1
        finished = batcher.finish(step)
        if self._cache is not None:
            for request in finished.first_tokens:  # its prompt is computed
                blocks = self._blocks.pop(request.key, ())
                self._cache.insert(blocks, batcher.cost.kv_tokens - batcher.kv_used)
        self._engine.finished(len(finished.completed))
        if batcher.preemptions > self._preemptions:
            self._engine.preempted(batcher.preemptions - self._preemptions)
            self._preemptions = batcher.preemptions
        self._publish()
        if finished.first_tokens or finished.completed:
            self._reply(finished.first_tokens, finished.completed)
        if all_idle:
            self._engine.wave_complete()
            self._publish()

    def _note_admitted(self, step: Step) -> None:
        now_s = time.monotonic()
        for request, _ in self._batcher.work(step).chunks:
            arrived_s = self._arrived.pop(request.key, None)
            if arrived_s is not None:
                self._queue_s[request.key] = now_s - arrived_s

    def _timed(self, step: Step) -> AbstractContextManager[object]:
        return self._engine.step(step.prompt_tokens, step.output_tokens, step.held_tokens)

    def _publish(self) -> None:
        batcher = self._batcher
        self._engine.publish(
            waiting=batcher.waiting,
            running=batcher.running,
            kv_cache_usage=batcher.kv_cache_usage,
            prefill_backlog=batcher.prefill_backlog,
            step=self._steps,
        )
        if self._cache is not None and self._engine.cache is not None:
            self._engine.cache.show(blocks_in_use=_blocks_of(batcher.kv_used, self._cache.block_tokens))
        if self._sender:
            self._sender.send(
                RankReport(
                    self._rank,
                    batcher.waiting,
                    batcher.running,
                    batcher.kv_cache_usage,
                    int(self._engine.board.beat[self._rank]),
                )
            )

    def _reply(self, first: list[SimRequest], completed: list[SimRequest]) -> None:
        """Sends one message to each front-end that has replies in this step."""
        by_frontend: dict[int, ReplyMessage] = {}

        def of(key: tuple[int, int]) -> ReplyMessage:
            return by_frontend.setdefault(key[0], ReplyMessage([], [], [], []))

        for request in first:
            reply = of(request.key)
            reply.first.append(request.key[1])
            reply.queue_s.append(self._queue_s.pop(request.key, 0.0))
        for request in completed:
            of(request.key).completed.append(request.key[1])
        for key in self._refused:
            of(key).refused.append(key[1])
        self._refused.clear()
        for index, message in by_frontend.items():
            if 0 <= index < len(self._replies):
                self._replies[index].send(self._encoder.encode(message))

    def close(self) -> EngineReport:
        """Leaves the group; returns the figures that the board does not hold."""
        self._accelerator.close()
        with suppress(DpshmError):
            self._engine.close()
        for socket in (self._requests, *self._replies):
            socket.close(linger=0)
        return EngineReport(self._batcher.preemptions, self._malformed, self._prompt_tokens, self._cached_tokens)


def _blocks_of(tokens: int, block_tokens: int) -> int:
    """How many blocks hold so many tokens; the last may have room left."""
    return -(-tokens // block_tokens)


def main() -> None:
    """The engine's process."""
    settings = read_line(EngineSettings)
    lifeline = Lifeline(settings.parent_pid)
    set_title(f"dpshm:engine{settings.dp_rank}")
    engine = SimEngine(settings, lifeline, Sleeper(settings) if settings.lockstep_fd >= 0 else LoneSleeper())
    try:
        write_line(Ready())
        engine.run()
    finally:
        write_line(engine.close())
        zmq.Context.instance().destroy(linger=0)
