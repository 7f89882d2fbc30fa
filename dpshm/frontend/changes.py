"""Changes of a group, as a front-end hears of them: in an event loop, or from a thread.

Both read what `dpshm events` prints (`dpshm.board.events`), over a mapping of their own. So they take no lock of
the front-end and cost a decision nothing. They begin with the first change after they were made and end with the
group.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable

from dpshm.board.board import Board
from dpshm.board.events import Event, EventReader
from dpshm.board.segment import Segment
from dpshm.errors import SegmentNotFound

logger = logging.getLogger(__name__)

INTERVAL_S = 0.05
"""Between two looks at the board."""


class Changes(AsyncIterator[Event]):
    """The changes of a group from now on, for ``async for``. It ends with the group, the front-end, or `close`."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment  # of the front-end
        self._reader = _open_reader(segment)
        self._waiting: deque[Event] = deque()
        self._closed = False

    async def __anext__(self) -> Event:
        import asyncio  # not for front-ends that have no event loop

        while not self._waiting:
            if not self._segment.usable:
                self.close()
            if self._closed:
                raise StopAsyncIteration
            self._waiting.extend(_read(self._reader))
            if not self._waiting:
                await asyncio.sleep(INTERVAL_S)
        event = self._waiting.popleft()
        if event.kind == "group_ended":
            self.close()
        return event

    def close(self) -> None:
        """Ends the iteration, also one that waits."""
        if not self._closed:
            self._closed = True
            self._waiting.clear()
            self._reader.close()


class ChangeThread(threading.Thread):
    """Calls a function with each change, one after another. An exception of the function is logged."""

    def __init__(self, segment: Segment, on_change: Callable[[Event], object]) -> None:
        super().__init__(name="dpshm-changes", daemon=True)
        self._on_change = on_change
        self._reader = _open_reader(segment)
        self._ended = threading.Event()

    def run(self) -> None:
        """The thread."""
        with self._reader:
            while not self._ended.wait(INTERVAL_S):
                for event in _read(self._reader):
                    if self._ended.is_set():
                        return
                    try:
                        self._on_change(event)
                    except Exception:
                        logger.exception("on_change raised for %r", event.text)
                    if event.kind == "group_ended":
                        return

    def stop(self) -> None:
        """Ends the thread. Its function is not called any more after this, unless the function itself calls it."""
        self._ended.set()
        if threading.current_thread() is not self:
            self.join()


def _open_reader(segment: Segment) -> EventReader:
    """A reader of a front-end's group.

    Raises:
        SegmentNotFound: the group has ended, also if another one has its name now.
    """
    reader = EventReader(Board.attach(segment.group), history=False)
    try:
        if reader.board.segment.header.lock_token != segment.header.lock_token:
            raise SegmentNotFound(
                f"group {segment.group!r} has ended, and another has its name: attach to that one"
            )
        reader.read()  # what is so now is no change
    except BaseException:
        reader.close()
        raise
    return reader


def _read(reader: EventReader) -> list[Event]:
    """The new events, up to the end of the group."""
    events = reader.read()
    kinds = [event.kind for event in events]
    return events[: kinds.index("group_ended") + 1] if "group_ended" in kinds else events
