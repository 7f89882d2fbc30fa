"""An engine's row of the board: load, received counts, state and counters, without any socket.

`dpshm.Engine` adds the link to the coordinator and the rules of the waves. An engine that has both of its
own (vLLM's engines do) uses this class directly: it counts, publishes, and stores with `show` the state of its own
machine.

`EngineRow.publish` is a dozen 64-bit stores. How a process takes the row is `dpshm.engine.taking`.
"""

from __future__ import annotations

import time
from math import floor, inf
from operator import index
from threading import get_ident
from typing import Any, Self

from dpshm.board.board import Board
from dpshm.board.segment import Segment
from dpshm.board.words import (
    COUNT_MASK,
    KV_ONE,
    MAX_PROMPT_TOKENS,
    MAX_STEP,
    MAX_WAITING,
    MAX_WORD,
    ON_BEHALF,
    PAUSED_BY_USER,
    RUNNING,
    RUNNING_SHIFT,
    VERDICT_MASK,
    WAITING_SHIFT,
    pack_load,
    pack_progress,
    pack_state,
    saturate,
    unpack_load,
)
from dpshm.engine.cache import EngineCache
from dpshm.engine.step import StepOffsets, StepTimer, fitting
from dpshm.engine.taking import initialise, lock, wait_for_rank
from dpshm.errors import CapacityExceeded, RowInUse, SettingError, WrongThread
from dpshm.linux.descriptors import explained
from dpshm.linux.waits import deadline
from dpshm.rules.liveness import Verdict

_ROUNDING = 1e-6
"""A fraction that was computed may be so much above 1."""
_KV_TO_WAITING = MAX_WAITING.bit_length() - KV_ONE.bit_length()


