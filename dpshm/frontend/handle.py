"""A front-end's handle: chooses an engine for each request, books the request, wakes a paused group.

`Frontend.route` never blocks and needs no event loop: it reads memory, and its wake-up goes into sockets that drop
a message that they cannot accept. The parts: `dpshm.frontend.view_reader` reads the board, a policy
(`dpshm.policies`) chooses, `dpshm.frontend.row` books, `dpshm.frontend.wakeup` wakes, and `dpshm.frontend.route`
is the booked request.
"""

from __future__ import annotations

import logging
import math
import operator
import os
import socket
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

from dpshm.board import layout
from dpshm.board.board import Board
from dpshm.board.events import Event
from dpshm.board.segment import Segment
from dpshm.board.snapshot import Snapshot
from dpshm.board.words import AWAKE, MAX_PROMPT_TOKENS, ON_BEHALF, PHASE_MASK, VERDICT_MASK, WAVE_SHIFT
from dpshm.errors import NoEngineAvailable, SettingError, StartupTimeout
from dpshm.frontend.changes import Changes, ChangeThread
from dpshm.frontend.decision_lock import DecisionLock
from dpshm.frontend.health import Health, read_health
from dpshm.frontend.prefix_reader import PrefixReader
from dpshm.frontend.recorder import Recorder, default_path
from dpshm.frontend.route import Bookings, Route
from dpshm.frontend.row import FrontendRow, lock_row
from dpshm.frontend.view_reader import ViewReader
from dpshm.frontend.wakeup import Wakeup
from dpshm.linux.descriptors import explained
from dpshm.net.keys import ClientKeys, Folder, keys_for
from dpshm.policies import Policy, Request, by_name, key_of
from dpshm.rules.liveness import Verdict
from dpshm.rules.prefix_hash import Prompt, Tokens
from dpshm.rules.waves import MAX_WAVE

logger = logging.getLogger(__name__)

REFRESH_INTERVAL_NS = 100_000_000
"""Interval between refreshes while no mark changes: a coordinator may have ended, or the file been unlinked."""
SAY_AGAIN_NS = 1_000_000_000
"""Between two words to the coordinator that a rank was heard which the board does not show."""
READY_INTERVAL_S = 0.02


