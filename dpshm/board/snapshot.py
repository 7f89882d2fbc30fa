"""A snapshot: what each rank does, as one numpy record a rank.

It is for people and tools: each field is decoded, named and bounded, whatever the words say. Decisions do not use
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dpshm.board.layout import CACHE_WORDS, STEP_WORDS
from dpshm.board.words import DRAINED, ON_BEHALF, REMOTE, unpack_load, unpack_progress, unpack_state
from dpshm.errors import SettingError
from dpshm.rules.liveness import is_silent, state_of
from dpshm.rules.waves import Phase

if TYPE_CHECKING:
    from dpshm.board.board import Board

SNAPSHOT_DTYPE = np.dtype(
    [
        ("dp_rank", np.int32),
        ("state", "U8"),
        ("verdict", "U8"),
        ("drained", np.bool_),
        ("stock", np.bool_),
        ("remote", np.bool_),
        ("waiting", np.int64),
        ("running", np.int64),
        ("in_flight", np.int64),
        ("requests", np.int64),
        ("kv_cache_usage", np.float64),
        ("prefill_backlog", np.int64),
        ("in_flight_tokens", np.int64),
        ("wave", np.int64),
        ("step", np.int64),
        ("age_ns", np.int64),
        ("step_age_ns", np.int64),
        ("incarnation", np.int64),
        ("pid", np.int64),
        ("steps", np.int64),
        ("dummy_steps", np.int64),
        ("busy_ns", np.int64),
        ("prompt_tokens", np.int64),
        ("generation_tokens", np.int64),
        ("requests_finished", np.int64),
        ("preemptions", np.int64),
        ("held_tokens", np.int64),
        ("has_index", np.bool_),
        *((name, np.int64) for name in CACHE_WORDS[1:]),
    ]
)
"""One row a rank. `requests` and `prefill_backlog` count what is in flight in; ages are -1 where unknown."""


class Snapshot(np.ndarray[Any, np.dtype[Any]]):
    """An array of shape (dp_size,) and dtype `SNAPSHOT_DTYPE`: a numpy array in all else.

    A column is ``snapshot["requests"]``, a rank ``snapshot[3]``. A state compares with `dpshm.State`.
    """

    def to_dicts(self) -> list[dict[str, Any]]:
        """One dict a rank, of Python's own types: ``json.dumps`` takes it.

        Raises:
            SettingError: this is a column.
        """
        names = self.dtype.names
        if names is None:
            raise SettingError("a column has no names: call to_dicts() of the whole snapshot, or tolist() here")
        return [dict(zip(names, row, strict=True)) for row in np.atleast_1d(self).tolist()]


_SANE = 1 << 61
_COUNTERS = (
    *("steps", "dummy_steps", "busy_ns", "prompt_tokens", "generation_tokens", "requests_finished"),
    "preemptions",
)


def take_snapshot(board: Board, now_ns: int | None, counted: Sequence[int], watched: bool | None) -> Snapshot:
    """See `dpshm.board.board.Board.snapshot`."""
    n = board.dp_size
    watched = board.is_watched() if watched is None else watched
    verdicts = board.engine_verdicts(watched=watched)
    requests = board.outstanding_requests(counted).count().tolist()
    tokens = board.outstanding_tokens(counted).count().tolist()
    load = board.load[:n].tolist()
    backlog = board.prefill_backlog[:n].tolist()
    out = np.zeros(n, SNAPSHOT_DTYPE).view(Snapshot)
    waking, waves = watched and board.phase is Phase.WAKING, board.segment.header.waves
    for e in range(n):
        row = out[e]
        row["dp_rank"] = e
        row["waiting"], row["running"], row["kv_cache_usage"] = unpack_load(load[e])
        # What was outstanding an instant before these loads, and may have ended since.
        row["requests"] = max(_sane(requests[e]), row["waiting"] + row["running"])
        row["prefill_backlog"] = max(_sane(tokens[e]), _sane(backlog[e]))
        row["in_flight"] = row["requests"] - row["waiting"] - row["running"]
        row["in_flight_tokens"] = row["prefill_backlog"] - _sane(backlog[e])
        row["wave"], running, _ = unpack_state(int(board.engine_state[e]))
        row["step"] = unpack_progress(int(board.progress[e]))[1]
        mark = int(board.engine_mark[e])
        verdict = verdicts[e]
        row["verdict"] = verdict.name.lower()
        row["drained"] = bool(mark & DRAINED)
        row["stock"] = bool(mark & ON_BEHALF)
        row["remote"] = bool(mark & REMOTE)
        signs = board.engine_signs(e)
        clock_ns = now_ns if row["stock"] or board.engine_clock_agrees(e) else None
        row["age_ns"] = _sane(clock_ns - signs.beat) if clock_ns is not None and signs.beat else -1
        row["step_age_ns"] = (
            _sane(clock_ns - signs.step_start) if clock_ns is not None and signs.step_start else -1
        )
        still_ns = 0 if clock_ns is None else clock_ns - max(signs.beat, signs.step_start)
        row["state"] = state_of(
            *(verdict, signs),
            drained=bool(row["drained"]),
            silent=not row["stock"] and is_silent(signs, still_ns, int(board.steps[e]), int(board.busy_ns[e])),
            steps=running if waves else None,
            waking=waking,
        )
        row["incarnation"], row["pid"] = board.engine_incarnation[e], board.engine_pid[e]
        for name in _COUNTERS:
            row[name] = getattr(board, name)[e]
        row["held_tokens"] = _sane(int(board.step_model[e, STEP_WORDS.index("held_tokens")]))
        index, *cache = board.cache_state[e].tolist()
        row["has_index"] = index != 0
        for name, value in zip(CACHE_WORDS[1:], cache, strict=True):
            row[name] = _sane(value)
    return out


def _sane(value: int) -> int:
    """A number that may have been scribbled, so that sums with it still fit their column."""
    return max(0, min(value, _SANE))
