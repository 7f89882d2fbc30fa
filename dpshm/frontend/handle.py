"""A front-end's handle: chooses an engine for each request, books the request, wakes a paused group.

`Frontend.route` never blocks and needs no event loop: it reads memory, and its wake-up goes into sockets that drop
a message that they cannot accept. The parts: `dpshm.frontend.view_reader` reads the board, a policy
(`dpshm.policies`) chooses, `dpshm.frontend.row` books, `dpshm.frontend.wakeup` wakes, and `dpshm.frontend.route`
is the booked request.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

from dpshm.board.board import Board
from dpshm.board.events import Event
from dpshm.board.segment import Segment
from dpshm.board.words import AWAKE, MAX_PROMPT_TOKENS, PHASE_MASK, WAVE_SHIFT
from dpshm.errors import SettingError
from dpshm.frontend.arguments import check_callable, check_max_requests, check_ranks, check_weights, name_of
from dpshm.frontend.changes import ChangeThread
from dpshm.frontend.decision_lock import DecisionLock
from dpshm.frontend.decisions import Decisions
from dpshm.frontend.observing import NOBODY, Observing, as_length, as_prompt, as_ranks
from dpshm.frontend.recorder import Recorder, default_path
from dpshm.frontend.route import Bookings, Route
from dpshm.frontend.row import FrontendRow, lock_row
from dpshm.linux.descriptors import explained
from dpshm.net.keys import ClientKeys, Folder, keys_for
from dpshm.policies import Policy, by_name, check_weights_count, key_of
from dpshm.rules.liveness import Verdict
from dpshm.rules.prefix_hash import Prompt, Tokens
from dpshm.rules.waves import MAX_WAVE


class Frontend(Observing):
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
        self._segment = board.segment
        self._words = board.words
        self._at_control = board.index("control")
        self._row = FrontendRow(board, index)
        self._bookings = Bookings(board, self._row, index)
        self._lock = self._bookings.lock
        self._decisions = Decisions(
            *(board, self._row, policy),
            index=index,
            ranks=None if ranks is None else frozenset(ranks),
            recording=recording,
            keys=keys,
            weights=weights,
            max_requests=max_requests,
        )
        self._decision_lock = DecisionLock(board.segment) if exclusive else None
        self._change_thread: ChangeThread | None = None

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
                count requests (`least_loaded`, `power_of_two`, your own), and for `max_requests`. `least_work`
                learns how fast each rank is, and uses weights until it has.
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
        chosen = by_name(policy) if isinstance(policy, str) else check_callable("policy", policy)
        if on_change is not None:
            check_callable("on_change", on_change)
        if weights is not None and max_requests is None:
            check_weights_count(chosen)
        max_requests = check_max_requests(max_requests)
        name, encoded = name_of(owner)
        board, index = Board(Segment.attach_within(group, timeout_s)), -1
        try:
            speeds, only = check_weights(weights, board.engines), check_ranks(ranks, board.engines)
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
            board.wait_for_coordinator(lambda: int(board.frontend_mark[index]) == Verdict.ALIVE)
            frontend._decisions.rehearse()
            if record is not False:
                path = default_path(group, index) if record is True else Path(record)
                recorder = Recorder.create(path, engines=board.dp_size, group=group, frontend=index)
                frontend._decisions.recorder = recorder
            if on_change is not None:
                frontend._change_thread = ChangeThread(board.segment, on_change)
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
                self._decisions.heard.add(dp_rank, time.monotonic_ns())
            else:
                self._decisions.heard.remove(dp_rank)

    def route(
        self,
        prompt_tokens: int = 0,
        *,
        prompt: Prompt | Tokens | None = None,
        dp_rank: int | None = None,
        exclude: Collection[int] = NOBODY,
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
                prompt holds no token ids, or `prompt_tokens` is below 0. Nothing was booked.
        """
        usual = type(prompt_tokens) is int and 0 <= prompt_tokens <= MAX_PROMPT_TOKENS
        prompt_tokens = prompt_tokens if usual else as_length(prompt_tokens)
        if prompt is not None:
            prompt = as_prompt(prompt)
            prompt_tokens = prompt_tokens or len(prompt)
        exclude = exclude if exclude is NOBODY else as_ranks(exclude)
        if not self._segment.usable:  # tested here too: in a forked child the lock may be held for ever
            raise self._segment.why_unusable()
        route = Route(self._bookings, prompt_tokens=prompt_tokens)  # closed until it is booked
        try:
            with self._lock:
                decisions, exclusive = self._decisions, self._decision_lock
                now_ns = decisions.begin()
                try:
                    if exclusive is not None:
                        exclusive.enter()
                    lookup = None if prompt is None else decisions.prefixes.look_up(prompt, prompt_tokens, now_ns)
                    if dp_rank is None:
                        cached = None if lookup is None else lookup.cached
                        of_key = None if key is None else key_of(key)
                        dp_rank = decisions.choose(prompt_tokens, of_key, cached, now_ns, exclude)
                    else:
                        dp_rank = decisions.reader.check_pinned(dp_rank, exclude)
                    route.dp_rank = dp_rank
                    if lookup is not None:
                        decisions.prefixes.sent(lookup, dp_rank, now_ns)
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
                if wake and (decisions.alone or control & PHASE_MASK not in AWAKE):
                    route.wave = decisions.wake(wave, receiver=dp_rank)
            if self._bookings.lost:
                self._bookings.heal()
        except BaseException:  # a signal handler's, too
            route.cancel()
            raise
        return route

    def expect_no_prompts(self) -> None:
        """Requests come without prompts, and the caller knows why: it is not logged."""
        self._decisions.prefixes.said = True

    def wake(self, *, ring: bool = True) -> None:
        """Wakes the ranks if they are paused: for a request that is sent without `route`.

        Args:
            ring: False leaves the doorbells to the engine that gets the request, and tells the coordinator alone.
        """
        if not self._segment.usable:
            raise self._segment.why_unusable()
        with self._lock:
            self._decisions.begin()
            control = self._words[self._at_control]
            if self._decisions.alone or control & PHASE_MASK not in AWAKE:
                self._decisions.wake(control >> WAVE_SHIFT & MAX_WAVE, receiver=None, ring=ring)
        if self._bookings.lost:
            self._bookings.heal()

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
            self._decisions.close()
            self._row.leave()
            self.board.close()
