"""A front-end's handle: reads all rows, chooses an engine, books the request, wakes a paused group.

Bookings are this front-end's ``sent[front-end, engine]``, counts that other front-ends read at once. They
heal by themselves. The front-end knows how many of its requests are unfinished at each engine, and
whatever is on its way is unfinished; so whenever a request ends, ``sent`` is clamped into
``[received, received + unfinished]``, and when nothing is on its way ``sent_tokens`` is set to
``received_tokens``. A request that was booked and never arrived, or that a predecessor in the same row
sent, leaves no lasting error.

`Frontend.route` never blocks and needs no event loop: it reads memory, and its wake-up goes into sockets
that drop what they cannot take: the ranks' doorbells (`dpshm.net.doorbell`), and one to the coordinator. A lost
wake-up does no harm: the engine that gets the request wakes the others.
"""

from __future__ import annotations

import logging
import operator
import os
import socket
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq
from numpy.typing import NDArray

from dpshm.board import layout
from dpshm.board.board import Board
from dpshm.board.segment import Segment
from dpshm.board.words import AWAKE, COUNT_MASK, DRAINED, MAX_PROMPT_TOKENS, PHASE_MASK, WAVE_SHIFT
from dpshm.errors import NoEngineAvailable, SettingError
from dpshm.frontend.decision_lock import DecisionLock
from dpshm.frontend.recorder import Recorder, default_path
from dpshm.frontend.row import take_row
from dpshm.linux.descriptors import explained
from dpshm.net import wire
from dpshm.net.context import Socket, context
from dpshm.net.doorbell import DoorbellClient
from dpshm.net.keys import ClientKeys, Folder, connect, keys_for
from dpshm.policies import Policy, Request, View, by_name, comparable, key_of
from dpshm.policies.columns import VECTOR_FROM, ArrayColumns, ArrayWork, ListColumns, ListWork
from dpshm.rules.liveness import Verdict
from dpshm.rules.waves import MAX_WAVE

logger = logging.getLogger(__name__)

_COUNT_MASK = COUNT_MASK
LOOK_INTERVAL_NS = 100_000_000
"""How often a deciding front-end looks at what it need not look at each time: see `Frontend._look`."""
TURN_STRIDE = 5
"""How far apart neighbouring front-ends begin to take turns; coprime to the usual numbers of ranks."""


class Route(msgspec.Struct, eq=False):
    """One booked request.

    Attributes:
        dp_rank: the engine that takes it.
        wave: the wave to stamp it with.
        prompt_tokens: what was booked.
    """

    _frontend: Frontend
    dp_rank: int
    wave: int
    prompt_tokens: int
    _open: bool = True

    def done(self) -> None:
        """The request finished, was aborted or was refused. A second call does nothing."""
        self._frontend._end(self, unbook=False)

    def cancel(self) -> None:
        """The request was never sent: takes the booking back. A second call does nothing."""
        self._frontend._end(self, unbook=True)

    def __repr__(self) -> str:
        return f"Route(dp_rank={self.dp_rank}, wave={self.wave}, prompt_tokens={self.prompt_tokens})"


