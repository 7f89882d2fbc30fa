"""What one decision sees: the request, and the board at one instant, under names.

A policy sees the same types in a group of any size: every column is a list with one item for each rank of the
group, indexed by dp_rank. A list is made when it is first asked for and kept, so a policy pays for what it reads.
`View.columns` is the form that the built-in policies read; it depends on the size of the group and may change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TypeAlias, TypeVar

import msgspec
import numpy as np

from dpshm.board.words import pack_load, unpack_load
from dpshm.errors import SettingError
from dpshm.policies.columns import ArrayWork, Columns, ListColumns, ListWork, Words, columns_of, is_overloaded


class Request(msgspec.Struct, frozen=True, gc=False):
    """What is known of a request when its engine is chosen.

    Attributes:
        prompt_tokens: as booked.
        key: what `affinity` keeps together, as a number (`dpshm.policies.key_of`); None: nothing.
        cached: by rank, how many of the prompt's tokens its cache holds (the prefix index), 0 where that is not
            known; None if no prompt was given.
    """

    prompt_tokens: int = 0
    key: int | None = None
    cached: list[int] | None = None


class Work(msgspec.Struct, frozen=True, eq=False, dict=True):
    """What the ranks have to compute and how fast they are.

    A step takes about ``base_ns + per_request_ns * requests + per_token_ns * prompt tokens + per_held_token_ps /
    1000 * held tokens``. Each engine learns these of its own steps; they change slowly and may be some tenths of a
    second old. An engine that has learnt nothing yet has the mean of those that have. If none has, all of them are
    0 (see `learnt`).
    """

    columns: ListWork | ArrayWork

    @property
    def now_ns(self) -> int:
        """The time of the decision: CLOCK_MONOTONIC."""
        return self.columns.now_ns

    @property
    def learnt(self) -> bool:
        """Whether any engine has learnt how long its steps take."""
        return self.base_ns[0] > 0

    @cached_property
    def tokens(self) -> list[int]:
        """Prompt tokens that any front-end sent and the engine has not computed."""
        return _listed(self.columns.tokens)

    @cached_property
    def step_end_ns(self) -> list[int]:
        """When the running step should end (CLOCK_MONOTONIC); 0 between steps, or if it is not known."""
        return self._step(0)

    @cached_property
    def step_tokens(self) -> list[int]:
        """Prompt tokens that the running step computes."""
        return self._step(1)

    @cached_property
    def base_ns(self) -> list[int]:
        """What a step takes by itself."""
        return self._model(0)

    @cached_property
    def per_request_ns(self) -> list[int]:
        """What each request of the batch adds to a step."""
        return self._model(1)

    @cached_property
    def per_token_ns(self) -> list[int]:
        """What each prompt token adds to a step."""
        return self._model(2)

    @cached_property
    def chunk_tokens(self) -> list[int]:
        """The most prompt tokens of one step; very large if no step was seen to be full."""
        return self._model(3)

    @cached_property
    def max_running(self) -> list[int]:
        """The most requests that run at a time; very large if none was seen to wait for room."""
        return self._model(4)

    @cached_property
    def ending_ns(self) -> list[int]:
        """The mean time from one request's end to the next; 0 if it is not known."""
        return self._model(5)

    @property
    def lockstep(self) -> bool:
        """Whether the ranks step together: a step of all lasts as long as that of the slowest."""
        return self.columns.lockstep

    @cached_property
    def held_tokens(self) -> list[int]:
        """Tokens of context of the running requests, when the newest step began."""
        return self._step(2)

    @cached_property
    def per_held_token_ps(self) -> list[int]:
        """What each held token adds to a step, in picoseconds."""
        return self._model(6)

    def _step(self, item: int) -> list[int]:
        return _listed(self.columns.steps[item])

    def _model(self, item: int) -> list[int]:
        return [int(row[item]) for row in self.columns.models]


