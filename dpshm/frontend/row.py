"""A front-end's row of the board: how it is locked and initialised, and the words that a front-end alone writes.

`FrontendRow` holds a front-end's bookings: ``sent[front-end, engine]``, counts that other front-ends read at once.
The counts heal (rule 3). A front-end knows how many of its requests are unfinished at each engine, and a request
in flight is unfinished. So each end of a request clamps ``sent`` into ``[received, received + unfinished]``, and
sets ``sent_tokens`` to ``received_tokens`` when no request is in flight. A request that was booked and never
arrived, or that the row's previous holder sent, leaves no lasting error.

The row of an engine on another node, or of a stock one, shows late what the engine received. A request that ended
there a moment ago may still be in flight as far as the row shows. So it counts as unfinished for a while: until a
row was heard `LATE_NS` later.

A front-end that starts copies ``received`` into ``sent``: the bookings of the row's previous holder are settled.
Engines would count that holder's messages that are still in flight as if the new one had sent them, so rows
whose previous holder has no message in flight are locked first.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from dpshm.board import layout
from dpshm.board.board import Board
from dpshm.board.words import COUNT_MASK
from dpshm.errors import CapacityExceeded, RowInUse
from dpshm.linux import processes
from dpshm.version import version_word

if TYPE_CHECKING:
    from dpshm.frontend.route import Route


LATE_NS = 1_000_000_000
"""A row that is heard so long after a request's end shows that it was received."""


class FrontendRow:
    """The words of one front-end's row. Its calls are made under the front-end's lock.

    `book` and `end` contain no call and no loop. CPython runs signal handlers and the collector at calls and at
    backward jumps alone (3.11's collector also where a container is made; none is). So a handler or a finalizer
    that ends another request in the thread that is booking runs before or after the booking, never within it. And
    if a handler raises, the counts and the Route agree: both are booked, or neither is.

    Attributes:
        own: unfinished requests of this front-end, by rank.
    """

    def __init__(self, board: Board, index: int) -> None:
        words = self._words = board.words
        ranks = range(board.engines)
        self._at_pid = board.index("frontend_pid", index)
        self._at_beat = board.index("frontend_beat", index)
        self._at_routed = board.index("routed", index)
        self._at_sent_requests = board.index("sent_requests", index)
        self._at_sent_tokens = board.index("sent_tokens", index)
        self._at_received_requests = [board.index("received_requests", e, index) for e in ranks]
        self._at_received_tokens = [board.index("received_tokens", e, index) for e in ranks]
        # This front-end's own counts. The board holds copies, which no other process writes.
        self._sent_requests = [words[self._at_sent_requests + e] & COUNT_MASK for e in ranks]
        self._sent_tokens = [words[self._at_sent_tokens + e] & COUNT_MASK for e in ranks]
        self._routed = self._routed_before = words[self._at_routed] & COUNT_MASK
        self.own = [0] * board.engines
        # Ranks whose rows come late, and by rank: requests that ended lately and those before them, since when.
        self._late: frozenset[int] = frozenset()
        self._ended, self._ended_before = [0] * board.engines, [0] * board.engines
        self._ended_since_ns = [0] * board.engines

    def follow_late(self, heard_ns: Mapping[int, int]) -> None:
        """Learns which ranks' rows come late, and forgets what ended there long enough ago.

        Args:
            heard_ns: by rank whose row comes late, CLOCK_MONOTONIC at which it was heard last.
        """
        self._late = frozenset(heard_ns)
        for dp_rank, heard in heard_ns.items():
            if heard - self._ended_since_ns[dp_rank] >= LATE_NS:
                self._ended_since_ns[dp_rank] = time.monotonic_ns()
                self._ended_before[dp_rank], self._ended[dp_rank] = self._ended[dp_rank], 0
                if not (self.own[dp_rank] or self._ended_before[dp_rank]):
                    self._settle(dp_rank)

    def _settle(self, dp_rank: int) -> None:
        """Nothing is in flight to a rank: what was booked and not received was lost."""
        words = self._words
        received = words[self._at_received_requests[dp_rank]] & COUNT_MASK
        received_tokens = words[self._at_received_tokens[dp_rank]] & COUNT_MASK
        self._sent_requests[dp_rank] = words[self._at_sent_requests + dp_rank] = received
        self._sent_tokens[dp_rank] = words[self._at_sent_tokens + dp_rank] = received_tokens

    def book(self, route: Route, now_ns: int) -> None:
        """Counts a request that is about to be sent to an engine, and opens its Route.

        Args:
            route: where it goes. Its `prompt_tokens` are at most `MAX_PROMPT_TOKENS`; fewer than 0 count as 0.
            now_ns: CLOCK_MONOTONIC.
        """
        dp_rank, prompt_tokens = route.dp_rank, route.prompt_tokens
        words = self._words
        # SYNC: requests and tokens are one store each; a reader between them sees the request without its tokens
        # for an instant. An engine that received a late message of the previous holder has counted more than was
        # sent: the booking starts from the engine's count, or it would not show.
        received = words[self._at_received_requests[dp_rank]] & COUNT_MASK
        sent = self._sent_requests[dp_rank]
        self._sent_requests[dp_rank] = sent = (sent if sent > received else received) + 1
        words[self._at_sent_requests + dp_rank] = sent
        if prompt_tokens > 0:
            received = words[self._at_received_tokens[dp_rank]] & COUNT_MASK
            sent = self._sent_tokens[dp_rank]
            self._sent_tokens[dp_rank] = sent = (sent if sent > received else received) + prompt_tokens
            words[self._at_sent_tokens + dp_rank] = sent
        self.own[dp_rank] += 1
        route.booked_ns = now_ns
        route.open = True
        self._routed += 1
        words[self._at_routed] = self._routed
        words[self._at_beat] = now_ns

    def end(self, route: Route, *, unbook: bool = False) -> None:
        """Closes a Route and counts its request as ended, once: clamps ``sent`` (rule 3).

        ``sent`` comes into [received, received + unfinished], whether or not the engine received the request.

        Args:
            route: of the request; nothing happens if it is closed.
            unbook: the request was not sent.
        """
        if not route.open:
            return
        words, dp_rank, own = self._words, route.dp_rank, self.own[route.dp_rank] - 1
        # SYNC: received requests are loaded before received tokens, and the engine stores them the other way round
        # (`EngineRow.count_received`): once its request count equals ours, the loaded token count is complete.
        received = words[self._at_received_requests[dp_rank]] & COUNT_MASK
        received_tokens = words[self._at_received_tokens[dp_rank]] & COUNT_MASK
        sent, most, tokens = self._sent_requests[dp_rank], received + own, self._sent_tokens[dp_rank]
        if dp_rank in self._late:
            self._ended[dp_rank] += 1
            most += self._ended[dp_rank] + self._ended_before[dp_rank]
        if unbook:
            sent -= 1
            if route.prompt_tokens > 0:
                tokens -= route.prompt_tokens
        sent = most if sent > most else sent
        sent = received if sent < received else sent
        if sent == received or tokens < received_tokens:
            tokens = received_tokens
        route.open = False
        self.own[dp_rank] = own
        self._sent_requests[dp_rank] = words[self._at_sent_requests + dp_rank] = sent
        self._sent_tokens[dp_rank] = words[self._at_sent_tokens + dp_rank] = tokens

    @property
    def routed(self) -> int:
        """How many requests this holder of the row has routed."""
        return self._routed - self._routed_before

    def leave(self) -> None:
        """Marks the row as left, so that no watcher takes its process for one that died."""
        self._words[self._at_pid] = 0


