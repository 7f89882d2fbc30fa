"""Starts the ranks of ``python -m bench gpu``, and asks for their notes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.gpu.rank import run_rank
from bench.processes import Worker
from dpshm.sim.demo.messages import EngineSettings, new_prefix

STEP_LIMIT_S = 20.0
"""A rank whose step lasts longer prints its stacks and ends."""


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