class EngineRow:
    """A rank's row of the board. Belongs to the thread that made it.

    Attributes:
        dp_rank: the rank.
        board: the board, to read more of it.
        cache: what `open_cache` made; None before.
    """

    def __init__(self, board: Board, dp_rank: int) -> None:
        self.board = board
        self.dp_rank = dp_rank
        self._segment = board.segment
        self._thread = get_ident()
        words = self._words = board.words
        self._at_load = board.index("load", dp_rank)
        self._at_request_offset = board.index("request_offset", dp_rank)
        self._at_token_offset = board.index("token_offset", dp_rank)
        self._at_state = board.index("engine_state", dp_rank)
        self._at_progress = board.index("progress", dp_rank)
        self._at_backlog = board.index("prefill_backlog", dp_rank)
        self._at_beat = board.index("beat", dp_rank)
        self._at_finished = board.index("requests_finished", dp_rank)
        self._at_preemptions = board.index("preemptions", dp_rank)
        self._at_received_requests = board.index("received_requests", dp_rank)
        self._at_received_tokens = board.index("received_tokens", dp_rank)
        mask, frontends = COUNT_MASK, range(board.frontends)
        self._received_requests = [words[self._at_received_requests + f] & mask for f in frontends]
        self._received_tokens = [words[self._at_received_tokens + f] & mask for f in frontends]
        self._all_requests, self._all_tokens = sum(self._received_requests), sum(self._received_tokens)
        self._finished = self._preemptions = 0
        self._wave = self._progress = 0
        places = ("step_start", "steps", "step_model")
        self.cache: EngineCache | None = None
        self._caches_opened = 0
        self._step = StepTimer(words, StepOffsets(*(board.index(name, dp_rank) for name in places)))

    @classmethod
    @explained()
    def attach(cls, group: str, dp_rank: int, *, timeout_s: float = 0.0, **options: Any) -> Self:
        """Takes the row of a rank; returns once a living coordinator has marked it alive.

        Attach late: in the process and the thread that run the scheduler, after any fork.

        Args:
            group: the group's name.
            dp_rank: the rank.
            timeout_s: how long to wait for the group, if its coordinator has not started yet, and until it has
                this rank, if it will be scaled.
            options: of the constructor.

        Raises:
            SegmentNotFound: there is no such group on this node, or there was none within `timeout_s`.
            RowInUse: a live process has that rank, or one that has been ending for `EXIT_TIMEOUT_S`.
            CapacityExceeded: the segment has no such row.
            SettingError: the group has fewer ranks, and was not scaled within `timeout_s`.
        """
        dp_rank = index(dp_rank)
        until_s = deadline(timeout_s)
        board = Board(Segment.attach_within(group, timeout_s))
        try:
            if not 0 <= dp_rank < board.engines:
                more = ": start its coordinator with a larger max_engines" if dp_rank > 0 else ""
                raise CapacityExceeded(
                    f"dp_rank {dp_rank} is outside 0 to {board.engines - 1}, for which the board of group "
                    f"{group!r} was made{more}"
                )
            wait_for_rank(board, dp_rank, until_s)
            lock(board, dp_rank)
            if not board.segment.linked:
                raise RowInUse(f"group {group!r} ended while rank {dp_rank} attached; try again")
            initialise(board, dp_rank)
            try:
                engine = cls(board, dp_rank, **options)
            except BaseException:
                board.words[board.index("engine_pid", dp_rank)] = 0  # left, not died
                raise
            try:
                # An int: numpy asks an enumeration for attributes, and swallows what a signal handler raises then.
                board.wait_for_coordinator(
                    lambda: (
                        dp_rank >= board.dp_size
                        or int(board.engine_mark[dp_rank]) & (VERDICT_MASK | ON_BEHALF) == Verdict.ALIVE
                    )
                )
            except BaseException:
                engine.close()
                raise
        except BaseException:
            board.close()
            raise
        return engine

    def open_cache(
        self,
        num_blocks: int,
        block_tokens: int = 16,
        *,
        identity: int | None = None,
        recomputed_blocks: int = 0,
    ) -> EngineCache:
        """Shows front-ends what this engine has cached: makes its prefix index. A second call makes it anew.

        The cache of the call before takes no further calls.

        Args:
            num_blocks: blocks of the KV cache. The index takes 32 to 64 bytes for each.
            block_tokens: tokens a block.
            identity: of the hash, if the fingerprints are not those of `EngineCache.hasher`; 63 bits.
            recomputed_blocks: how many of the last cached blocks of a prompt the engine computes again. 0 but for
                some kinds of speculative decoding.

        Returns:
            `cache`. If there is no room for an index, a warning is logged and `cache.has_index` is false.

        Raises:
            SettingError: an argument is out of range.
        """
        self._check()
        made = EngineCache(
            *(self.board, self.dp_rank, index(num_blocks), index(block_tokens)),
            identity=None if identity is None else index(identity),
            number=self._caches_opened,
            recomputed_blocks=index(recomputed_blocks),
        )
        if self.cache is not None:
            self.cache.replace()
        self._caches_opened += 1
        self.cache = made
        return made

    def show(self, wave: int, *, running: bool, paused: bool = False) -> None:
        """Stores what this rank's own wave machine says.

        Args:
            wave: the wave that it is in.
            running: whether it steps, with work or to keep step with the others.
            paused: whether the user paused it.
        """
        wave = index(wave)
        self._wave, self._progress = wave, pack_progress(wave, 0)
        flags = (RUNNING if running else 0) | (PAUSED_BY_USER if paused else 0)
        self._words[self._at_state] = pack_state(wave, flags)

    def count_received(self, frontend: int | None, prompt_tokens: int = 0) -> None:
        """Counts a request that came in; the next `publish` must count it in its queue, or as ended.

        Args:
            frontend: the index of the front-end that sent it; None if it has no row (a stock one).
            prompt_tokens: as the front-end booked them.

        Raises:
            SettingError: there is no such front-end row.
        """
        self._check()
        frontend, prompt_tokens = self._check_received(frontend, prompt_tokens)
        if frontend is not None:
            self._count_received(frontend, prompt_tokens)

    def _check_received(self, frontend: int | None, prompt_tokens: int) -> tuple[int | None, int]:
        """The arguments of `count_received` as ints in their range."""
        if frontend is None:
            return None, 0
        if not (frontend.__class__ is int is prompt_tokens.__class__):  # numpy's narrow integers would overflow
            frontend, prompt_tokens = index(frontend), index(prompt_tokens)
        if not 0 <= frontend < len(self._received_requests):
            raise SettingError(f"frontend {frontend} is outside 0 to {len(self._received_requests) - 1}")
        if not 0 <= prompt_tokens <= MAX_PROMPT_TOKENS:
            prompt_tokens = 0 if prompt_tokens < 0 else MAX_PROMPT_TOKENS
        return frontend, prompt_tokens

    def _count_received(self, frontend: int, prompt_tokens: int) -> None:
        # Without a call or a loop: a signal handler that raises does so before this or after it.
        words = self._words
        total = self._received_tokens[frontend] + prompt_tokens
        tokens = total if total < MAX_WORD else MAX_WORD
        self._all_requests += 1
        self._all_tokens += prompt_tokens
        self._received_requests[frontend] = requests = self._received_requests[frontend] + 1
        self._received_tokens[frontend] = tokens
        # SYNC: tokens, then requests; `FrontendRow.end` loads them the other way round.
        words[self._at_received_tokens + frontend] = tokens
        words[self._at_received_requests + frontend] = requests

    def publish(
        self,
        *,
        waiting: int,
        running: int,
        kv_cache_usage: float = 0.0,
        prefill_backlog: int = 0,
        step: int = 0,
    ) -> None:
        """Stores this rank's load; call it when the queue changed, before and after each step.

        Args:
            waiting: requests in the queue, those just received among them.
            running: requests in the batch.
            kv_cache_usage: fraction of the KV cache in use.
            prefill_backlog: prompt tokens received and not yet computed.
            step: number of the step, growing within an incarnation; 0 if it does not fit 32 bits.

        Raises:
            SettingError: a count is negative or not whole, or `kv_cache_usage` is no fraction. Nothing was stored.
        """
        # `_check`, `pack_load` and `saturate` are written out, for what a rank usually says: it
        # publishes with cold caches, where each call and each test costs a microsecond until others see the load.
        if not self._segment.usable or get_ident() != self._thread:
            self._check()
        words, backlog = self._words, prefill_backlog
        try:
            kv = floor(kv_cache_usage * KV_ONE + 0.5)
            every = waiting | running | kv << _KV_TO_WAITING  # fits 23 bits if each of them is in its range
        except (TypeError, ValueError, OverflowError):  # not an int, NaN, infinite, or numpy's narrow integers
            every = -1
        if every.__class__ is int and 0 <= every <= MAX_WAITING:  # numpy's integers would wrap
            load, in_queue = waiting << WAITING_SHIFT | running << RUNNING_SHIFT | kv, waiting + running
        else:
            counts = inf > waiting >= 0 == waiting % 1 and inf > running >= 0 == running % 1
            if not (counts and -_ROUNDING <= kv_cache_usage <= 1 + _ROUNDING):
                raise SettingError(
                    f"waiting={waiting}, running={running}, kv_cache_usage={kv_cache_usage}: counts are whole "
                    "numbers from 0 on, and the usage is a fraction from 0.0 to 1.0, not a percentage"
                )
            load = pack_load(waiting, running, kv_cache_usage)
            waiting, running, _ = unpack_load(load)
            in_queue = waiting + running
        if not (backlog.__class__ is int is step.__class__ and 0 <= backlog <= MAX_WORD and 0 <= step <= MAX_STEP):
            if not inf > backlog >= 0 == backlog % 1:
                raise SettingError(f"prefill_backlog is {backlog}, and must be a whole number from 0 on")
            backlog = saturate(int(backlog))
            step = int(step) if 0 <= step <= MAX_STEP else 0
        # SYNC: what a decision needs is whole in each of these words (`dpshm.board.outstanding`), whatever their
        # order.
        words[self._at_load] = load
        words[self._at_request_offset] = in_queue - self._all_requests
        words[self._at_backlog] = backlog
        words[self._at_token_offset] = backlog - self._all_tokens
        if self._step.unreported:
            self._step.report(waiting, running, backlog)
        words[self._at_progress] = self._progress | step
        # SYNC: the beat comes last, so a reader that has seen it (x86-64) sees the report that it dates.
        words[self._at_beat] = time.monotonic_ns()

    def step(self, prefill_tokens: int = 0, batch: int = 0, held_tokens: int = 0) -> StepTimer:
        """A context for one step of the model: marks it as begun, times it, counts it.

        Args:
            prefill_tokens: prompt tokens that it computes.
            batch: requests that get a token from it. Neither of the two: a dummy step.
            held_tokens: tokens of context of the running requests, computed or cached: what attention reads.

        Raises:
            SettingError: one of them is negative. Nothing was stored.
        """
        self._check()
        step, each = self._step, (index(prefill_tokens), index(batch), index(held_tokens))
        if min(each) < 0:
            raise SettingError(
                f"prefill_tokens={each[0]}, batch={each[1]}, held_tokens={each[2]}: give counts of 0 or more"
            )
        step.prefill_tokens, step.batch, step.held_tokens = fitting(*each)
        return step

    def finished(self, requests: int = 1) -> None:
        """Counts requests that ended."""
        self._check()
        requests = index(requests)
        self._finished += requests
        self._words[self._at_finished] = self._finished
        self._step.finished(requests)

    def preempted(self, requests: int = 1) -> None:
        """Counts requests that lost their place in the batch, for want of KV cache, and wait again.

        Raises:
            SettingError: the number is negative. Nothing was counted.
        """
        self._check()
        requests = index(requests)
        if requests < 0:
            raise SettingError(f"preempted({requests}): give a number of requests, 0 or more")
        self._preemptions = saturate(self._preemptions + requests)
        self._words[self._at_preemptions] = self._preemptions

    def close(self) -> None:
        """Leaves the group: the row is free for another process."""
        if not self._segment.usable:
            return
        self._check()
        if self.cache is not None:
            self.cache.close()
        words = self._words
        words[self._at_load] = words[self._at_backlog] = 0
        self._step.forget()
        words[self._at_request_offset], words[self._at_token_offset] = -self._all_requests, -self._all_tokens
        words[self._at_state] = pack_state(self._wave, 0)
        words[self.board.index("engine_pid", self.dp_rank)] = 0  # left, not died
        self.board.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self) -> None:
        if not self._segment.usable:
            raise self._segment.why_unusable()
        if get_ident() != self._thread:
            raise WrongThread(
                f"engine {self.dp_rank} belongs to the thread that attached it: call it from there, or attach "
                "in the thread that runs the scheduler"
            )