def lock_row(board: Board, owner: bytes) -> int:
    """Locks and initialises a row; returns its index.

    First choice is a row of the same owner, then the lowest free one; in either case a row whose previous holder
    has no message in flight, if there is one. Low rows are best: readers sum all rows up to the highest.

    Raises:
        CapacityExceeded: every row is locked.
    """
    used = board.frontends_used()
    padded = owner.ljust(layout.OWNER_BYTES, b"\0")
    own = range(board.node, board.frontends, board.nodes)
    same = [f for f in own if f < used and board.owner[f].tobytes() == padded]
    rest = [f for f in own if f not in same]
    for anything in (False, True):
        for f in [*same, *rest]:
            if (anything or _is_settled(board, f)) and board.lock_frontend(f):
                _initialise(board, f, padded)
                return f
    raise CapacityExceeded(
        f"all {len(own)} front-end rows of group {board.segment.group!r} are taken: start its "
        "coordinator with a larger max_frontends"
    )


def _is_settled(board: Board, f: int) -> bool:
    """Whether nothing that this row's holders sent can still be in flight to a live engine."""
    behind = np.flatnonzero(board.sent_requests[f] > board.received_requests[:, f])
    return not any(board.engine_present(int(e)) for e in behind)


def _initialise(board: Board, f: int, owner: bytes) -> None:
    words = board.words
    if not board.segment.linked:
        raise RowInUse(f"group {board.segment.group!r} ended while this front-end attached; try again")
    for e in range(board.engines):
        words[board.index("sent_tokens", f, e)] = words[board.index("received_tokens", e, f)] & COUNT_MASK
        words[board.index("sent_requests", f, e)] = words[board.index("received_requests", e, f)] & COUNT_MASK
    for i in range(len(owner) // layout.WORD_BYTES):
        part = owner[i * layout.WORD_BYTES : (i + 1) * layout.WORD_BYTES]
        words[board.index("owner", f, i)] = int.from_bytes(part, "little", signed=True)
    pid = os.getpid()
    words[board.index("frontend_pid", f)] = pid
    words[board.index("frontend_start_time", f)] = processes.start_time(pid)
    words[board.index("frontend_pid_namespace", f)] = processes.namespace_inode("pid")
    words[board.index("frontend_version", f)] = version_word()
    words[board.index("frontend_beat", f)] = time.monotonic_ns()
    # SYNC: publication. The incarnation is stored last: a reader of the new incarnation reads this owner and pid.
    # (On Arm a reader may see it first; the watcher, for one, reads the row again in its next round.)
    at = board.index("frontend_incarnation", f)
    words[at] = (words[at] & COUNT_MASK) + 1
