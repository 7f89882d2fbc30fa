"""Frames made by hand, for tests of what is made of them."""

from __future__ import annotations

from typing import Any

from dpshm.board.latency import KINDS
from dpshm.ops.frame import Coordinator, Frame, Frontend, Rank


def make_rank(dp_rank: int = 0, **fields: Any) -> Rank:
    """A running rank with nothing to do."""
    zero = dict.fromkeys(
        (
            "waiting",
            "running",
            "in_flight",
            "prefill_backlog",
            "wave",
            "step",
            "steps",
            "dummy_steps",
            "prompt_tokens",
            "generation_tokens",
            "requests_finished",
        ),
        0,
    )
    base = {
        "state": "running",
        "drained": False,
        "stock": False,
        "kv_cache_usage": 0.0,
        "age_s": 0.01,
        "step_age_s": None,
        "pid": 1000 + dp_rank,
        "incarnation": 1,
        "version": "0.1.0",
        "busy_s": 0.0,
    }
    made = {**base, **zero, **fields, "dp_rank": dp_rank}
    made.setdefault("routable", made["state"] in ("running", "idle", "waking", "paused"))
    made.setdefault("requests", made["waiting"] + made["running"] + made["in_flight"])
    return Rank(**made)


def make_frontend(index: int = 0, **fields: Any) -> Frontend:
    """A living front-end that sent nothing."""
    base = {"owner": f"api:{index}", "state": "alive", "age_s": 0.1, "pid": 2000 + index, "incarnation": 1}
    zero: dict[str, Any] = {
        "version": "0.1.0",
        "routed": 0,
        "in_flight": 0,
        "sent_by_rank": [],
        "in_flight_by_rank": [],
    }
    return Frontend(**{**base, **zero, "index": index, **fields})


def make_coordinator(**fields: Any) -> Coordinator:
    """A living coordinator."""
    counters = ("waves_started", "starts_sent", "states_published", "counts_published", "messages_received")
    base: dict[str, Any] = dict.fromkeys((*counters, "messages_dropped"), 0)
    base |= {"state": "alive", "pid": 42, "epoch": 1, "beat_age_s": 0.02, "ready": True, "version": "0.1.0"}
    return Coordinator(**{**base, "wakes_by_limit_ms": {}, "wake_s": 0.0, **fields})


def make_frame(ranks: list[Rank], frontends: list[Frontend] | None = None, **fields: Any) -> Frame:
    """A frame of a lockstep group."""
    base: dict[str, Any] = {
        "schema_version": 1,
        "time": 1.7e9,
        "monotonic_s": 100.0,
        "group": "g",
        "linked": True,
        "balancing": "internal",
        "head": None,
        "waves": True,
        "dp_size": len(ranks),
        "max_engines": 64,
        "max_frontends": 64,
        "wave": 17,
        "phase": "running",
        "revision": 5,
        "waves_per_minute": None,
        "balance": None,
        "rates_over_s": None,
        "coordinator": make_coordinator(),
        "latency_over_s": None,
        "beyond": [],
        **dict.fromkeys(KINDS),
    }
    return Frame(**{**base, "ranks": ranks, "frontends": frontends or [], **fields})
