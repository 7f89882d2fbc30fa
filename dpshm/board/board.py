"""The board: the columns of a group with who lives, what is outstanding, and a snapshot of what each rank does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from dpshm.board import layout
from dpshm.board.header import printable
from dpshm.board.outstanding import LiveOutstanding, Outstanding, OutstandingWork, Words
from dpshm.board.presence import Presence
from dpshm.board.segment import Segment
from dpshm.board.snapshot import Snapshot, take_snapshot
from dpshm.board.words import COUNT_MASK, change_revision, unpack_control
from dpshm.linux.descriptors import explained
from dpshm.rules.waves import Phase

COORDINATOR_TIMEOUT_S = 2.0


class Board(Presence):
    """A group's board. A context manager: it closes the segment."""

    @classmethod
    @explained()
    def attach(cls, group: str, *, readonly: bool = True, any_owner: bool = False) -> Board:
        """Opens the board of a group, read-only unless told otherwise.

        Args:
            group: the group's name.
            readonly: never to write to it.
            any_owner: read it also if another user owns it. Only for tools: that user decides what is in it, and
                can end this process by truncating the file.

        Raises:
            SegmentNotFound: there is no such group.
            SegmentInvalid: its segment is another user's, or not one that this version can use.
        """
        return cls(Segment.attach(group, readonly=readonly, any_owner=any_owner))

    def close(self) -> None:
        """Gives the locks back. Views that are still referenced stay valid."""
        self.segment.close()

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Facts, decoded.

    @property
    def wave(self) -> int:
        """The coordinator's wave."""
        return unpack_control(int(self.control[0]))[0]

    @property
    def phase(self) -> Phase:
        """The coordinator's phase."""
        return unpack_control(int(self.control[0]))[1]

    def wait_for_coordinator(self, condition: Callable[[], object]) -> None:
        """Waits until the condition holds and front-ends can know it; for `COORDINATOR_TIMEOUT_S` at most.

        Returns at once if no coordinator lives.

        Args:
            condition: on marks, or on the number of ranks.
        """
        deadline = time.monotonic() + COORDINATOR_TIMEOUT_S
        while not (condition() and self.is_numbered()):
            if time.monotonic() >= deadline or not self.coordinator_alive():
                return
            time.sleep(0.002)
            self.segment.refresh()

    def is_numbered(self) -> bool:
        """Whether the revision counts each change of a mark that was seen: then the next decisions follow it."""
        # SYNC: called once a mark was loaded. The coordinator stores the record of a change, the mark, and then
        # the revision (`CoordinatorRow`): until then the slot of the next revision has that number.
        revision = (self.words[self.index("revision")] & COUNT_MASK) + 1
        record = self.words[self.index("change", revision % layout.CHANGES)]
        return change_revision(record) != revision & 0xFFFF

    def nothing_outstanding(self, dp_rank: int) -> None:
        """Resets an engine's offsets so that its outstanding count is zero."""
        self.request_offset[dp_rank] = -self.received_requests[dp_rank].sum()
        self.token_offset[dp_rank] = -self.received_tokens[dp_rank].sum()

    def owner_of(self, index: int) -> str:
        """The name under which a front-end took its row."""
        return printable(bytes(self.owner[index].tobytes()).rstrip(b"\0").decode("utf-8", "replace"))

    def outstanding_requests(self, counted: Sequence[int]) -> Outstanding | LiveOutstanding:
        """A counter of outstanding requests, valid until the board's marks change.

        Args:
            counted: the front-ends whose bookings count.
        """
        return self._outstanding("request_offset", "sent_requests", self.received_requests, counted, None)

    def outstanding_tokens(self, counted: Sequence[int]) -> Outstanding | LiveOutstanding:
        """The same for prompt tokens."""
        return self._outstanding("token_offset", "sent_tokens", self.received_tokens, counted, None)

    def outstanding_work(self, counted: Sequence[int], ranks: int) -> OutstandingWork:
        """Both at once, of so many ranks."""
        requests = self._outstanding("request_offset", "sent_requests", self.received_requests, counted, ranks)
        tokens = self._outstanding("token_offset", "sent_tokens", self.received_tokens, counted, ranks)
        first, second = (self._columns[name].offset for name in ("request_offset", "token_offset"))
        shape, strides = (2, 1 + self.frontends_used(), ranks), self._columns["sent_requests"].strides
        tables = np.ndarray(shape, np.int64, self.words.cast("B"), first, (second - first, *strides))
        return OutstandingWork(tables, requests, tokens)

    def _outstanding(
        self, balance: str, sent: str, received: Words, counted: Sequence[int], ranks: int | None
    ) -> Outstanding | LiveOutstanding:
        used, n = self.frontends_used(), self.dp_size if ranks is None else ranks
        at, strides = self._columns[balance].offset, self._columns[sent].strides
        table = np.ndarray((1 + used, n), np.int64, self.words.cast("B"), at, strides)
        kind = Outstanding if self.nodes == 1 else LiveOutstanding
        return kind(table, received[:n, :used], counted)

    def snapshot(
        self, now_ns: int | None = None, counted: Sequence[int] | None = None, *, watched: bool | None = None
    ) -> Snapshot:
        """What each rank does, according to the board.

        Args:
            now_ns: CLOCK_MONOTONIC; ages are counted up to it. Without it they are -1.
            counted: the front-ends whose bookings count; default `counted_frontends`.
            watched: whether a coordinator keeps the marks; default `is_watched`.

        Returns:
            A copy: an array of shape (dp_size,) and dtype `dpshm.board.snapshot.SNAPSHOT_DTYPE`.
        """
        return take_snapshot(self, now_ns, self.counted_frontends() if counted is None else counted, watched)
