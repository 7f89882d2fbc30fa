"""What a front-end's handle tells, and what changes nothing: a choice without a booking, readiness, health."""

from __future__ import annotations

import operator
import time
from collections.abc import Collection
from threading import RLock

from dpshm.board.board import Board
from dpshm.board.segment import Segment
from dpshm.board.snapshot import Snapshot
from dpshm.board.words import MAX_PROMPT_TOKENS
from dpshm.errors import SettingError, StartupTimeout
from dpshm.frontend.changes import Changes
from dpshm.frontend.decisions import Decisions
from dpshm.frontend.health import Health, read_health
from dpshm.frontend.route import Bookings
from dpshm.linux.waits import deadline
from dpshm.policies import key_of
from dpshm.rules.prefix_hash import Prompt, Tokens

READY_INTERVAL_S = 0.02
NOBODY: Collection[int] = ()
"""Excludes no rank."""


class Observing:
    """The part of `dpshm.Frontend` that changes nothing."""

    board: Board
    _segment: Segment
    _lock: RLock
    _bookings: Bookings
    _decisions: Decisions

    def choose(
        self,
        prompt_tokens: int = 0,
        *,
        prompt: Prompt | Tokens | None = None,
        exclude: Collection[int] = NOBODY,
        key: int | str | bytes | None = None,
    ) -> int:
        """The engine that `route` would choose now. Books nothing and wakes no rank.

        Raises:
            NoEngineAvailable: there is none.
            Overloaded: each engine has `max_requests` requests.
        """
        if not self._segment.usable:
            raise self._segment.why_unusable()
        usual = type(prompt_tokens) is int and 0 <= prompt_tokens <= MAX_PROMPT_TOKENS
        prompt_tokens = prompt_tokens if usual else as_length(prompt_tokens)
        if prompt is not None:
            prompt = as_prompt(prompt)
            prompt_tokens = prompt_tokens or len(prompt)
        exclude = exclude if exclude is NOBODY else as_ranks(exclude)
        with self._lock:
            now_ns = self._decisions.begin()
            cached = (
                None if prompt is None else self._decisions.prefixes.look_up(prompt, prompt_tokens, now_ns).cached
            )
            of_key = None if key is None else key_of(key)
            dp_rank = self._decisions.choose(prompt_tokens, of_key, cached, now_ns, exclude)
        if self._bookings.lost:
            self._bookings.heal()
        return dp_rank

    def cached(self, prompt: Prompt | Tokens) -> list[int]:
        """By rank, how many of a prompt's tokens the rank would find cached now; 0 for a rank without an index.

        Raises:
            SettingError: the prompt holds no token ids.
        """
        prompt = as_prompt(prompt)
        if not self._segment.usable:
            raise self._segment.why_unusable()
        with self._lock:
            self._decisions.begin()
            found = self._decisions.prefixes.look_up(prompt, len(prompt)).cached
        if self._bookings.lost:
            self._bookings.heal()
        return found

    async def wait_ready(self, timeout_s: float | None = None, *, min_ranks: int | None = None) -> None:
        """Waits until every rank that this front-end may choose is there, and some rank may be chosen.

        Args:
            timeout_s: how long; None: for ever.
            min_ranks: wait only until so many may be chosen.

        Raises:
            StartupTimeout: they were not there within that time; names the ranks that are missing.
        """
        import asyncio  # not for front-ends that have no event loop

        began_s, until_s = time.monotonic(), deadline(timeout_s)
        if min_ranks is not None:
            min_ranks = operator.index(min_ranks)
        while True:
            with self._lock:
                self._decisions.begin()
                missing, routable = self._decisions.reader.missing(), len(self._decisions.reader.eligible)
            if routable >= min_ranks if min_ranks is not None else routable and not missing:
                return
            if (now_s := time.monotonic()) >= until_s:
                raise StartupTimeout(
                    f"group {self._segment.group!r} was not ready in {now_s - began_s:.3g} s; "
                    f"ranks without a row: {missing}; {routable} may be chosen"
                )
            await asyncio.sleep(READY_INTERVAL_S)

    def health(self) -> Health:
        """Whether this front-end could route now, and what each rank is: for a health check."""
        if not self._segment.usable:  # tested here too: in a forked child the lock may be held for ever
            raise self._segment.why_unusable()
        with self._lock:
            now_ns = self._decisions.begin()
            routable = self._decisions.reader.eligible
            return read_health(self.board, routable, now_ns)

    def changes(self) -> Changes:
        """The changes of the group from now on, for ``async for``: what `dpshm events` prints.

        A rank joined, left, died, stalled, is stuck, recovered, was drained; a wave began or ended; a coordinator
        or a front-end came or went (`dpshm.Event`). It looks at the board every 50 ms. It ends with the group, and
        when this front-end is closed.

        Raises:
            SegmentNotFound: the group has ended.
        """
        if not self._segment.usable:
            raise self._segment.why_unusable()
        return Changes(self._segment)

    def snapshot(self) -> Snapshot:
        """The state of each rank as this front-end sees it; see `dpshm.Board.snapshot`."""
        if not self._segment.usable:
            raise self._segment.why_unusable()
        if self._bookings.lost:
            self._bookings.heal()
        with self._lock:  # where no coordinator watches it asks for locks, whose descriptor `close` closes
            if not self._segment.usable:
                raise self._segment.why_unusable()
            return self.board.snapshot(time.monotonic_ns())


def as_length(prompt_tokens: int) -> int:
    """A prompt's length as it is booked.

    Raises:
        SettingError: it is below 0.
    """
    tokens = operator.index(prompt_tokens)
    if tokens < 0:
        raise SettingError(f"prompt_tokens is {tokens}: give the prompt's length, 0 or more")
    return min(tokens, MAX_PROMPT_TOKENS)


def as_ranks(exclude: Collection[int] | None) -> Collection[int]:
    """Ranks that a request excludes, as ints: a rank of another type would exclude nobody, silently."""
    return NOBODY if exclude is None else frozenset(map(operator.index, exclude))


def as_prompt(prompt: Prompt | Tokens) -> Prompt:
    """A prompt as such; its tokens are checked.

    Raises:
        SettingError: it holds no token ids.
    """
    return prompt if isinstance(prompt, Prompt) else Prompt(prompt)