class Frontend:
    """A front-end's row of the board, with the calls of an API server. Safe to use from several threads.

    Attributes:
        index: the number of the row; requests are stamped with it, so that engines can count them.
        owner: the name under which the row was locked.
        board: the board, to read more of it.
    """

    def __init__(
        self,
        board: Board,
        index: int,
        owner: str,
        ranks: Iterable[int] | None,
        policy: Policy,
        *,
        exclusive: bool = False,
        recording: bool = False,
        keys: ClientKeys | None = None,
        weights: Mapping[int, float] | None = None,
        max_requests: int | None = None,
    ) -> None:
        self.board = board
        self.index = index
        self.owner = owner
        self._policy = policy
        self._segment = board.segment
        self._words = board.words
        self._at_revision = board.index("revision")
        self._at_control = board.index("control")
        self._row = FrontendRow(board, index)
        self._bookings = Bookings(board, self._row, index)
        self._lock = self._bookings.lock
        self._reader = ViewReader(
            *(board, index, self._row.own, None if ranks is None else frozenset(ranks)),
            # A recording has the work, whatever the policy needs: a replay may ask another one.
            sees_work=recording or bool(getattr(policy, "sees_work", False)),
            weights=weights,
            max_requests=max_requests,
        )
        self._prefixes = PrefixReader(board, index)
        self._wakeup = Wakeup(board.segment, keys)
        self._decision_lock = DecisionLock(board.segment) if exclusive else None
        self._recorder: Recorder | None = None
        self._change_thread: ChangeThread | None = None
        self._next_refresh_ns = 0
        self._alone = False  # the coordinator of a group with waves has ended, or is stopped
        self._warned_unlinked = False
        self._heard: set[int] = set()
        self._next_word_ns = 0

    @classmethod
    @explained()
    def attach(
        cls,
        group: str,
        *,
        owner: str | None = None,
        ranks: Iterable[int] | None = None,
        policy: str | Policy = "least_work",
        exclusive: bool = False,
        record: bool | str | Path = False,
        weights: Mapping[int, float] | None = None,
        max_requests: int | None = None,
        on_change: Callable[[Event], object] | None = None,
        timeout_s: float = 0.0,
        curve_dir: Folder | None = None,
    ) -> Frontend:
        """Takes a front-end's row of a group.

        Args:
            group: the group's name.
            owner: a name for this front-end, at most 48 bytes, by which engines can find its row; a restart
                under the same name gets the same row back, unless requests of its predecessor are in flight.
                Default: host and pid.
            ranks: the only ranks that it may choose (hybrid and external load balancing); default all.
            policy: a name from `dpshm.policies.NAMES`, optionally with parameters (``affinity:epsilon=0.5``), or
                a callable ``(view, request) -> dp_rank``.
            exclusive: reads, decides and books under one kernel lock of the group, so that no two front-ends that
                ask for it ever choose from the same state (`dpshm.frontend.decision_lock`).
            record: keeps the newest decisions in a ring in shared memory, for ``dpshm replay``: a file's name, or
                True for one that goes with the group (`dpshm.frontend.recorder`).
            weights: speeds of ranks on unlike GPUs, by rank; 1 for those that are left out. For policies that
                count requests (`least_loaded`, `power_of_two`). `least_work` learns how fast each rank is, and
                uses weights until it has.
            max_requests: outstanding requests with which a rank of weight 1 is full, others in proportion. If all
                are full, `route` raises Overloaded. Front-ends that decide at the same instant may each send one
                more, unless they are `exclusive`.
            on_change: called with each change of the group, in a thread of this handle (see `changes`).
            timeout_s: how long to wait for the group, if its coordinator has not started yet.
            curve_dir: folder of the group's keys, where its sockets ask for them; default: the environment's
                ``DPSHM_CURVE_DIR``.

        Raises:
            SegmentNotFound: there is no such group on this node, or there was none within `timeout_s`.
            CapacityExceeded: every front-end row is taken.
            SettingError: an argument cannot be used.
        """
        chosen = by_name(policy) if isinstance(policy, str) else policy
        name = f"{socket.gethostname()[:32]}:{os.getpid()}" if owner is None else owner
        encoded = name.encode()
        if len(encoded) > layout.OWNER_BYTES or "\0" in name:
            raise SettingError(f"owner {name!r} must be at most {layout.OWNER_BYTES} bytes, none of them zero")
        if max_requests is not None and max_requests < 1:
            raise SettingError(f"max_requests is {max_requests}, and must be at least 1")
        board, index = Board(Segment.attach_within(group, timeout_s)), -1
        try:
            speeds = None if weights is None else _check_weights(weights, board.engines)
            only = None if ranks is None else sorted(set(map(operator.index, ranks)))
            if only is not None and not (only and only[0] >= 0 and only[-1] < board.engines):
                raise SettingError(f"ranks {only} must be some of 0 to {board.engines - 1}")
            keys = keys_for(board.segment.header, curve_dir)
            index = lock_row(board, encoded)
            frontend = cls(
                *(board, index, name, only, chosen),
                exclusive=exclusive,
                recording=record is not False,
                keys=keys,
                weights=speeds,
                max_requests=max_requests,
            )
            # Other front-ends refresh when marks change: from then on they count this one's bookings.
            board.wait_for_coordinator(lambda: board.frontend_mark[index] == Verdict.ALIVE)
            if record is not False:
                path = default_path(group, index) if record is True else Path(record)
                frontend._recorder = Recorder.create(path, engines=board.dp_size, group=group, frontend=index)
            if on_change is not None:
                frontend._change_thread = ChangeThread(group, on_change)
                frontend._change_thread.start()
        except BaseException:
            if index >= 0:
                board.frontend_pid[index] = 0  # left, not died
            board.close()
            raise
        return frontend

    def heard_from(self, dp_rank: int, connected: bool = True) -> None:
        """Says that this front-end has a live connection to a rank: its handshake, or a message, came from it.

        Only vLLM's own engines need it, and in a dense group: they report to the coordinator after a step alone,
        so a rank that has had no request yet is not known to be there. Ranks that have dpshm need no word.

        Args:
            dp_rank: the rank.
            connected: False takes the word back: the connection has ended.

        Raises:
            SettingError: the group has no such rank.
        """
        dp_rank = operator.index(dp_rank)
        if not 0 <= dp_rank < self.board.engines:
            raise SettingError(f"dp_rank {dp_rank} is outside 0 to {self.board.engines - 1}")
        with self._lock:
            if not self._segment.usable:
                raise self._segment.why_unusable()
            if connected:
                self._heard.add(dp_rank)
                self._tell_heard(time.monotonic_ns())
            else:
                self._heard.discard(dp_rank)

    def route(
        self,
        prompt_tokens: int = 0,
        *,
        prompt: Prompt | Tokens | None = None,
        dp_rank: int | None = None,
        exclude: Collection[int] = (),
        key: int | str | bytes | None = None,
        wake: bool = True,
    ) -> Route:
        """Chooses an engine, books the request on it, and wakes the group if it is paused.

        Keep the Route until the request ends, or use it as a context (`dpshm.Route`). Send `Route.stamp` with the
        request: the engine gives it to its `receive`.

        Args:
            prompt_tokens: of the prompt; with `prompt` its length is the default.
            prompt: the prompt's token ids. What a rank has cached of it (`open_cache` of `dpshm.Engine`) is not
                booked: it need not be computed there. Arrays are read as they are, lists are converted.
            dp_rank: the engine that it has to go to; drained and stalled ones may be named, dead ones not.
            exclude: engines that it must not go to, such as the one at which it failed.
            key: what the policy `affinity` keeps on one rank: a conversation's id, or a prompt's first bytes.
            wake: False leaves paused ranks asleep; call `wake` once the request is sent. For engines that go back
                to sleep when they wake up before their request is there.

        Raises:
            NoEngineAvailable: there is no engine to take it. Nothing was booked.
            Overloaded: each engine has `max_requests` requests; a NoEngineAvailable, too. Nothing was booked.
            SettingError: `dp_rank`, or the policy's choice, is not one that this front-end may choose; or the
                prompt holds no token ids. Nothing was booked.
        """
        prompt_tokens = min(operator.index(prompt_tokens), MAX_PROMPT_TOKENS)
        if prompt is not None:
            prompt = _as_prompt(prompt)
            prompt_tokens = prompt_tokens or len(prompt)
        if not self._segment.usable:  # tested here too: in a forked child the lock may be held for ever
            raise self._segment.why_unusable()
        route = Route(self._bookings, prompt_tokens=prompt_tokens)  # closed until it is booked
        try:
            with self._lock:
                now_ns = self._begin()
                exclusive = self._decision_lock
                try:
                    if exclusive is not None:
                        exclusive.enter()
                    lookup = None if prompt is None else self._prefixes.look_up(prompt, prompt_tokens, now_ns)
                    if dp_rank is None:
                        cached = None if lookup is None else lookup.cached
                        dp_rank = self._choose(Request(prompt_tokens, _key(key), cached), now_ns, exclude)
                    else:
                        dp_rank = self._reader.check_pinned(dp_rank, exclude)
                    route.dp_rank = dp_rank
                    if lookup is not None:
                        self._prefixes.sent(lookup, dp_rank, now_ns)
                        route.cached_tokens = hit = lookup.cached[dp_rank]
                        route.prompt_tokens -= hit
                    self._row.book(route, now_ns)
                finally:
                    if exclusive is not None:
                        exclusive.leave()
                # SYNC: the booking is stored before the phase is loaded. If the load moves before the stores (x86
                # lets a load pass an older store), the worst is a wake-up too few or too many; the engine wakes
                # the others.
                control = self._words[self._at_control]
                route.wave = wave = control >> WAVE_SHIFT & MAX_WAVE
                if wake and (self._alone or control & PHASE_MASK not in AWAKE):
                    route.wave = self._wake(wave, receiver=dp_rank)
            if self._bookings.lost:
                self._bookings.heal()
        except BaseException:  # a signal handler's, too
            route.cancel()
            raise
        return route

    def choose(
        self,
        prompt_tokens: int = 0,
        *,
        prompt: Prompt | Tokens | None = None,
        exclude: Collection[int] = (),
        key: int | str | bytes | None = None,
    ) -> int:
        """The engine that `route` would choose now. Books nothing and wakes no rank.

        Raises:
            NoEngineAvailable: there is none.
            Overloaded: each engine has `max_requests` requests.
        """
        if not self._segment.usable:
            raise self._segment.why_unusable()
        prompt_tokens = min(operator.index(prompt_tokens), MAX_PROMPT_TOKENS)
        if prompt is not None:
            prompt = _as_prompt(prompt)
            prompt_tokens = prompt_tokens or len(prompt)
        with self._lock:
            now_ns = self._begin()
            cached = None if prompt is None else self._prefixes.look_up(prompt, prompt_tokens, now_ns).cached
            dp_rank = self._choose(Request(prompt_tokens, _key(key), cached), now_ns, exclude)
        if self._bookings.lost:
            self._bookings.heal()
        return dp_rank

    def cached(self, prompt: Prompt | Tokens) -> list[int]:
        """By rank, how many of a prompt's tokens the rank would find cached now; 0 for a rank without an index.

        Raises:
            SettingError: the prompt holds no token ids.
        """
        prompt = _as_prompt(prompt)
        if not self._segment.usable:
            raise self._segment.why_unusable()
        with self._lock:
            self._begin()
            found = self._prefixes.look_up(prompt, len(prompt)).cached
        if self._bookings.lost:
            self._bookings.heal()
        return found

    def expect_no_prompts(self) -> None:
        """Requests come without prompts, and the caller knows why: it is not logged."""
        self._prefixes.said = True

    def wake(self, *, ring: bool = True) -> None:
        """Wakes the ranks if they are paused: for a request that is sent without `route`.

        Args:
            ring: False leaves the doorbells to the engine that gets the request, and tells the coordinator alone.
        """
        if not self._segment.usable:
            raise self._segment.why_unusable()
        with self._lock:
            self._begin()
            control = self._words[self._at_control]
            if self._alone or control & PHASE_MASK not in AWAKE:
                self._wake(control >> WAVE_SHIFT & MAX_WAVE, receiver=None, ring=ring)
        if self._bookings.lost:
            self._bookings.heal()

    async def wait_ready(self, timeout_s: float | None = None, *, min_ranks: int | None = None) -> None:
        """Waits until every rank that this front-end may choose is there, and some rank may be chosen.

        Args:
            timeout_s: how long; None: for ever.
            min_ranks: wait only until so many may be chosen.

        Raises:
            StartupTimeout: they were not there within that time; names the ranks that are missing.
        """
        import asyncio  # not for front-ends that have no event loop

        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while True:
            with self._lock:
                self._begin()
                missing, routable = self._reader.missing(), len(self._reader.eligible)
            if routable >= min_ranks if min_ranks is not None else routable and not missing:
                return
            if time.monotonic() >= deadline:
                raise StartupTimeout(
                    f"group {self._segment.group!r} was not ready in {timeout_s:g} s; "
                    f"ranks without a row: {missing}; {routable} may be chosen"
                )
            await asyncio.sleep(READY_INTERVAL_S)

    def health(self) -> Health:
        """Whether this front-end could route now, and what each rank is: for a health check."""
        if not self._segment.usable:  # tested here too: in a forked child the lock may be held for ever
            raise self._segment.why_unusable()
        with self._lock:
            now_ns = self._begin()
            routable = self._reader.eligible
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
        return self.board.snapshot(time.monotonic_ns())

    def close(self) -> None:
        """Leaves the group and frees the row. Its bookings leave the sums."""
        if self._change_thread is not None and self._segment.usable:
            self._change_thread.stop()
        if self._bookings.lost:
            self._bookings.heal()
        if self._segment.usable:  # in a forked child the lock may be held for ever
            with self._lock:
                self._leave()

    def __enter__(self) -> Frontend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _leave(self) -> None:
        if self._segment.usable:
            self._wakeup.close()
            if self._recorder is not None:
                self._recorder.close()
            self._row.leave()
            self.board.close()

    def _begin(self) -> int:
        """Begins a call that holds the lock: refreshes what is out of date. Returns CLOCK_MONOTONIC ns."""
        if not self._segment.usable:
            raise self._segment.why_unusable()
        now_ns = time.monotonic_ns()
        if now_ns >= self._next_refresh_ns or self._words[self._at_revision] != self._reader.revision:
            self._refresh(now_ns)
        return now_ns

    def _wake(self, wave: int, *, receiver: int | None, ring: bool = True) -> int:
        """Wakes ranks that sleep; returns the wave that they are woken for, `wave` or a newer one.

        The control word may be old: a coordinator that was killed or stopped ends no wave. The rows tell.
        """
        wave, asleep = self._reader.read_wave(wave)
        if self._alone:
            receiver = None  # it may refuse the request, and no coordinator wakes it then
        if asleep or not self._alone:
            self._wakeup.wake(*(wave, self._reader.dp_size), receiver=receiver, ring=ring, again=self._alone)
        return wave

    def _refresh(self, now_ns: int) -> None:
        self._next_refresh_ns = now_ns + REFRESH_INTERVAL_NS
        if not self._warned_unlinked and not self._segment.linked:
            self._warned_unlinked = True
            logger.warning(
                "the segment of group %r was unlinked under it: routing goes on, but no process can attach any "
                "more. Restart the group; something cleans %s",
                self._segment.group,
                self._segment.path.parent,
            )
        self._alone = self._segment.header.waves and not self.board.is_watched()
        self._reader.refresh()
        self._row.follow_late(self._reader.late)
        self._prefixes.refresh(now_ns, self._row.routed)
        self._wakeup.expect(self._reader.dp_size)
        if self._heard and now_ns >= self._next_word_ns:
            self._tell_heard(now_ns)

    def _tell_heard(self, now_ns: int) -> None:
        """Names the ranks that were heard and have no row of their own, if one of them is not there yet."""
        marks = self.board.engine_mark[: self.board.dp_size].tolist()
        absent = {e for e in self._heard if e < len(marks) and marks[e] & VERDICT_MASK == Verdict.ABSENT}
        if absent:
            self._next_word_ns = now_ns + SAY_AGAIN_NS
            stock = {e for e in self._heard if e < len(marks) and marks[e] & ON_BEHALF}
            self._wakeup.tell_heard(sorted(absent | stock))

    def _choose(self, request: Request, now_ns: int, exclude: Collection[int]) -> int:
        reader, recorder = self._reader, self._recorder
        eligible = reader.eligible
        if not eligible:
            raise NoEngineAvailable(reader.why_none())
        beats = reader.read_beats() if recorder is not None else []  # before the view, so that ages err upwards
        view = reader.read(now_ns, exclude)
        rank = self._policy(view, request)
        if rank not in eligible or (exclude and rank in exclude):
            raise SettingError(f"the policy chose rank {rank!r}, which is not one of {sorted(view.ranks)}")
        if recorder is not None:
            recorder.record(now_ns, view, request, int(rank), beats)
        return int(rank)


def _check_weights(weights: Mapping[int, float], engines: int) -> dict[int, float]:
    checked = {operator.index(rank): float(weight) for rank, weight in weights.items()}
    for rank, weight in checked.items():
        if not (0 <= rank < engines and 0 < weight < math.inf):
            raise SettingError(
                f"weights has {weight} for rank {rank}: give numbers above 0, for ranks 0 to {engines - 1}"
            )
    return checked


def _as_prompt(prompt: Prompt | Tokens) -> Prompt:
    return prompt if isinstance(prompt, Prompt) else Prompt(prompt)


def _key(key: int | str | bytes | None) -> int | None:
    return None if key is None else key_of(key)