class Frontend:
    """A row of the board and what an API server does with it. Safe to use from several threads.

    Attributes:
        index: the row; requests are stamped with it, so that engines can count them.
        owner: the name under which the row was taken.
        board: the board, for whoever wants to look closer.
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
        keys: ClientKeys | None = None,
    ) -> None:
        self.board = board
        self.index = index
        self.owner = owner
        self._only = None if ranks is None else frozenset(ranks)
        self._policy = policy
        self._segment = board.segment
        # Reentrant: the collector, or a signal, may end a request in the thread that is routing one.
        self._lock = threading.RLock()
        self._wake_socket: Socket | None = None
        self._ringer: DoorbellClient | None = None
        self._rung = -1  # the wave for which the ranks were rung last
        self._keys = keys
        self._warned_unlinked = False

        words = self._words = board.words
        self._at_revision = board.index("revision")
        self._at_control = board.index("control")
        self._at_beat = board.index("frontend_beat", index)
        self._at_pid = board.index("frontend_pid", index)
        self._at_routed = board.index("routed", index)
        self._at_sent_requests = board.index("sent_requests", index)
        self._at_sent_tokens = board.index("sent_tokens", index)
        self._at_received_requests = [board.index("received_requests", e, index) for e in range(board.engines)]
        self._at_received_tokens = [board.index("received_tokens", e, index) for e in range(board.engines)]

        # This front-end's own counts; the board holds copies that only it writes.
        self._sent_requests = [words[self._at_sent_requests + e] & _COUNT_MASK for e in range(board.engines)]
        self._sent_tokens = [words[self._at_sent_tokens + e] & _COUNT_MASK for e in range(board.engines)]
        self._own = [0] * board.engines
        self._routed = words[self._at_routed] & _COUNT_MASK

        self._turn = index * TURN_STRIDE  # so that equal loads do not send all front-ends to one engine
        self._next_look_ns = 0
        self._sees_work = bool(getattr(policy, "sees_work", False))
        self._turnstile = DecisionLock(board.segment) if exclusive else None
        self._recorder: Recorder | None = None
        self._refresh()

    @classmethod
    @explained()
    def attach(
        cls,
        group: str,
        *,
        owner: str | None = None,
        ranks: Iterable[int] | None = None,
        policy: str | Policy = "least_loaded",
        exclusive: bool = False,
        record: bool | str | Path = False,
        curve_dir: Folder | None = None,
    ) -> Frontend:
        """Takes a front-end's row of a group.

        Args:
            group: the group's name.
            owner: a name for this front-end, at most 48 bytes, by which engines can find its row; a restart
                under the same name gets the same row back if nothing of its predecessor is on its way.
                Default: host and pid.
            ranks: the only ranks that it may choose (hybrid and external load balancing); default all.
            policy: a name from `dpshm.policies.NAMES`, with parameters if you like (``affinity:epsilon=0.5``), or
                a callable ``(view, request) -> dp_rank``.
            exclusive: reads, decides and books under one kernel lock of the group, so that no two front-ends that
                ask for it ever choose from the same state (`dpshm.frontend.decision_lock`).
            record: keeps the newest decisions in a ring in shared memory, for ``dpshm replay``: a file's name, or
                True for one that goes with the group (`dpshm.frontend.recorder`).
            curve_dir: folder of the group's keys, where its sockets ask for them; default: the environment's
                ``DPSHM_CURVE_DIR``.

        Raises:
            SegmentNotFound: there is no such group on this node.
            CapacityExceeded: every front-end row is taken.
            SettingError: an argument cannot be used.
        """
        chosen = by_name(policy) if isinstance(policy, str) else policy
        name = f"{socket.gethostname()[:32]}:{os.getpid()}" if owner is None else owner
        encoded = name.encode()
        if len(encoded) > layout.OWNER_BYTES or "\0" in name:
            raise SettingError(f"owner {name!r} must be at most {layout.OWNER_BYTES} bytes, none of them zero")
        board = Board(Segment.attach(group))
        try:
            only = None if ranks is None else sorted(set(ranks))
            if only is not None and not (only and only[0] >= 0 and only[-1] < board.engines):
                raise SettingError(f"ranks {only} must be some of 0 to {board.engines - 1}")
            keys = keys_for(board.segment.header, curve_dir)
            index = take_row(board, encoded)
            frontend = cls(board, index, name, only, chosen, exclusive=exclusive, keys=keys)
            # Whoever decides looks again when marks change: from now on, all count this one's bookings.
            board.wait_for_coordinator(lambda: board.frontend_mark[index] == Verdict.ALIVE)
            if record is not False:
                path = default_path(group, index) if record is True else Path(record)
                frontend._recorder = Recorder.create(path, engines=board.engines, group=group, frontend=index)
        except BaseException:
            board.close()
            raise
        return frontend

    def route(
        self,
        prompt_tokens: int = 0,
        *,
        dp_rank: int | None = None,
        key: int | str | bytes | None = None,
        wake: bool = True,
    ) -> Route:
        """Chooses an engine, books the request on it, and wakes the group if it is paused.

        Args:
            prompt_tokens: as the engine will count them in its `receive`.
            dp_rank: the engine that it has to go to; drained and stalled ones may be named, dead ones not.
            key: what the policy `affinity` keeps on one rank: a conversation's id, or a prompt's first bytes.
            wake: False leaves paused ranks asleep; call `wake` once the request is sent. For engines that go back
                to sleep when they wake up before their request has come.

        Raises:
            NoEngineAvailable: there is no engine to take it. Nothing was booked.
            SettingError: `dp_rank`, or the policy's choice, is not one that this front-end may choose.
        """
        prompt_tokens = min(operator.index(prompt_tokens), MAX_PROMPT_TOKENS)
        self._check()  # here too: in a forked child the lock may be held for ever
        words = self._words
        with self._lock:
            self._check()
            now_ns = time.monotonic_ns()
            if now_ns >= self._next_look_ns:
                self._look(now_ns)
            if words[self._at_revision] != self._revision:
                self._refresh()
            exclusive = self._turnstile is not None and self._turnstile.enter()
            try:
                if dp_rank is None:
                    dp_rank = self._choose(prompt_tokens, key, now_ns)
                else:
                    self._check_pinned(dp_rank)
                # SYNC: requests and tokens are each one store; a reader between them sees the request without its
                # tokens for an instant. A predecessor's late message may have made the engine count more than was
                # sent: the booking starts from what it counted, or it would not show.
                received = words[self._at_received_requests[dp_rank]] & _COUNT_MASK
                sent = self._sent_requests[dp_rank]
                self._sent_requests[dp_rank] = sent = (sent if sent > received else received) + 1
                words[self._at_sent_requests + dp_rank] = sent
                if prompt_tokens > 0:
                    received = words[self._at_received_tokens[dp_rank]] & _COUNT_MASK
                    sent = self._sent_tokens[dp_rank]
                    self._sent_tokens[dp_rank] = sent = (sent if sent > received else received) + prompt_tokens
                    words[self._at_sent_tokens + dp_rank] = sent
                self._own[dp_rank] += 1
                self._routed += 1
                words[self._at_routed] = self._routed
                words[self._at_beat] = now_ns
            finally:
                if exclusive:
                    self._turnstile.leave()  # type: ignore[union-attr]
            # SYNC: booked first, then looked at the phase. If the load moved before the stores (x86 lets a
            # load pass an older store), the worst is a wake-up too few or too many; the engine wakes the rest.
            control = words[self._at_control]
            wave = control >> WAVE_SHIFT & MAX_WAVE
            if wake and control & PHASE_MASK not in AWAKE:
                self._wake(dp_rank, wave)
        return Route(self, dp_rank, wave, prompt_tokens)

    def choose(self, prompt_tokens: int = 0, *, key: int | str | bytes | None = None) -> int:
        """The engine that `route` would choose now. Books nothing and wakes nobody.

        Raises:
            NoEngineAvailable: there is none.
        """
        self._check()
        with self._lock:
            self._check()
            now_ns = time.monotonic_ns()
            if now_ns >= self._next_look_ns:
                self._look(now_ns)
            if self._words[self._at_revision] != self._revision:
                self._refresh()
            return self._choose(min(operator.index(prompt_tokens), MAX_PROMPT_TOKENS), key, now_ns)

    def wake(self) -> None:
        """Wakes the ranks if they are paused: for a request that is sent without `route`."""
        self._check()
        with self._lock:
            self._check()
            if self._words[self._at_revision] != self._revision:
                self._refresh()
            control = self._words[self._at_control]
            if control & PHASE_MASK not in AWAKE:
                self._wake(None, control >> WAVE_SHIFT & MAX_WAVE)

    def snapshot(self) -> NDArray[Any]:
        """What this front-end sees of each rank; see `dpshm.Board.snapshot`."""
        self._check()
        return self.board.snapshot(time.monotonic_ns())

    def close(self) -> None:
        """Gives the row up. What it has booked leaves the sums."""
        if self._segment.usable:  # in a forked child the lock may be held for ever
            with self._lock:
                self._leave()

    def _leave(self) -> None:
        if self._segment.usable:
            if self._wake_socket is not None:
                self._wake_socket.close()
                self._wake_socket = None
            if self._ringer is not None:
                self._ringer.close()
            if self._recorder is not None:
                self._recorder.close()
            self._words[self._at_pid] = 0  # left, not died
            self.board.close()

    def __enter__(self) -> Frontend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self) -> None:
        if not self._segment.usable:
            raise self._segment.why_unusable()

    def _choose(self, prompt_tokens: int, key: int | str | bytes | None, now_ns: int) -> int:
        eligible = self._eligible
        if not eligible:
            raise NoEngineAvailable(self._why_none())
        count = len(eligible)
        turn = self._turn = (self._turn + 1) % count
        request = Request(prompt_tokens, None if key is None else key_of(key))
        recorder = self._recorder
        beats = self._beats.tolist() if recorder is not None else []  # before the view, so that ages err upwards
        view = self._view(self._twice[turn : turn + count], now_ns)
        rank = self._policy(view, request)
        if rank not in eligible:
            raise SettingError(f"the policy chose rank {rank!r}, which is not one of {sorted(eligible)}")
        if recorder is not None:
            recorder.record(now_ns, view, request, int(rank), beats)
        return int(rank)

    def _view(self, ranks: Any, now_ns: int) -> View:
        n, frontends = self._num_engines, self._num_frontends
        own = self._own if len(self._own) == n else self._own[:n]
        if n >= VECTOR_FROM:
            many = self._many_work(now_ns) if self._sees_work else None
            requests = self._requests.count()
            return View(ArrayColumns(ranks, np.positive(self._load), requests, own, frontends, many))
        few = self._few_work(now_ns) if self._sees_work else None
        counts = self._requests.count().tolist()
        return View(ListColumns(ranks, self._load_words.tolist(), counts, own, frontends, few))

    def _few_work(self, now_ns: int) -> ListWork:
        return ListWork(self._tokens.count().tolist(), self._steps.tolist(), self._models, now_ns)

    def _many_work(self, now_ns: int) -> ArrayWork:
        return ArrayWork(self._tokens.count(), np.positive(self._steps), self._models, now_ns)

    def _refresh(self) -> None:
        """Works out again who may be chosen and whose bookings count."""
        board = self.board
        # SYNC: the revision before what it stands for: see `dpshm.coordinator.row`.
        self._revision = self._words[self._at_revision]
        n = self._num_engines = board.dp_size
        if self._ringer is not None:
            self._ringer.expect(n)
        self._load = board.load[:n]
        at = board.index("load")
        self._load_words = self._words[at : at + n]  # the same words; of a few, this makes a list twice as fast
        self._beats = board.beat[:n]
        counted = board.counted_frontends()
        self._num_frontends = len(counted)
        self._requests = board.outstanding_requests(counted)
        if self._sees_work:
            self._tokens = board.outstanding_tokens(counted)
            self._steps = board.step_model[:n, : len(layout.STEP_WORDS)]
            models = board.step_model[:n, len(layout.STEP_WORDS) :]
            # Copied here and not in each decision: what engines have learnt changes slowly.
            # Ranks that have waves step together.
            learnt = comparable(models.tolist(), lockstep=self._segment.header.waves)
            self._models: Any = np.array(learnt, np.int64, order="F") if n >= VECTOR_FROM else learnt
        self._verdicts = board.engine_verdicts()
        drained = [bool(mark & DRAINED) for mark in board.engine_mark[:n].tolist()]
        eligible = [
            e
            for e, verdict in enumerate(self._verdicts)
            if verdict is Verdict.ALIVE and not drained[e] and (self._only is None or e in self._only)
        ]
        self._eligible = frozenset(eligible)
        # Twice over: each slice of half its length is one rotation.
        self._twice: Any = np.array(eligible * 2) if n >= VECTOR_FROM else eligible * 2

    def _look(self, now_ns: int) -> None:
        """What need not be looked at in every decision: whether a coordinator still sets marks, and the file."""
        self._next_look_ns = now_ns + LOOK_INTERVAL_NS
        if not self._warned_unlinked and not self._segment.linked:
            self._warned_unlinked = True
            logger.warning(
                "the segment of group %r was unlinked under it: routing goes on, but nobody can attach any more. "
                "Restart the group; something cleans %s",
                self._segment.group,
                self._segment.path.parent,
            )
        self._refresh()

    def _check_pinned(self, dp_rank: int) -> None:
        if not 0 <= dp_rank < self._num_engines or (self._only is not None and dp_rank not in self._only):
            allowed = sorted(self._only) if self._only is not None else f"0 to {self._num_engines - 1}"
            raise SettingError(f"dp_rank {dp_rank} is not one that this front-end may choose: {allowed}")
        verdict = self._verdicts[dp_rank]
        if verdict not in (Verdict.ALIVE, Verdict.STALLED):
            raise NoEngineAvailable(
                f"engine {dp_rank} of group {self._segment.group!r}, to which the request is pinned, is "
                f"{verdict.name.lower()}"
            )

    def _why_none(self) -> str:
        states = ", ".join(f"{row['dp_rank']} {row['state']}" for row in self.board.snapshot())
        only = "" if self._only is None else f"; this front-end may choose {sorted(self._only)} alone"
        return f"no engine of group {self._segment.group!r} may be chosen: {states or 'there are none'}{only}"

    def _wake(self, dp_rank: int | None, wave: int) -> None:
        if not self._segment.header.waves:
            return
        try:
            if wave != self._rung and self._segment.linked:
                if self._ringer is None:
                    self._ringer = DoorbellClient(self._segment.sockets_path, self.board.dp_size)
                self._ringer.ring(wave, leave_out=dp_rank)
                self._rung = wave
        except OSError as e:  # no descriptor for a socket
            logger.warning("could not ring the ranks: %s; the coordinator will wake them", e)
        try:
            if self._wake_socket is None:
                # An XSUB that subscribes to nothing: it speaks upstream, and nothing is published to it.
                wake = context().socket(zmq.XSUB)
                wake.linger = 0
                wake.reconnect_ivl = 50
                connect(wake, self._segment.header.stats_address, self._keys)
                self._wake_socket = wake
            self._wake_socket.send(wire.encode_first_request(dp_rank, wave), zmq.NOBLOCK)
        except (OSError, zmq.ZMQError) as e:  # no descriptor for a socket, or no room in it
            logger.warning("could not send a wake-up: %s; the engine will wake the others", e)

    def _end(self, route: Route, *, unbook: bool) -> None:
        if not self._segment.usable:
            return
        with self._lock:
            if not route._open or not self._segment.usable:
                return
            route._open = False
            e = route.dp_rank
            self._own[e] -= 1
            if unbook:
                self._sent_requests[e] -= 1
                self._sent_tokens[e] -= max(0, route.prompt_tokens)
            self._settle(e)

    def _settle(self, e: int) -> None:
        """Clamps this front-end's counts for an engine to what can be true: rule 3."""
        words = self._words
        # SYNC: received requests are loaded before received tokens, and the engine stores them the other way
        # round: once its request count equals ours, the token count that we load is complete.
        received = words[self._at_received_requests[e]] & _COUNT_MASK
        sent = self._sent_requests[e]
        settled = max(received, min(sent, received + self._own[e]))
        self._sent_requests[e] = words[self._at_sent_requests + e] = settled
        received_tokens = words[self._at_received_tokens[e]] & _COUNT_MASK
        tokens = received_tokens if settled == received else max(self._sent_tokens[e], received_tokens)
        self._sent_tokens[e] = words[self._at_sent_tokens + e] = tokens
