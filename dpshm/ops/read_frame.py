"""Reads a board once and makes a `Frame` of it, without asking any process.

While a coordinator watches, its marks say which rows are stalled, drained or dead. Without a coordinator, or while
it is silent, the marks are old. Then the locks say which processes live, and front-ends decide by the locks too.
"""

from __future__ import annotations

import time

import numpy as np

from dpshm.board.board import Board
from dpshm.board.events import SILENT_AFTER_S
from dpshm.board.layout import CACHE_WORDS, DROP_REASONS
from dpshm.board.words import VERDICT_MASK, WAKE_LIMITS_MS
from dpshm.ops.frame import SCHEMA_VERSION, Coordinator, Frame, Frontend, Rank
from dpshm.rules.liveness import State, Verdict
from dpshm.version import version_text


def read_frame(board: Board) -> Frame:
    """Reads one frame, without rates and latencies."""
    board.segment.refresh()
    now_ns, now = time.monotonic_ns(), time.time()
    ages = board.clocks_agree()
    coordinator = _coordinator(board, now_ns if ages else None)
    marks_fresh = coordinator.state == "alive"
    ranks = _ranks(board, now_ns if ages else None, marks_fresh)
    header = board.segment.header
    return Frame(
        schema_version=SCHEMA_VERSION,
        time=now,
        monotonic_s=now_ns / 1e9,
        group=header.group,
        linked=board.segment.linked,
        balancing=str(header.settings.get("balancing", "internal")),
        head=header.head_address,
        waves=header.waves,
        dp_size=board.dp_size,
        max_engines=board.engines,
        max_frontends=board.frontends,
        wave=board.wave,
        phase=board.phase.name.lower(),
        revision=_word(board, "revision"),
        waves_per_minute=None,
        balance=balance([rank.requests for rank in ranks if rank.routable]),
        rates_over_s=None,
        coordinator=coordinator,
        ranks=ranks,
        frontends=_frontends(board, now_ns if ages else None, marks_fresh),
        ttft=None,
        queue=None,
        per_token=None,
        latency_over_s=None,
        beyond=_beyond(board),
    )


def _beyond(board: Board) -> list[int]:
    first = board.dp_size
    taken = np.flatnonzero(board.engine_pid[first:]) + first
    return [e for e in taken.tolist() if board.engine_alive(e)]


def balance(requests: list[int]) -> float | None:
    """The maximum divided by the mean. 1 is even; the number of ranks means all on one. None without requests."""
    total = sum(requests)
    return max(requests) * len(requests) / total if total else None


def _word(board: Board, name: str) -> int:
    return int(board.words[board.index(name)])


def _age_s(now_ns: int | None, then_ns: int) -> float | None:
    return max(0, now_ns - then_ns) / 1e9 if now_ns is not None and then_ns else None


def _coordinator(board: Board, now_ns: int | None) -> Coordinator:
    beat_age_s = _age_s(now_ns, int(board.coordinator_beat[0]))
    if not board.coordinator_alive():
        state = "none"
    else:
        state = "silent" if beat_age_s is not None and beat_age_s > SILENT_AFTER_S else "alive"
    limits = [*(f"{limit:g}" for limit in WAKE_LIMITS_MS), "inf"]
    return Coordinator(
        state=state,
        pid=int(board.coordinator_pid[0]),
        epoch=int(board.epoch[0]),
        beat_age_s=beat_age_s,
        ready=bool(_word(board, "ready")),
        version=version_text(_word(board, "coordinator_version")),
        waves_started=_word(board, "waves_started"),
        starts_sent=_word(board, "starts_sent"),
        states_published=_word(board, "states_published"),
        counts_published=_word(board, "counts_published"),
        messages_received=_word(board, "messages_received"),
        messages_dropped=_word(board, "messages_dropped"),
        wakes_by_limit_ms=dict(zip(limits, board.wake_bucket.tolist(), strict=True)),
        wake_s=_word(board, "wake_ns") / 1e9,
        drops_by_reason=dict(zip(DROP_REASONS, board.drops.tolist(), strict=True)),
    )


def _ranks(board: Board, now_ns: int | None, marks_fresh: bool) -> list[Rank]:
    # No coordinator has marked the ranks that died since it ended.
    counted = None if marks_fresh else [f for f in range(board.frontends_used()) if board.frontend_alive(f)]
    rows = board.snapshot(now_ns, counted, watched=marks_fresh)
    names = rows.dtype.names or ()
    ranks = []
    for values in rows.tolist():
        row = dict(zip(names, values, strict=True))
        e = row["dp_rank"]
        ranks.append(
            Rank(
                state=State(row["state"]),
                routable=not row["drained"] and row["verdict"] == "alive",
                age_s=row["age_ns"] / 1e9 if row["age_ns"] >= 0 else None,
                step_age_s=row["step_age_ns"] / 1e9 if row["step_age_ns"] >= 0 else None,
                busy_s=row["busy_ns"] / 1e9,
                version=version_text(int(board.engine_version[e])),
                index_fill=_fill(row["has_index"], row["indexed_blocks"], row["num_blocks"]),
                **{name: row[name] for name in _SAME},
            )
        )
    return ranks


def _fill(has_index: bool, indexed_blocks: int, num_blocks: int) -> float | None:
    """How much of a KV cache can be found in the prefix index; the row is not trusted."""
    if not has_index or num_blocks <= 0:
        return None
    return max(0.0, min(1.0, indexed_blocks / num_blocks))


_SAME = (
    *("dp_rank", "drained", "stock", "remote", "waiting", "running", "in_flight", "requests", "prefill_backlog"),
    *("kv_cache_usage", "wave", "step", "pid", "incarnation", "steps", "dummy_steps", "prompt_tokens"),
    *("generation_tokens", "requests_finished", "preemptions", "held_tokens", "has_index", *CACHE_WORDS[1:]),
)


def _frontends(board: Board, now_ns: int | None, marks_fresh: bool) -> list[Frontend]:
    used, n = board.frontends_used(), board.dp_size
    # SYNC: `sent` is loaded before `received`: a request that arrives in between is not in flight any more.
    sent = np.positive(board.sent_requests[:used, :n])
    in_flight = np.maximum(sent - board.received_requests[:n, :used].T, 0)
    marks = board.frontend_mark[:used].tolist()
    rows = []
    for f in range(used):
        pid = int(board.frontend_pid[f])
        if marks_fresh:
            state = Verdict(marks[f] & VERDICT_MASK).name.lower()
        else:
            state = "alive" if board.frontend_alive(f) else "dead" if pid else "absent"
        counted = state == "alive"
        by_rank = in_flight[f].tolist() if counted else [0] * n
        rows.append(
            Frontend(
                index=f,
                owner=board.owner_of(f),
                state=state,
                age_s=_age_s(now_ns, int(board.frontend_beat[f])),
                pid=pid,
                incarnation=int(board.frontend_incarnation[f]),
                version=version_text(int(board.frontend_version[f])),
                routed=int(board.routed[f]),
                in_flight=sum(by_rank),
                sent_by_rank=sent[f].tolist(),
                in_flight_by_rank=by_rank,
            )
        )
    return rows
