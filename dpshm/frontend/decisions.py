"""One front-end's decisions: refreshes what is out of date, lets the policy choose, records, wakes.

All calls are made under the front-end's lock. `dpshm.frontend.handle` takes it, and books.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from time import monotonic_ns

from dpshm.board.board import Board
from dpshm.errors import NoEngineAvailable, SettingError
from dpshm.frontend.ages import with_ages
from dpshm.frontend.heard import HeardRanks
from dpshm.frontend.prefix_reader import PrefixReader
from dpshm.frontend.recorder import Recorder
from dpshm.frontend.row import FrontendRow
from dpshm.frontend.view_reader import ViewReader
from dpshm.frontend.wakeup import Wakeup
from dpshm.net.keys import ClientKeys
from dpshm.policies import LeastWork, Policy, Request, is_built_in

logger = logging.getLogger(__name__)

REFRESH_INTERVAL_NS = 100_000_000
"""Interval between refreshes while no mark changes: a coordinator may have ended, or the file been unlinked."""


class Decisions:
    """What a front-end decides by.

    Attributes:
        reader: reads the board.
        prefixes: reads the ranks' prefix indexes.
        wakeup: wakes paused ranks.
        heard: the ranks that the front-end's owner is connected to.
        recorder: keeps the decisions; None: they are not kept.
        alone: the coordinator of a group with waves has ended, or is stopped.
        next_refresh_ns: when `begin` refreshes at the latest; CLOCK_MONOTONIC.
    """

    def __init__(
        self,
        board: Board,
        row: FrontendRow,
        policy: Policy,
        *,
        index: int,
        ranks: frozenset[int] | None,
        recording: bool,
        keys: ClientKeys | None,
        weights: Mapping[int, float] | None,
        max_requests: int | None,
    ) -> None:
        """Reads the board for the first time; `dpshm.Frontend.attach` has the arguments."""
        self._board = board
        self._segment = board.segment
        self._words = board.words
        self._at_revision = board.index("revision")
        self._row = row
        self._policy = self._given = policy
        self.reader = ViewReader(
            *(board, index, row.own, ranks),
            # A recording has the work, whatever the policy needs: a replay may ask another one.
            sees_work=recording or bool(getattr(policy, "sees_work", False)),
            weights=weights,
            max_requests=max_requests,
        )
        self.prefixes = PrefixReader(board, index)
        self.wakeup = Wakeup(board.segment, keys)
        self.heard = HeardRanks(board, self.wakeup)
        self.recorder: Recorder | None = None
        self.next_refresh_ns = 0
        self._by_work = False
        self.alone = False
        self._warned_unlinked = False

    def begin(self) -> int:
        """Begins a call: refreshes what is out of date. Returns CLOCK_MONOTONIC ns.

        Raises:
            HandleClosed, HandleForked: the handle cannot be used.
        """
        if not self._segment.usable:
            raise self._segment.why_unusable()
        now_ns = monotonic_ns()
        if now_ns >= self.next_refresh_ns or self._words[self._at_revision] != self.reader.revision:
            self._refresh(now_ns)
        return now_ns

    def rehearse(self) -> None:
        """Decides once for no request, so that the first decision takes no longer than the others.

        It leaves nothing behind: the first decision refreshes, and has the first turn. A policy of the user's is
        not called: it may count its calls.
        """
        reader, now_ns = self.reader, self.begin()
        self.next_refresh_ns = 0
        if not reader.eligible:
            return
        try:
            if self._by_work and reader.usual is not None:
                reader.usual(1, now_ns)
            view = reader.read(now_ns, again=True)
            if is_built_in(self._given):
                self._policy(view, Request(1))
        except NoEngineAvailable as e:
            logger.debug("at the start: %s", e)
        reader.rewind()

    def choose(
        self, prompt_tokens: int, key: int | None, cached: list[int] | None, now_ns: int, exclude: Collection[int]
    ) -> int:
        """The policy's choice.

        Args:
            prompt_tokens: of the request; this and the next two are those of `dpshm.policies.Request`.
            key: what `affinity` keeps together.
            cached: by rank, what is cached of the prompt.
            now_ns: what `begin` gave.
            exclude: ranks that must not be chosen.

        Raises:
            NoEngineAvailable: no rank may be chosen.
            Overloaded: all are full.
            SettingError: the choice is not a rank that may be chosen.
        """
        reader, recorder = self.reader, self.recorder
        usual = reader.usual if self._by_work else None
        if asked := usual is not None and cached is None and not exclude and recorder is None:
            rank = usual(prompt_tokens, now_ns)
            if rank >= 0:
                return rank
        eligible = reader.eligible
        if not eligible:
            raise NoEngineAvailable(reader.why_none())
        beats = reader.read_beats() if recorder is not None else []  # before the view, so that ages err upwards
        view = reader.read(now_ns, exclude, again=asked)
        request = Request(prompt_tokens, key, cached)
        rank = self._policy(view, request)
        try:
            allowed = rank in eligible and not (exclude and rank in exclude)
        except TypeError:  # a list or an array
            allowed = False
        if not allowed:
            raise SettingError(f"the policy chose rank {rank!r}, which is not one of {sorted(view.ranks)}")
        if type(rank) is not int:
            rank = int(rank)  # numpy's
        if recorder is not None:
            recorder.record(now_ns, view, request, rank, beats)
        return rank

    def wake(self, wave: int, *, receiver: int | None, ring: bool = True) -> int:
        """Wakes ranks that sleep.

        Args:
            wave: of the control word. It may be old: a coordinator that was killed or stopped ends no wave. The
                rows tell.
            receiver: the rank that a request is about to wake; None: no rank.
            ring: whether to ring the doorbells.

        Returns:
            The wave that they are woken for, `wave` or a newer one.
        """
        wave, asleep = self.reader.read_wave(wave)
        if self.alone:
            receiver = None  # it may refuse the request, and no coordinator wakes it then
        if asleep or not self.alone:
            self.wakeup.wake(*(wave, self.reader.dp_size), receiver=receiver, ring=ring, again=self.alone)
        return wave

    def _refresh(self, now_ns: int) -> None:
        self.next_refresh_ns = now_ns + REFRESH_INTERVAL_NS
        if not self._warned_unlinked and not self._segment.linked:
            self._warned_unlinked = True
            logger.warning(
                "the segment of group %r was unlinked under it: routing goes on, but no process can attach any "
                "more. Restart the group; something cleans %s",
                self._segment.group,
                self._segment.path.parent,
            )
        self.alone = self._segment.header.waves and not self._board.is_watched()
        self.reader.refresh()
        if self._board.nodes > 1:
            self._policy = with_ages(self._given, self._board, now_ns)
        # A relay's policy is another one, and so is one that a user has derived.
        self._by_work = type(self._policy) is LeastWork
        self._row.follow_late(self.reader.late)
        self.prefixes.refresh(now_ns, self._row.routed)
        self.wakeup.expect(self.reader.dp_size)
        self.heard.remind(now_ns)

    def close(self) -> None:
        """Closes the sockets and the recording."""
        self.wakeup.close()
        if self.recorder is not None:
            self.recorder.close()
