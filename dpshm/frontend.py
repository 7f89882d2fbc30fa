"""A front-end's handle: reads all rows, chooses an engine, books the request, wakes a paused group.

Bookings are this front-end's ``sent[front-end, engine]``, counts that other front-ends read at once. They
heal by themselves. The front-end knows how many of its requests are unfinished at each engine, and
whatever is on its way is unfinished; so whenever a request ends, ``sent`` is clamped into
``[received, received + unfinished]``, and when nothing is on its way ``sent_tokens`` is set to
``received_tokens``. A request that was booked and never arrived, or that a predecessor in the same row
sent, leaves no lasting error.

`Frontend.route` never blocks and needs no event loop: it reads memory, and its wake-up goes into a socket
that drops what it cannot take. A lost wake-up does no harm: the engine that gets the request wakes the
others.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterable
from operator import sub
from typing import Any

import msgspec
import numpy as np
import zmq
from numpy.typing import NDArray

from dpshm import layout, procs, wire
from dpshm.board import NO_WORDS, Board, count_unseen
from dpshm.context import Socket, context
from dpshm.errors import CapacityExceeded, NoEngineAvailable, RowInUse, SettingError
from dpshm.liveness import Verdict
from dpshm.policies import VECTOR_FROM, Policy, Request, View, by_name
from dpshm.segment import Segment
from dpshm.waves import Phase

logger = logging.getLogger(__name__)

LOOK_INTERVAL_NS = 100_000_000
"""How often a deciding front-end looks at what it need not look at each time: see `Frontend._look`."""
TURN_STRIDE = 5
"""How far apart neighbouring front-ends begin to take turns; coprime to the usual numbers of ranks."""
COORDINATOR_SILENCE_NS = 500_000_000
"""A coordinator whose beat is older may be gone; its lock then tells."""


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

    def __init__(self, board: Board, index: int, owner: str, ranks: Iterable[int] | None, policy: Policy) -> None:
        self.board = board
        self.index = index
        self.owner = owner
        self._only = None if ranks is None else frozenset(ranks)
        self._policy = policy
        self._segment = board.segment
        self._lock = threading.Lock()
        self._wake_socket: Socket | None = None
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
        self._sent_requests = [words[self._at_sent_requests + e] for e in range(board.engines)]
        self._sent_tokens = [words[self._at_sent_tokens + e] for e in range(board.engines)]
        self._own = [0] * board.engines
        self._routed = words[self._at_routed]

        self._turn = index * TURN_STRIDE  # so that equal loads do not send all front-ends to one engine
        self._next_look_ns = 0
        self._alone: tuple[frozenset[int], frozenset[int]] | None = None
        self._refresh()

    @classmethod
    def attach(
        cls,
        group: str,
        *,
        owner: str | None = None,
        ranks: Iterable[int] | None = None,
        policy: str | Policy = "least_loaded",
    ) -> Frontend:
        """Takes a front-end's row of a group.

        Args:
            group: the group's name.
            owner: a name for this front-end, at most 48 bytes, by which engines can find its row; a restart
                under the same name gets the same row back if nothing of its predecessor is on its way.
                Default: host and pid.
            ranks: the only ranks that it may choose (hybrid and external load balancing); default all.
            policy: a name from `dpshm.policies.NAMES`, or a callable ``(view, request) -> dp_rank``.

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
            index = _take_row(board, encoded)
            frontend = cls(board, index, name, only, chosen)
            # A predecessor's verdict would hide this one's bookings until the watcher's next round.
            board.wait_for_coordinator(lambda: board.frontend_mark[index] & layout.VERDICT_MASK != Verdict.DEAD)
        except BaseException:
            board.close()
            raise
        return frontend

    def route(self, prompt_tokens: int = 0, *, dp_rank: int | None = None) -> Route:
        """Chooses an engine, books the request on it, and wakes the group if it is paused.

        Args:
            prompt_tokens: as the engine will count them in its `receive`.
            dp_rank: the engine that it has to go to; drained and stalled ones may be named, dead ones not.

        Raises:
            NoEngineAvailable: there is no engine to take it. Nothing was booked.
            SettingError: `dp_rank`, or the policy's choice, is not one that this front-end may choose.
        """
        if not self._segment.usable:
            raise self._segment.why_unusable()
        words = self._words
        with self._lock:
            now_ns = time.monotonic_ns()
            if now_ns >= self._next_look_ns:
                self._look(now_ns)
            if words[self._at_revision] != self._revision:
                self._refresh()
            if dp_rank is None:
                dp_rank = self._choose(prompt_tokens)
            else:
                self._check_pinned(dp_rank)
            # SYNC: requests before tokens does not matter here: both are counts of what may still be on its
            # way, each one store; a reader between them sees the request without its tokens for an instant.
            requests = self._sent_requests[dp_rank] = self._sent_requests[dp_rank] + 1
            words[self._at_sent_requests + dp_rank] = requests
            if prompt_tokens > 0:
                tokens = self._sent_tokens[dp_rank] = self._sent_tokens[dp_rank] + prompt_tokens
                words[self._at_sent_tokens + dp_rank] = tokens
            self._own[dp_rank] += 1
            self._routed += 1
            words[self._at_routed] = self._routed
            words[self._at_beat] = now_ns
            # SYNC: booked first, then looked at the phase. If the load moved before the stores (x86 lets a
            # load pass an older store), the worst is a wake-up too few or too many; the engine wakes the rest.
            control = words[self._at_control]
            wave = control >> 2
            if control & 3 == Phase.PAUSED:
                self._wake(dp_rank, wave)
        return Route(self, dp_rank, wave, prompt_tokens)

    def snapshot(self) -> NDArray[Any]:
        """What this front-end sees of each rank; see `dpshm.Board.snapshot`."""
        if not self._segment.usable:
            raise self._segment.why_unusable()
        return self.board.snapshot(time.monotonic_ns())

    def close(self) -> None:
        """Gives the row up. What it has booked leaves the sums."""
        with self._lock:
            if not self._segment.usable:
                return
            if self._wake_socket is not None:
                self._wake_socket.close()
            self._words[self._at_pid] = 0  # left, not died
            self._sent = self._received = self._load = NO_WORDS
            self.board.close()

    def __enter__(self) -> Frontend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _choose(self, prompt_tokens: int) -> int:
        eligible = self._eligible
        if not eligible:
            raise NoEngineAvailable(self._why_none())
        count = len(eligible)
        turn = self._turn = (self._turn + 1) % count
        rank = self._policy(self._view(self._twice[turn : turn + count]), Request(prompt_tokens))
        if rank not in eligible:
            raise SettingError(f"the policy chose rank {rank!r}, which is not one of {sorted(eligible)}")
        return int(rank)

    def _view(self, ranks: Any) -> View:
        counted = self._counted
        if self._num_engines >= VECTOR_FROM:
            # SYNC: rule 3, see below; count_unseen copies `sent` before it reads `received`.
            behind = count_unseen(self._sent, self._received, counted, self._num_engines)
            return View(ranks, np.positive(self._load), behind, self._own, len(counted))
        # SYNC: rule 3: all of `sent`, then all of `received`, then `load`: the other way round than an engine
        # stores. Each tolist() is a call that has loaded every word, one 64-bit access each, when it returns.
        sent = self._sent.tolist()
        received = self._received.T.tolist()
        load = self._load.tolist()
        unseen = [0] * self._num_engines
        for f in counted:
            if sent[f] != received[f]:  # most rows are equal: little is on its way at any instant
                for e, difference in enumerate(map(sub, sent[f], received[f])):
                    if difference > 0:
                        unseen[e] += difference
        return View(ranks, load, unseen, self._own, len(counted))

    def _refresh(self) -> None:
        """Works out again who may be chosen and whose bookings count."""
        board = self.board
        # SYNC: the revision before what it stands for: see `dpshm.marks`.
        self._revision = self._words[self._at_revision]
        n = self._num_engines = board.dp_size
        used = max(board.frontends_used(), self.index + 1)
        self._engine_marks = board.engine_mark[:n].tolist()
        marks = board.frontend_mark[:used].tolist()
        self._sent = board.sent_requests[:used, :n]
        self._received = board.received_requests[:n, :used]
        self._load = board.load[:n]
        alone = self._alone
        self._counted = [
            f
            for f, mark in enumerate(marks)
            if f == self.index or (mark == Verdict.ALIVE if alone is None else f in alone[1])
        ]
        eligible = [e for e in range(n) if self._may_choose(e)]
        self._eligible = frozenset(eligible)
        # Twice over: each slice of half its length is one rotation.
        self._twice: Any = np.array(eligible * 2) if n >= VECTOR_FROM else eligible * 2

    def _look(self, now_ns: int) -> None:
        """What need not be looked at in every decision: who watches, the marks themselves, the file's name.

        Without a coordinator nobody sets verdicts, so this front-end tests the locks itself.
        """
        self._next_look_ns = now_ns + LOOK_INTERVAL_NS
        board = self.board
        if not self._warned_unlinked and not self._segment.linked:
            self._warned_unlinked = True
            logger.warning(
                "the segment of group %r was unlinked under it: routing goes on, but nobody can attach any more. "
                "Restart the group; something cleans %s",
                self._segment.group,
                self._segment.path.parent,
            )
        alone = None
        if now_ns - int(board.coordinator_beat[0]) > COORDINATOR_SILENCE_NS and not board.coordinator_alive():
            marks = board.engine_mark[: board.dp_size].tolist()
            alone = (
                frozenset(e for e, mark in enumerate(marks) if mark & layout.ON_BEHALF or board.engine_alive(e)),
                frozenset(f for f in range(board.frontends_used()) if board.frontend_alive(f)),
            )
        self._alone = alone
        self._refresh()

    def _is_there(self, e: int) -> bool:
        """Whether a rank's process lives, by the coordinator's verdict or, without one, by its lock."""
        verdict = self._engine_marks[e] & layout.VERDICT_MASK
        return verdict in (Verdict.ALIVE, Verdict.STALLED) if self._alone is None else e in self._alone[0]

    def _may_choose(self, e: int) -> bool:
        mark = self._engine_marks[e]
        return (
            (self._only is None or e in self._only)
            and not mark & layout.DRAINED
            and mark & layout.VERDICT_MASK != Verdict.STALLED
            and self._is_there(e)
        )

    def _check_pinned(self, dp_rank: int) -> None:
        if not 0 <= dp_rank < self._num_engines or (self._only is not None and dp_rank not in self._only):
            allowed = sorted(self._only) if self._only is not None else f"0 to {self._num_engines - 1}"
            raise SettingError(f"dp_rank {dp_rank} is not one that this front-end may choose: {allowed}")
        if not self._is_there(dp_rank):
            raise NoEngineAvailable(
                f"engine {dp_rank} of group {self._segment.group!r}, to which the request is pinned, is not there"
            )

    def _why_none(self) -> str:
        states = ", ".join(f"{row['dp_rank']} {row['state']}" for row in self.board.snapshot())
        only = "" if self._only is None else f"; this front-end may choose {sorted(self._only)} alone"
        return f"no engine of group {self._segment.group!r} may be chosen: {states or 'there are none'}{only}"

    def _wake(self, dp_rank: int, wave: int) -> None:
        if not self._segment.header.settings.get("waves", True):
            return
        if self._wake_socket is None:
            # An XSUB that subscribes to nothing: it speaks upstream, and nothing is published to it.
            wake = context().socket(zmq.XSUB)
            wake.linger = 0
            wake.reconnect_ivl = 50
            wake.connect(self._segment.header.stats_address)
            self._wake_socket = wake
        try:
            self._wake_socket.send(wire.encode_first_request(dp_rank, wave), zmq.NOBLOCK)
        except zmq.ZMQError as e:
            logger.warning("could not send a wake-up: %s; the engine will wake the others", e)

    def _end(self, route: Route, *, unbook: bool) -> None:
        if not self._segment.usable:
            route._open = False
            return
        with self._lock:
            if not route._open:
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
        received = words[self._at_received_requests[e]]
        sent = self._sent_requests[e]
        settled = max(received, min(sent, received + self._own[e]))
        self._sent_requests[e] = words[self._at_sent_requests + e] = settled
        received_tokens = words[self._at_received_tokens[e]]
        tokens = received_tokens if settled == received else max(self._sent_tokens[e], received_tokens)
        self._sent_tokens[e] = words[self._at_sent_tokens + e] = tokens


