"""A fixture board: a real segment with real handles on it, which no other process changes.

It serves to time the work of one process. No coordinator thread runs beside the timed one. The board looks like
that of a busy group: all ranks are alive, running and loaded, other front-ends are attached, and a chosen number
of requests is in flight.
"""

from __future__ import annotations

import itertools
import os
import time
from contextlib import ExitStack
from typing import Literal, cast

from dpshm import Frontend, Route
from dpshm.board.board import Board
from dpshm.board.header import make_header
from dpshm.board.layout import DEFAULT_ENGINES, DEFAULT_FRONTENDS
from dpshm.board.locks import coordinator_byte
from dpshm.board.segment import Segment
from dpshm.board.words import pack_control, pack_load
from dpshm.coordinator.row import CoordinatorRow
from dpshm.policies import Policy
from dpshm.rules.liveness import Verdict
from dpshm.rules.waves import Phase

InFlight = Literal["none", "one each", "all"]
"""The requests in flight: none; one from each front-end; one from each front-end to every rank."""
SITUATIONS = cast("tuple[InFlight, ...]", ("none", "one each", "all"))

_numbers = itertools.count()


class FixtureBoard:
    """A board with the given numbers of engines and front-ends.

    Attributes:
        board: the board.
        frontend: the handle of one of the front-ends.
    """

    def __init__(
        self,
        engines: int,
        frontends: int,
        in_flight: InFlight = "one each",
        policy: str | Policy = "least_loaded",
    ) -> None:
        group = f"bench-fixture-{os.getpid()}-{next(_numbers)}"
        header = make_header(
            group,
            max(DEFAULT_ENGINES, engines),
            max(DEFAULT_FRONTENDS, frontends),
            stats_address=f"inproc://{group}-f",
            engine_input_address=f"inproc://{group}-i",
            engine_output_address=f"inproc://{group}-o",
            settings={"balancing": "internal", "waves": False, "counts_with_kv": True},
        )
        with ExitStack() as stack:
            self.board = board = Board(Segment.create(header))
            stack.callback(board.close)
            stack.callback(board.segment.unlink)
            board.segment.locks.unlock(coordinator_byte(header.columns))
            words, marks = board.words, CoordinatorRow(board)
            marks.set_dp_size(engines)
            words[board.index("control")] = pack_control(1, Phase.RUNNING)
            self._at_beat = board.index("coordinator_beat")
            self._routes: list[Route] = []
            self.beat()
            for e in range(engines):
                marks.set_engine(e, verdict=Verdict.ALIVE)
                words[board.index("load", e)] = pack_load(e % 3, 16 + e % 5, 0.4)
            for f in range(frontends):
                self.beat()
                self.frontend = stack.enter_context(Frontend.attach(group, owner=f"bench:{f}", policy=policy))
                marks.set_frontend(self.frontend.index, Verdict.ALIVE)
                self.beat()
                if in_flight == "all":
                    for e in range(engines):
                        self._routes.append(self.frontend.route(dp_rank=e))
                elif in_flight == "one each":
                    self._routes.append(self.frontend.route(dp_rank=f % engines))
            self.close = stack.pop_all().close
        self.beat()
        self.frontend.choose()  # work that is done only once is over now

    def beat(self) -> None:
        """Stores the coordinator's beat, without which handles test locks themselves."""
        self.board.words[self._at_beat] = time.monotonic_ns()

    def __enter__(self) -> FixtureBoard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
