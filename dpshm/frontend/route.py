"""A booked request, and how its booking ends: in any thread, in a signal handler, or in the collector.

`Route.done` and `Route.cancel` end a booking under the front-end's lock. The lock is reentrant, so they may be
called from a signal handler or a finalizer in the thread that holds it.

A Route that is collected while it is open gives its booking back as `Route.done` would, which is right whether or
not the request was sent. The collector may run in any thread, also in one that holds a lock for which the
front-end's lock holder waits. So a finalizer never waits and never logs: it notes the Route, and settles it only
if the lock is free. Otherwise the thread that holds the lock settles it after its release.

A signal handler may raise at any call within these functions. A Route is open exactly while its booking counts
(`FrontendRow.book` and `end` change both without a call between), so whatever is interrupted can be done again: by
the caller, by the collector, or by the next call.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import deque
from operator import index
from time import monotonic_ns
from types import TracebackType
from typing import Self

import msgspec

from dpshm.board.board import Board
from dpshm.board.latency import PER_TOKEN, QUEUE, TTFT, LatencyWriter, latency_path
from dpshm.errors import SegmentError, SettingError
from dpshm.frontend.row import FrontendRow

logger = logging.getLogger(__name__)

MAX_QUEUE_S = 1e6
"""Eleven days."""


class Bookings:
    """Ends the bookings of one front-end.

    Attributes:
        index: the number of the row.
        lock: held by each call that changes or reads the row.
        lost: a Route was collected while open since the last `heal`.
    """

    def __init__(self, board: Board, row: FrontendRow, index: int) -> None:
        self._board = board
        self._segment = board.segment
        self._row = row
        self.index = index
        self._latencies: LatencyWriter | None = None  # made when a first token comes
        self._measures = True
        self.lock = threading.RLock()
        self.lost = False
        self._collected: deque[Route] = deque()  # while open
        self._warned = False

    def end(self, route: Route, *, unbook: bool, output_tokens: int = 0) -> None:
        """Ends a booking, once. Does nothing if the front-end is closed, or in a forked child."""
        if not self._segment.usable:  # in a forked child the lock may be held for ever
            return
        with self.lock:
            if self._segment.usable:
                # There is room for the rank since its first token.
                if output_tokens > 1 and (first_ns := route.first_token_ns) and route.open:
                    took_ns = (monotonic_ns() - first_ns) // (output_tokens - 1)
                    if (latencies := self._latencies) is not None:
                        # `LatencyWriter.observe`, of the bucket that the rank's newest time fell into: without a
                        # call, because a server pays for it in every request.
                        above, most, at, total = latencies.newest[PER_TOKEN][route.dp_rank]
                        if above < took_ns <= most:
                            words, counts = latencies.words, latencies.counts
                            words[at] = counts[at] = counts[at] + 1
                            words[total] = counts[total] = counts[total] + took_ns
                        else:
                            latencies.observe(route.dp_rank, PER_TOKEN, took_ns)
                self._row.end(route, unbook=unbook)
        if self.lost:
            self.heal()

    def first_token(self, route: Route, queue_ns: int | None) -> None:
        """Counts how long a request's first token took, once. Does nothing where `end` does nothing."""
        if route.first_token_ns or not self._segment.usable:
            return
        now_ns = monotonic_ns()
        with self.lock:
            if self._segment.usable and route.open and not route.first_token_ns:
                route.first_token_ns = now_ns
                self._observe(route, TTFT, now_ns - route.booked_ns)
                if queue_ns is not None:
                    self._observe(route, QUEUE, queue_ns)
        if self.lost:
            self.heal()

    def _observe(self, route: Route, kind: int, took_ns: int) -> None:
        """Stores how long something took; without room for it in shared memory, never again."""
        if not self._measures:
            return
        try:
            if self._latencies is None:
                path = latency_path(self._segment.sockets_path, self.index)
                self._latencies = LatencyWriter(path, self._board.dp_size)
            self._latencies.observe(route.dp_rank, kind, took_ns)
        except SegmentError as e:
            self._measures, self._latencies = False, None
            logger.warning("front-end %d stores no more latencies: %s", self.index, e)

    def end_collected(self, route: Route) -> None:
        """Ends the booking of a Route that is collected while open. Never waits and never logs."""
        self.lost = True
        self._collected.append(route)  # it lives on until its booking is given back
        if not sys.is_finalizing():  # the row goes with the process
            self._settle_collected()

    def heal(self) -> None:
        """Ends the bookings of collected Routes, and warns once. Call it without the lock."""
        self.lost = False
        try:
            self._settle_collected()
        except BaseException:  # a signal handler raised
            self.lost = True
            raise
        if not self._warned:
            self._warned = True
            logger.warning(
                "a Route of group %r was collected while open, and its booking was given back: call route.done() "
                "or route.cancel(), or use `with frontend.route(...) as route:`. Further ones are not logged",
                self._segment.group,
            )

    def _settle_collected(self) -> None:
        # SYNC: partner of each `if lost: heal()`, which comes after a release of the lock. `lost` is set before
        # the lock is tried: if another thread holds it, that thread finds `lost` set after its release.
        if self.lock.acquire(blocking=False):
            try:
                while self._collected:
                    route = self._collected[0]
                    if self._segment.usable:
                        self._row.end(route)
                    # A finalizer that ran in this thread meanwhile has settled this one and others.
                    if self._collected and self._collected[0] is route:
                        self._collected.popleft()
            finally:
                self.lock.release()


