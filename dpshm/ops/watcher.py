"""Reads frames of a group, and adds the rates over a short window and the latencies of the last minute.

A watcher survives the group's end and restart. When its segment has lost its name and the group has a new segment,
the watcher attaches to the new one.
"""

from __future__ import annotations

from collections import deque

import msgspec
import numpy as np
from numpy.typing import NDArray

from dpshm.board.board import Board
from dpshm.board.latency import read_latencies
from dpshm.ops.frame import Frame, Frontend, Rank
from dpshm.ops.groups import successor
from dpshm.ops.latency import with_latencies
from dpshm.ops.read_frame import read_frame

WINDOW_S = 5.0
LATENCY_WINDOW_S = 60.0
_LATENCY_LOOK_S = 1.0


class Watcher:
    """Watches one group.

    Args:
        board: the group's board, attached read-only; `close` closes it.
        window_s: the longest window of the rates.
        latency_window_s: the longest window of the latencies; None: they count since the group began.
    """

    def __init__(
        self, board: Board, window_s: float = WINDOW_S, latency_window_s: float | None = LATENCY_WINDOW_S
    ) -> None:
        self.board = board
        self._window_s = window_s
        self._latency_window_s = latency_window_s
        self._past: deque[Frame] = deque()
        self._past_latencies: deque[tuple[float, NDArray[np.int64]]] = deque()

    def read(self) -> Frame:
        """Reads a frame. The first has no rates, and its latencies count since the group began."""
        if not self.board.segment.linked:
            self._follow()
        frame = read_frame(self.board)
        past = self._past
        past.append(frame)
        # The oldest frame within the window, or the previous frame if frames are further apart.
        while len(past) > 2 and frame.monotonic_s - past[0].monotonic_s > self._window_s:
            past.popleft()
        return self._with_latencies(with_rates(past[0], frame) if len(past) > 1 else frame)

    def _with_latencies(self, frame: Frame) -> Frame:
        now, now_s = read_latencies(self.board), frame.monotonic_s
        if now is None or self._latency_window_s is None:
            return with_latencies(frame, now, None)
        past = self._past_latencies
        if not past or now_s - past[-1][0] >= _LATENCY_LOOK_S:
            past.append((now_s, now))
        while len(past) > 2 and now_s - past[1][0] >= self._latency_window_s:
            past.popleft()
        since_s, then = past[0]
        if now_s == since_s:
            return with_latencies(frame, now, None)
        n = min(len(then), len(now))
        recent = now.copy()
        recent[:n] -= then[:n]
        return with_latencies(frame, np.maximum(recent, 0), now_s - since_s)

    def _follow(self) -> None:
        if (new := successor(self.board)) is not None:
            self.board.close()
            self.board = new
            self._past.clear()
            self._past_latencies.clear()

    def close(self) -> None:
        """Closes the board."""
        self.board.close()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def with_rates(before: Frame, now: Frame) -> Frame:
    """`now` with the rates since `before`, an earlier frame of the same board."""
    seconds = now.monotonic_s - before.monotonic_s
    if seconds <= 0:
        return now
    waves = now.coordinator.waves_started - before.coordinator.waves_started
    ranks = {rank.dp_rank: rank for rank in before.ranks}
    frontends = {frontend.index: frontend for frontend in before.frontends}
    return msgspec.structs.replace(
        now,
        rates_over_s=seconds,
        waves_per_minute=waves * 60 / seconds if now.waves else None,
        ranks=[_rank(ranks.get(rank.dp_rank), rank, seconds) for rank in now.ranks],
        frontends=[_frontend(frontends.get(f.index), f, seconds) for f in now.frontends],
    )


def _rank(before: Rank | None, now: Rank, seconds: float) -> Rank:
    if before is None or (before.incarnation, before.pid) != (now.incarnation, now.pid) or now.stock:
        return now  # the counters start again with each process
    steps, busy_s = now.steps - before.steps, now.busy_s - before.busy_s
    computed, cached = now.prompt_tokens - before.prompt_tokens, now.cached_tokens - before.cached_tokens
    return msgspec.structs.replace(
        now,
        step_ms=busy_s * 1e3 / steps if steps else None,
        busy=min(1.0, busy_s / seconds),
        requests_per_s=(now.requests_finished - before.requests_finished) / seconds,
        prompt_tokens_per_s=(now.prompt_tokens - before.prompt_tokens) / seconds,
        generation_tokens_per_s=(now.generation_tokens - before.generation_tokens) / seconds,
        cached_share=cached / (cached + computed) if now.num_blocks and cached + computed > 0 else None,
    )


def _frontend(before: Frontend | None, now: Frontend, seconds: float) -> Frontend:
    if before is None:
        return now
    return msgspec.structs.replace(now, routed_per_s=(now.routed - before.routed) / seconds)
