"""Checks of a group's counters: they compare two frames, and the words of both sides of a booking."""

from __future__ import annotations

from collections.abc import Iterator

from dpshm.board.board import Board
from dpshm.ops.doctor.finding import Finding, requests
from dpshm.ops.frame import Frame


def check_counters(board: Board, before: Frame, after: Frame) -> Iterator[Finding]:
    """Finds counters that fell, or contradict each other."""
    for problem in [*_rank_counters(before, after), *_frontend_counters(board, after)]:
        yield Finding(
            severity="warning",
            check="counters",
            group=after.group,
            what=problem,
            why="load is the reported load plus requests in flight: wrong counts mislead routing",
            fix="restart that process; if it comes again, report it with the output of: dpshm stat --json",
        )


def _rank_counters(before: Frame, after: Frame) -> Iterator[str]:
    """Counters of ranks that fell or contradict each other, a line each."""
    earlier = {rank.dp_rank: rank for rank in before.ranks}
    for rank in after.ranks:
        was = earlier.get(rank.dp_rank)
        if rank.state in ("absent", "dead") or rank.stock or was is None or was.incarnation != rank.incarnation:
            continue
        name = f"rank {rank.dp_rank}"
        if rank.dummy_steps > rank.steps:
            yield f"{name} counts {rank.dummy_steps} dummy steps of {rank.steps} steps"
        for field in ("steps", "busy_s", "prompt_tokens", "generation_tokens", "requests_finished"):
            if getattr(rank, field) < getattr(was, field):
                yield f"{name}'s {field} fell from {getattr(was, field)} to {getattr(rank, field)}"
        if rank.busy_s - was.busy_s > 1.5 * (after.monotonic_s - before.monotonic_s) + 5.0:
            yield f"{name} was busy for longer than time went by"
        if before.wave == after.wave < min(rank.wave, was.wave) - 1:
            yield f"{name} is in wave {rank.wave}, and the coordinator in {after.wave}"


def _frontend_counters(board: Board, after: Frame) -> Iterator[str]:
    """Ranks that received more than a front-end sent, a line each."""
    for frontend in after.frontends:
        if frontend.state != "alive":
            continue
        for e in range(after.dp_size):
            over = int(board.received_requests[e, frontend.index]) - int(board.sent_requests[frontend.index, e])
            if over > 0:
                yield f"rank {e} received {requests(over)} more than front-end {frontend.index} sent"