def _take_row(board: Board, owner: bytes) -> int:
    """Locks and initialises a row; see `Frontend.attach` for which."""
    used = board.frontends_used()
    padded = owner.ljust(layout.OWNER_BYTES, b"\0")
    same = [f for f in range(used) if board.owner[f].tobytes() == padded]
    rest = [f for f in range(board.frontends) if f not in same]
    for anything in (False, True):
        for f in [*same, *rest]:
            if (anything or _is_settled(board, f)) and board.lock_frontend(f):
                _initialise(board, f, padded)
                return f
    raise CapacityExceeded(
        f"all {board.frontends} front-end rows of group {board.segment.group!r} are taken: start its "
        "coordinator with a larger max_frontends"
    )


def _is_settled(board: Board, f: int) -> bool:
    """Whether nothing that this row's holders sent can still be on its way to a live engine."""
    behind = np.flatnonzero(board.sent_requests[f] > board.received_requests[:, f])
    return not any(board.engine_alive(int(e)) for e in behind)


def _initialise(board: Board, f: int, owner: bytes) -> None:
    words = board.words
    if not board.segment.linked:
        raise RowInUse(f"group {board.segment.group!r} ended while this front-end attached; try again")
    for e in range(board.engines):
        words[board.index("sent_tokens", f, e)] = words[board.index("received_tokens", e, f)]
        words[board.index("sent_requests", f, e)] = words[board.index("received_requests", e, f)]
    for i in range(len(owner) // layout.WORD_BYTES):
        part = owner[i * layout.WORD_BYTES : (i + 1) * layout.WORD_BYTES]
        words[board.index("owner", f, i)] = int.from_bytes(part, "little", signed=True)
    pid = os.getpid()
    words[board.index("frontend_pid", f)] = pid
    words[board.index("frontend_start_time", f)] = procs.start_time(pid)
    words[board.index("frontend_pid_namespace", f)] = procs.namespace_inode("pid")
    words[board.index("frontend_beat", f)] = time.monotonic_ns()
    # SYNC: publication. The incarnation is stored last; whoever reads a new one reads this owner and pid.
    # (On Arm a reader may see it first; it then looks again on its next round, as the watcher does.)
    at = board.index("frontend_incarnation", f)
    words[at] = words[at] + 1
