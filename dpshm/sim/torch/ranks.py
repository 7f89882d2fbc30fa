"""The ranks of a deployment as a process group of ``torch.distributed``, which makes them step together.

Each rank has a GPU of its own if there are enough, and the experts' collectives run on NCCL. With fewer GPUs
several ranks share one. NCCL refuses two ranks on a device, so the collectives then run on gloo, which stages them
through pinned host memory and sockets. Without a GPU all collectives run on gloo on the CPU. The agreement that
begins each step is a few numbers on the CPU, always through gloo.

The ranks find each other through a store, which is one file. A caller that passes a descriptor of an unlinked file
(``/proc/self/fd/N`` of an inherited memfd) leaves no file behind, however its processes end.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dpshm.errors import DpshmError
from dpshm.sim.demo.lockstep import AGREEMENT_INTERVAL

START_TIMEOUT = timedelta(minutes=5)


class LockstepBroken(DpshmError):
    """A collective failed: another rank has gone, and this one can never finish its step."""


class Agreed(NamedTuple):
    """The values that all ranks share when they enter a step.

    Attributes:
        most_tokens: the most tokens that any rank computes in the step.
        all_idle: whether no rank has work; true only in every `AGREEMENT_INTERVAL`-th step.
    """

    most_tokens: int
    all_idle: bool


class Ranks:
    """This rank's part in the group. Its collectives are called by all ranks in the same order.

    Args:
        store: path of an empty file, the same for all ranks, new for each group.
        rank: its number, from 0.
        size: the number of ranks.

    Attributes:
        device: the device on which this rank computes.
        backend: the backend of the experts' collectives.
    """

    def __init__(self, store: str, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        gpus = torch.cuda.device_count()
        self.device = torch.device("cuda", rank % gpus) if gpus else torch.device("cpu")
        self.backend = "nccl" if size <= gpus else "gloo"
        if gpus:
            torch.cuda.set_device(self.device)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are of this node
        self._steps = 0
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if self.backend == "nccl" else "gloo",
            store=dist.FileStore(store, size),
            rank=rank,
            world_size=size,
            timeout=START_TIMEOUT,
        )

    def agree(self, num_tokens: int, has_work: bool) -> Agreed:
        """Begins a step: waits until every rank has begun it, and exchanges their work.

        Raises:
            LockstepBroken: another rank has gone.
        """
        self._steps += 1
        words = torch.tensor((num_tokens, has_work), dtype=torch.int64)
        try:
            dist.all_reduce(words, dist.ReduceOp.MAX)
        except RuntimeError as e:
            raise self._broken(e) from e
        most_tokens, any_work = words.tolist()
        return Agreed(most_tokens, not any_work and self._steps % AGREEMENT_INTERVAL == 0)

    def gather(self, mine: Tensor) -> Tensor:
        """All ranks' tensors in the order of the ranks, one after the other along the first axis."""
        if self.size == 1:
            return mine
        every = torch.empty((self.size * len(mine), *mine.shape[1:]), dtype=mine.dtype, device=mine.device)
        try:
            dist.all_gather(list(every.chunk(self.size)), mine.contiguous())
        except RuntimeError as e:
            raise self._broken(e) from e
        return every

    def add_up(self, mine: Tensor) -> None:
        """Adds all ranks' tensors up, in place."""
        if self.size == 1:
            return
        try:
            dist.all_reduce(mine)
        except RuntimeError as e:
            raise self._broken(e) from e

    def _broken(self, error: RuntimeError) -> LockstepBroken:
        return LockstepBroken(
            f"rank {self.rank} cannot finish its step, a collective failed: {str(error).splitlines()[0]}. Another "
            "rank has gone; restart all ranks of the group"
        )

    def close(self) -> None:
        """Leaves the group."""
        dist.destroy_process_group()
