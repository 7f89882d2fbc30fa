"""A simulated engine as a process, with the test in the place of the front-ends."""

from __future__ import annotations

import os

import msgspec
import pytest
import zmq

from dpshm import Coordinator, Frontend
from dpshm.rules.waves import Phase
from dpshm.sim.demo import lockstep
from dpshm.sim.demo.children import Children
from dpshm.sim.demo.engine import LoneSleeper, SimEngine
from dpshm.sim.demo.messages import (
    EngineReport,
    EngineSettings,
    Ready,
    ReplyMessage,
    RequestMessage,
    engine_address,
    frontend_address,
    new_prefix,
)
from dpshm.sim.step_cost import StepCost

TIMEOUT_MS = 60_000


class Rig:
    """Two engines, a front-end's row, and sockets."""

    def __init__(self, group: str, children: Children) -> None:
        self.prefix = new_prefix()
        self.children = children
        memory = lockstep.create_memory(2)
        for rank in range(2):
            child = children.start(f"engine {rank}", "dpshm.sim.demo.engine", (memory,))
            child.tell(EngineSettings(os.getpid(), group, self.prefix, "board", rank, 2, 1, memory))
        os.close(memory)
        self.answers = []
        while len(self.answers) < 2:
            self.read()
        assert [type(a) for a in self.answers] == [Ready, Ready]
        self.frontend = Frontend.attach(group)
        self.context = zmq.Context()
        self.replies = self.context.socket(zmq.PULL)
        self.replies.bind(frontend_address(self.prefix, 0))
        self.requests = [self.context.socket(zmq.PUSH) for _ in range(2)]
        for rank, socket in enumerate(self.requests):
            socket.connect(engine_address(self.prefix, rank))

    def read(self) -> None:
        self.answers += [answer for _, answer in self.children.read(0.1)]
        assert not any(child.ended for child in self.children.all), [c.obituary() for c in self.children.all]

    def send(self, request_id: int, rank: int, prompt_tokens: int, output_tokens: int):
        route = self.frontend.route(prompt_tokens, dp_rank=rank)
        message = RequestMessage.of(request_id, self.frontend.index, route, output_tokens)
        self.requests[rank].send(msgspec.msgpack.encode(message))
        return route

    def reply(self) -> ReplyMessage:
        assert self.replies.poll(TIMEOUT_MS)
        return msgspec.msgpack.decode(self.replies.recv(), type=ReplyMessage)

    def wait_paused(self, wave: int) -> None:
        """Waits until the ranks rest in a wave, or in a later one: requests that come apart have a wave each."""
        board = self.frontend.board
        while board.wave < wave or board.phase is not Phase.PAUSED:
            self.read()
        while board.snapshot()["state"].tolist() != ["idle", "idle"]:
            self.read()

    def close(self) -> None:
        self.frontend.close()
        self.context.destroy(linger=0)


@pytest.fixture
def rig(pair):
    """Two engines that wait for requests."""
    with Children() as children:
        rig = Rig(pair, children)
        yield rig
        rig.close()


@pytest.mark.slow
def test_requests_wake_all_ranks_and_are_answered_once(rig):
    """Guards against a lost reply, a rank that sleeps while the other steps, and a wave that never ends."""
    rig.wait_paused(0)
    for _ in range(2):
        before = rig.frontend.board.wave
        routes = [rig.send(7, 0, 500, 4), rig.send(8, 0, 30, 1)]
        first, completed = [], []
        while len(completed) < 2:
            reply = rig.reply()
            first += reply.first
            completed += reply.completed
        assert (sorted(first), sorted(completed)) == ([7, 8], [7, 8])
        for route in routes:
            route.done()
        rig.wait_paused(before + 1)
    rows = rig.frontend.snapshot()
    assert rows["requests_finished"].tolist() == [4, 0]
    assert rows["prompt_tokens"].tolist() == [1060, 0]
    assert rows["generation_tokens"].tolist() == [10, 0]
    assert rows["requests"].tolist() == [0, 0]
    # Rank 1 had nothing to do and stepped with rank 0 all the same.
    assert rows["steps"][0] == rows["steps"][1] == rows["dummy_steps"][1]


class Small(LoneSleeper):
    """An accelerator whose KV cache ends within a block."""

    def __init__(self) -> None:
        self.cost = StepCost(0.0, 0.0, 0.0, kv_tokens=1000)


class UntilEmpty:
    """Ends an engine once it has nothing to do; notes the blocks that it had in use."""

    def __init__(self) -> None:
        self.engine: SimEngine | None = None
        self.blocks_in_use: list[int] = []

    def register(self, poller: zmq.Poller) -> None:
        """Nothing else ends it."""

    def ended(self) -> bool:
        """Whether the engine had a request, and has none."""
        assert self.engine is not None
        self.blocks_in_use.append(int(self.engine.board.snapshot()["blocks_in_use"][0]))
        return self.blocks_in_use[-1] == 0 and any(self.blocks_in_use)


def test_a_kv_cache_that_is_full_to_the_last_token_is_shown(group, using):
    """Guards against an engine that dies of its full cache: 1,000 tokens are three blocks of 400 and not two."""
    using(Coordinator(group=group, dp_size=1, waves=False))
    prefix, end = new_prefix(), UntilEmpty()
    settings = EngineSettings(os.getpid(), group, prefix, "board", 0, 1, 1, -1, block_tokens=400)
    end.engine = engine = using(SimEngine(settings, end, Small()))
    frontend = using(Frontend.attach(group))
    assert frontend.board.snapshot()["num_blocks"].tolist() == [3]
    route = frontend.route(990)
    with zmq.Context() as context, context.socket(zmq.PUSH) as requests:
        requests.connect(engine_address(prefix, 0))
        message = RequestMessage.of(1, frontend.index, route, 10, blocks=(1, 2, 3))
        requests.send(msgspec.msgpack.encode(message))
        engine.run()
    route.done()
    assert max(end.blocks_in_use) == 3


@pytest.mark.slow
def test_impossible_request_is_refused_and_garbage_does_no_harm(rig):
    """Guards against an engine that dies of a message, or lets a request that cannot fit wait for ever."""
    rig.requests[1].send(b"\xc1")
    rig.requests[1].send(msgspec.msgpack.encode(RequestMessage(1, 4000, 0, 1, 1, 1, (), 0)))
    rig.requests[1].send(msgspec.msgpack.encode(RequestMessage(2, rig.frontend.index, 0, 0, 0, 1, (), 77)))
    route = rig.send(3, 1, 400_000, 1)
    assert rig.reply().refused == [3]
    route.done()
    rig.wait_paused(1)
    assert rig.frontend.snapshot()["requests"].tolist() == [0, 0]
    rig.answers.clear()
    for child in rig.children.all:
        child.terminate()
    while len(rig.answers) < 2:
        rig.answers += [answer for _, answer in rig.children.read(0.1)]
    assert sorted(a.malformed for a in rig.answers if isinstance(a, EngineReport)) == [0, 2]
