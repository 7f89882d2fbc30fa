"""An engine that computes: the demo's engine, with a transformer in PyTorch instead of the simulation's sleep.

Each process is one rank. Requests, replies, waves and reports are those of `dpshm.sim.demo.engine`. The model of
`dpshm.sim.torch.model` computes the scheduler's steps. Its experts are spread over the ranks, so a rank that does
not step blocks all others. Each step begins with an all-reduce, and every 32nd of these decides whether any rank
has work.

When a rank dies during a step, the others cannot finish theirs. Their collective fails (gloo) or hangs (NCCL,
where the watchdog notices), and each process ends without leaving the group. So the coordinator marks every rank
dead, `route()` raises, and the operator starts all ranks again, on the same board.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

import torch
import zmq

from dpshm.linux.processes import set_title
from dpshm.sim.batching import Batcher, SimRequest, Step
from dpshm.sim.demo.child import Lifeline, read_line, write_line
from dpshm.sim.demo.engine import SimEngine
from dpshm.sim.demo.messages import EngineSettings, Ready
from dpshm.sim.step_cost import StepCost
from dpshm.sim.torch.batch import TorchBatch
from dpshm.sim.torch.model import SMALL, TINY, ModelShape, MoeTransformer
from dpshm.sim.torch.ranks import LockstepBroken, Ranks
from dpshm.sim.torch.watchdog import EXIT_PEER_GONE, Watchdog

MAX_PROMPT_TOKENS = 512
"""Most prompt tokens of a rank in a step; the experts' collectives carry them and the decoding tokens."""
END_GRACE_S = 0.2
"""After a failed collective: the order to end may have reached the other rank first. The watchdog waits longer."""
WARM_UP_STEPS = 3


class TorchAccelerator:
    """Computes a rank's steps together with the other ranks.

    Attributes:
        cost: the limits that its scheduler must keep.
        agreed_ns: CLOCK_MONOTONIC of the moment at which all ranks had entered the last step.
        tokens: by request that got one in the last step, its new token.
    """

    def __init__(self, ranks: Ranks, shape: ModelShape | None = None) -> None:
        on_gpu = ranks.device.type == "cuda"
        shape = shape or (SMALL if on_gpu else TINY)
        # The accelerator measures its step times; the cost model does not predict them.
        self.cost = StepCost(
            max_running=shape.max_running,
            max_step_tokens=MAX_PROMPT_TOKENS,
            kv_tokens=shape.kv_tokens,
            max_context=shape.max_context,
        )
        self.agreed_ns = 0
        self.tokens: list[tuple[SimRequest, int]] = []
        self._ranks = ranks
        self._watchdog: Watchdog | None = None
        self._batch = TorchBatch(
            MoeTransformer(shape, ranks, ranks.device, torch.bfloat16 if on_gpu else torch.float32)
        )

    def warm_up(self) -> None:
        """Computes a few requests, so that libraries load and memory is taken before the first real one."""
        batcher = Batcher(self.cost)
        for number in range(WARM_UP_STEPS):
            batcher.add(SimRequest((0, number), MAX_PROMPT_TOKENS // 2, WARM_UP_STEPS))
        while batcher.unfinished:
            step = batcher.plan()
            self.compute(batcher, step, interrupted=lambda: False)
            batcher.finish(step)

    def watch_with(self, watchdog: Watchdog) -> None:
        """Reports steps to that watchdog from now on."""
        self._watchdog = watchdog
        watchdog.start()

    def compute(self, batcher: Batcher, step: Step, interrupted: Callable[[], bool]) -> bool | None:
        """Computes a step with all other ranks.

        Returns:
            Whether the ranks agreed in this step that none has work. None if this process must end.

        Raises:
            LockstepBroken: another rank has gone.
        """
        if self._watchdog:
            self._watchdog.step_began()
        try:
            work = batcher.work(step)
            num_tokens = step.prompt_tokens + len(work.decoding)
            agreed = self._ranks.agree(num_tokens, batcher.unfinished > 0)
            self.agreed_ns = time.monotonic_ns()
            self.tokens = self._batch.compute(batcher, work, agreed.most_tokens)
        except LockstepBroken:
            deadline = time.monotonic() + END_GRACE_S
            while not interrupted():
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
            return None
        finally:
            if self._watchdog:
                self._watchdog.step_ended()
        return agreed.all_idle

    def close(self) -> None:
        """Leaves the other ranks."""
        if self._watchdog:
            self._watchdog.stop()
        self._ranks.close()


def serve(engine: SimEngine, dp_rank: int) -> None:
    """Serves until the engine is told to end; ends this process when another rank has gone."""
    try:
        engine.run()
    except LockstepBroken as e:
        sys.stderr.write(f"engine {dp_rank} ends: {e}\n")
        sys.stderr.flush()
        # The process ends as in a crash: it has not left the group, so its row must read dead.
        os._exit(EXIT_PEER_GONE)


def main() -> None:
    """The engine's process."""
    settings = read_line(EngineSettings)
    lifeline = Lifeline(settings.parent_pid)
    set_title(f"dpshm:engine{settings.dp_rank}")
    ranks = Ranks(f"/proc/self/fd/{settings.lockstep_fd}", settings.dp_rank, settings.dp_size)
    accelerator = TorchAccelerator(ranks)
    accelerator.warm_up()
    engine = SimEngine(settings, lifeline, accelerator)
    accelerator.watch_with(
        Watchdog(engine.board, settings.dp_rank, settings.dp_size, settings.parent_pid, settings.step_limit_s)
    )
    write_line(Ready())
    serve(engine, settings.dp_rank)
    write_line(engine.close())
    zmq.Context.instance().destroy(linger=0)