class Route(msgspec.Struct, eq=False):
    """One booked request, from `dpshm.Frontend.route`. Keep it until the request ends.

    Call `done` or `cancel`, or use it as a context, which ends the booking when the block is left:

        with frontend.route(prompt_tokens=512) as route:
            send(request, route.stamp, to=route.dp_rank)
            route.sent()
            wait_for_answer(request)

    An exception that leaves the block before `sent` was called cancels the booking; after it, or without an
    exception, the booking is done. A Route that is collected while open gives its booking back, with a warning.

    Attributes:
        dp_rank: the engine that takes the request.
        wave: the wave in which the request was sent.
        prompt_tokens: the prompt tokens that were booked: those that are expected to be computed.
        cached_tokens: the prompt tokens that the engine is expected to find in its cache.
        open: whether the booking counts: neither `done` nor `cancel` was called.
        booked_ns: when it was booked, CLOCK_MONOTONIC.
        first_token_ns: when `first_token` was called; 0 before.
    """

    _bookings: Bookings
    dp_rank: int = -1
    wave: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    open: bool = False
    booked_ns: int = 0
    first_token_ns: int = 0
    _was_sent: bool = False

    @property
    def stamp(self) -> tuple[int, int, int]:
        """What travels with the request, for `Engine.receive`: front-end, booked prompt tokens, wave.

        JSON, msgpack and pickle carry it. `Engine.receive` takes it as a list, too.
        """
        return self._bookings.index, self.prompt_tokens, self.wave

    def sent(self) -> None:
        """The request was sent: from now on an exception that leaves the block does not cancel the booking."""
        self._was_sent = True

    def first_token(self, queue_s: float | None = None) -> None:
        """The request's first token came: stores the time since the booking in the rank's histogram.

        Optional. A second call does nothing, so it may be called with each token.

        Args:
            queue_s: how long the request waited in the engine's queue, if the engine tells it.

        Raises:
            SettingError: `queue_s` is negative, or above `MAX_QUEUE_S`.
        """
        queue_ns = None
        if queue_s is not None:
            queue_s = float(queue_s)  # numpy's narrow types would overflow, half way through
            if not 0 <= queue_s <= MAX_QUEUE_S:
                raise SettingError(f"queue_s is {queue_s}: a time in a queue is 0 to {MAX_QUEUE_S:g} seconds")
            queue_ns = round(queue_s * 1e9)
        self._bookings.first_token(self, queue_ns)

    def done(self, output_tokens: int = 0) -> None:
        """The request finished, was aborted or was refused. A second call does nothing.

        Args:
            output_tokens: tokens that it generated, if `first_token` was called: the time of each after the first
                is stored in the rank's histogram.

        Raises:
            TypeError: `output_tokens` is no integer. The booking still counts.
        """
        if output_tokens.__class__ is not int:  # numpy's integers would overflow, others fail half way through
            output_tokens = index(output_tokens)
        self._bookings.end(self, unbook=False, output_tokens=output_tokens)

    def cancel(self) -> None:
        """The request was never sent: takes the booking back. A second call does nothing."""
        self._bookings.end(self, unbook=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bookings.end(self, unbook=kind is not None and not self._was_sent)

    def __del__(self) -> None:
        if self.open:
            self._bookings.end_collected(self)

    def __repr__(self) -> str:
        return f"Route(dp_rank={self.dp_rank}, wave={self.wave}, prompt_tokens={self.prompt_tokens})"