class View(msgspec.Struct, frozen=True, eq=False, dict=True):
    """What one decision sees. A policy's own tests make one with `View.of`."""

    columns: Columns

    @classmethod
    def of(
        cls,
        waiting: Sequence[int],
        running: Sequence[int],
        *,
        kv_cache_usage: Sequence[float] | None = None,
        in_flight: Sequence[int] | None = None,
        own: Sequence[int] | None = None,
        ranks: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        num_frontends: int = 1,
    ) -> View:
        """A view of these numbers, each by rank; what is left out is 0, and all ranks may be chosen.

        Raises:
            SettingError: there are no ranks, or the sequences differ in length.
        """
        n = len(waiting)
        usage = [0.0] * n if kv_cache_usage is None else kv_cache_usage
        sent = [0] * n if in_flight is None else in_flight
        mine = [0] * n if own is None else list(own)
        speeds = None if weights is None else list(weights)
        if not n or {len(running), len(usage), len(sent), len(mine), n if speeds is None else len(speeds)} != {n}:
            raise SettingError("a view needs at least one rank, and in each sequence one item for each rank")
        load = list(map(pack_load, waiting, running, usage))
        requests = [w + r + s for w, r, s in zip(waiting, running, sent, strict=True)]
        order = list(range(n)) if ranks is None else list(ranks)
        return cls(columns_of(ListColumns(order, load, requests, mine, num_frontends, weights=speeds)))

    @cached_property
    def ranks(self) -> list[int]:
        """The ranks that may be chosen, never empty, in the order that breaks ties."""
        return _listed(self.columns.ranks)

    @cached_property
    def requests(self) -> list[int]:
        """Requests that are waiting, running, or sent by any front-end and not received."""
        return _listed(self.columns.requests)

    @cached_property
    def waiting(self) -> list[int]:
        """Requests in the engine's queue, as it reported."""
        return [unpack_load(word)[0] for word in self._load]

    @cached_property
    def running(self) -> list[int]:
        """Requests in the engine's batch, as it reported."""
        return [unpack_load(word)[1] for word in self._load]

    @cached_property
    def kv_cache_usage(self) -> list[float]:
        """How much of the engine's KV cache is in use, from 0.0 to 1.0, as it reported."""
        return [unpack_load(word)[2] for word in self._load]

    @cached_property
    def in_flight(self) -> list[int]:
        """Requests that any front-end sent and the engine has not received."""
        rows = zip(self.requests, self.waiting, self.running, strict=True)
        return [max(0, requests - waiting - running) for requests, waiting, running in rows]

    @property
    def own(self) -> list[int]:
        """Requests of this front-end that are unfinished. The list belongs to the front-end: do not change it."""
        return self.columns.own

    @cached_property
    def weights(self) -> list[float]:
        """Speeds relative to the other ranks, as `Frontend.attach` was told; 1.0 each if it was not."""
        weights = self.columns.weights
        return [1.0] * len(self.columns.load) if weights is None else list(map(float, weights))

    @property
    def ages_ns(self) -> list[int]:
        """How old each rank's row may be, in ns, where rows come from other nodes; 0 for a rank of this node.

        What this front-end booked, and other front-ends of its node, is never old.
        """
        ages_ns = self.columns.ages_ns
        return [0] * len(self.columns.load) if ages_ns is None else ages_ns

    @property
    def num_frontends(self) -> int:
        """How many front-ends are alive."""
        return self.columns.num_frontends

    @cached_property
    def work(self) -> Work:
        """Tokens and step times, for a policy that is marked with `sees_work`.

        Raises:
            SettingError: this view has none.
        """
        if self.columns.work is None:
            raise SettingError("this view has no tokens: mark the policy with dpshm.policies.sees_work")
        return Work(self.columns.work)

    @property
    def has_work(self) -> bool:
        """Whether `work` is there."""
        return self.columns.work is not None

    def overloaded(self, rank: int) -> bool:
        """Whether a rank has a queue and hardly any KV cache left."""
        return is_overloaded(int(self.columns.load[rank]))

    def free(self) -> list[int]:
        """The ranks that may be chosen and are not overloaded, in their order; if all are, all of them."""
        return _listed(self.columns.free())

    def least(self, scores: Sequence[float]) -> int:
        """The first of the ranks that may be chosen whose score is least; an overloaded one only if all are.

        Args:
            scores: one for each rank of the group.
        """
        columns = self.columns
        return columns.least(scores) if isinstance(columns, ListColumns) else columns.least(np.asarray(scores))

    @cached_property
    def _load(self) -> list[int]:
        return _listed(self.columns.load)


Policy: TypeAlias = Callable[[View, Request], int]

_Marked = TypeVar("_Marked")


def sees_work(policy: _Marked) -> _Marked:
    """Marks a policy that reads `View.work`, which costs a decision another microsecond or two.

    A class whose objects are policies says the same with ``sees_work: ClassVar[bool] = True``.
    """
    setattr(policy, "sees_work", True)  # noqa: B010 - type checkers know no attributes of functions
    return policy


def _listed(row: list[int] | Words) -> list[int]:
    """A column as a list; a list is returned unchanged."""
    if isinstance(row, list):
        return row
    numbers: list[int] = row.tolist()
    return numbers
