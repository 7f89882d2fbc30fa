"""Information models that see rows late: broadcasts and scrapes at an interval, and reports after a delay."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from dpshm.policies import View
from dpshm.sim.lab.rank import Job, Row, SimRank
from dpshm.sim.lab.view_model import Information


class Broadcast(Information):
    """All rows, at an interval.

    In lockstep vLLM's coordinator sends the rows of the last step that all ranks have ended, without the requests
    that they received since (``DPCoordinatorProc``, ``last_step_counts``).
    """

    def __init__(self, ranks: list[SimRank], own: list[list[int]], interval_s: float, times: int) -> None:
        super().__init__(ranks, own)
        self._interval_s = interval_s
        self._times = times  # how often a request that it sent counts
        self._count = 0
        self._ended: list[Row] = []
        self.tick(0.0)

    def step_ended(self) -> None:
        for rank in self.ranks:
            rank.publish()
        self._ended = [r.row for r in self.ranks]

    def tick(self, now_s: float) -> None:
        self._rows = self._ended or [r.row for r in self.ranks]
        n = len(self.ranks)
        self._bumps = [[0] * n for _ in self.own]
        self._bumped_tokens = [[0] * n for _ in self.own]
        self._count += 1
        self.next_tick_s = self._count * self._interval_s

    def sent(self, job: Job) -> None:
        self._bumps[job.frontend][job.rank] += self._times
        self._bumped_tokens[job.frontend][job.rank] += self._times * job.booked_tokens

    def view(self, frontend: int, order: list[int], now_s: float) -> View:
        bumps, tokens = self._bumps[frontend], self._bumped_tokens[frontend]
        return self._view(frontend, order, now_s, self._rows, bumps, tokens)


class _Counting(Information):
    """Requests that a front-end sent, less those that the visible row has received."""

    def __init__(self, ranks: list[SimRank], own: list[list[int]]) -> None:
        super().__init__(ranks, own)
        self._sent = [[0] * len(ranks) for _ in own]
        self._sent_tokens = [[0] * len(ranks) for _ in own]

    def sent(self, job: Job) -> None:
        self._sent[job.frontend][job.rank] += 1
        self._sent_tokens[job.frontend][job.rank] += job.booked_tokens

    def _counted(self, frontend: int, order: list[int], now_s: float, rows: Sequence[Row]) -> View:
        sent, tokens = self._sent[frontend], self._sent_tokens[frontend]
        in_flight = [sent[e] - row.received[frontend] for e, row in enumerate(rows)]
        in_flight_tokens = [tokens[e] - row.received_tokens[frontend] for e, row in enumerate(rows)]
        return self._view(frontend, order, now_s, rows, in_flight, in_flight_tokens)


class BroadcastKeep(_Counting):
    """All rows, at an interval; requests in flight are counted apart."""

    def __init__(self, ranks: list[SimRank], own: list[list[int]], interval_s: float) -> None:
        super().__init__(ranks, own)
        self._interval_s = interval_s
        self._count = 0
        self.tick(0.0)

    def tick(self, now_s: float) -> None:
        self._rows = [r.row for r in self.ranks]
        self._count += 1
        self.next_tick_s = self._count * self._interval_s

    def view(self, frontend: int, order: list[int], now_s: float) -> View:
        return self._counted(frontend, order, now_s, self._rows)


class Immediate(_Counting):
    """Each row after a delay."""

    def __init__(self, ranks: list[SimRank], own: list[list[int]], delay_s: float) -> None:
        super().__init__(ranks, own)
        self._delay_s = delay_s
        self._under_way: list[deque[tuple[float, Row]]] = [deque() for _ in ranks]
        self._rows = [r.row for r in ranks]

    def published(self, rank: int, now_s: float) -> None:
        self._under_way[rank].append((now_s + self._delay_s, self.ranks[rank].row))

    def view(self, frontend: int, order: list[int], now_s: float) -> View:
        for e, queue in enumerate(self._under_way):
            while queue and queue[0][0] <= now_s:
                self._rows[e] = queue.popleft()[1]
        return self._counted(frontend, order, now_s, self._rows)
