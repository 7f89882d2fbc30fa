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
from types import TracebackType
from typing import Self

import msgspec

from dpshm.board.segment import Segment
from dpshm.frontend.row import FrontendRow

logger = logging.getLogger(__name__)


class Bookings:
    """Ends the bookings of one front-end.

    Attributes:
        lock: held by each call that changes or reads the row.
        lost: a Route was collected while open since the last `heal`.
    """

    def __init__(self, segment: Segment, row: FrontendRow) -> None:
        self._segment = segment
        self._row = row
        self.lock = threading.RLock()
        self.lost = False
        self._collected: deque[Route] = deque()  # while open
        self._warned = False

    def end(self, route: Route, *, unbook: bool) -> None:
        """Ends a booking, once. Does nothing if the front-end is closed, or in a forked child."""
        if not self._segment.usable:  # in a forked child the lock may be held for ever
            return
        with self.lock:
            if self._segment.usable:
                self._row.end(route, unbook=unbook)
        if self.lost:
            self.heal()

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
            send(request, route.dp_rank, route.wave)
            route.sent()
            wait_for_answer(request)

    An exception that leaves the block before `sent` was called cancels the booking; after it, or without an
    exception, the booking is done. A Route that is collected while open gives its booking back, with a warning.

    Attributes:
        dp_rank: the engine that takes the request.
        wave: the wave to stamp the request with.
        prompt_tokens: the prompt tokens that were booked: those that are expected to be computed.
        cached_tokens: the prompt tokens that the engine is expected to find in its cache.
        open: whether the booking counts: neither `done` nor `cancel` was called.
    """

    _bookings: Bookings
    dp_rank: int = -1
    wave: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    open: bool = False
    _was_sent: bool = False

    def sent(self) -> None:
        """The request was sent: from now on an exception that leaves the block does not cancel the booking."""
        self._was_sent = True

    def done(self) -> None:
        """The request finished, was aborted or was refused. A second call does nothing."""
        self._bookings.end(self, unbook=False)

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
