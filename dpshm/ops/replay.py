"""Replays recorded decisions: asks another policy about each, from the load that the recorder kept.

Each decision is asked about alone, with the load that was seen then. A different choice would have changed the
load of later decisions; a replay cannot compute that. `dpshm.sim` can.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from dpshm.errors import SettingError
from dpshm.frontend.recorder import Decision
from dpshm.policies import LeastWork, Policy

FORMATS = (".csv", ".parquet")


class Replayed(msgspec.Struct, frozen=True):
    """One decision and the other choice.

    Attributes:
        choice: the rank that was chosen.
        other: the rank that the other policy chooses.
    """

    decision: Decision
    choice: int
    other: int


class Summary(msgspec.Struct):
    """The object that ``dpshm replay --json`` prints.

    Attributes:
        decisions: number of decisions in the ring.
        agreed: number of decisions on which the two policies agree.
        by_rank: requests that each rank got.
        other_by_rank: requests that each rank gets from the other policy.
        requests_at_choice: mean of the requests, reported and in flight, at the chosen ranks.
        requests_at_other: the same mean at the other policy's ranks.
        expected_ms_at_choice: mean expected time to first token (`least_work`'s estimate) at the chosen ranks.
            Null if the ring has no tokens and step times.
        expected_ms_at_other: the same mean at the other policy's ranks.
        cached_tokens_at_choice: mean of the prompt tokens that the chosen ranks had cached, over the requests that
            came with a prompt. Null if none did.
        cached_tokens_at_other: the same mean at the other policy's ranks.
        age_ms_p50: median age of the oldest report that a decision used.
        age_ms_p99: 99th percentile of the same age.
    """

    group: str
    frontend: int
    policy: str
    decisions: int
    agreed: int
    by_rank: list[int]
    other_by_rank: list[int]
    requests_at_choice: float
    requests_at_other: float
    expected_ms_at_choice: float | None
    expected_ms_at_other: float | None
    cached_tokens_at_choice: float | None
    cached_tokens_at_other: float | None
    age_ms_p50: float | None
    age_ms_p99: float | None


def replay(decisions: Iterable[Decision], policy: Policy) -> list[Replayed]:
    """Asks a policy about each decision.

    Raises:
        SettingError: the policy needs tokens and step times, and the ring has none.
    """
    sees_work = getattr(policy, "sees_work", False)
    replayed = []
    for decision in decisions:
        if sees_work and not decision.view.has_work:
            raise SettingError(
                "this policy uses tokens and step times, and the ring has none: replay a policy that counts "
                "requests"
            )
        replayed.append(Replayed(decision, decision.choice, int(policy(decision.view, decision.request))))
    return replayed


def summarise(group: str, frontend: int, policy: str, replayed: Sequence[Replayed]) -> Summary:
    """Summarises the two policies side by side.

    Raises:
        SettingError: the ring holds no decision.
    """
    if not replayed:
        raise SettingError("the ring holds no decision yet: let its front-end route some requests")
    import numpy as np

    ranks = max(len(r.decision.view.requests) for r in replayed)
    pairs = [(r.decision.view.requests, r) for r in replayed]
    has_work = all(r.decision.view.has_work for r in replayed)
    expected = [LeastWork().expected_ns(r.decision.view, r.decision.request) for r in replayed] if has_work else []
    cached = [(c, r) for r in replayed if (c := r.decision.request.cached) is not None]
    ages = [age for r in replayed if (age := max(r.decision.age_ns)) >= 0]
    p50, p99 = (float(x) / 1e6 for x in np.percentile(ages, (50, 99))) if ages else (None, None)

    def mean(values: Iterable[Any]) -> float:
        return float(np.mean([int(v) for v in values]))

    return Summary(
        group=group,
        frontend=frontend,
        policy=policy,
        decisions=len(replayed),
        agreed=sum(r.choice == r.other for r in replayed),
        by_rank=np.bincount([r.choice for r in replayed], minlength=ranks).tolist(),
        other_by_rank=np.bincount([r.other for r in replayed], minlength=ranks).tolist(),
        requests_at_choice=mean(counts[r.choice] for counts, r in pairs),
        requests_at_other=mean(counts[r.other] for counts, r in pairs),
        expected_ms_at_choice=mean(e[r.choice] for e, r in zip(expected, replayed, strict=True)) / 1e6
        if has_work
        else None,
        expected_ms_at_other=mean(e[r.other] for e, r in zip(expected, replayed, strict=True)) / 1e6
        if has_work
        else None,
        cached_tokens_at_choice=mean(c[r.choice] for c, r in cached) if cached else None,
        cached_tokens_at_other=mean(c[r.other] for c, r in cached) if cached else None,
        age_ms_p50=p50,
        age_ms_p99=p99,
    )


def rows(replayed: Iterable[Replayed]) -> Iterator[dict[str, float]]:
    """One row of a table for each decision and rank: the load that was seen, and whether the rank was chosen."""
    for r in replayed:
        d, view = r.decision, r.decision.view
        unknown = [-1] * len(view.requests)
        tokens = view.work.tokens if view.has_work else unknown
        cached = unknown if d.request.cached is None else d.request.cached
        for rank in range(len(view.requests)):
            yield {
                "number": d.number,
                "time_ns": d.time_ns,
                "prompt_tokens": d.request.prompt_tokens,
                "dp_rank": rank,
                "waiting": view.waiting[rank],
                "running": view.running[rank],
                "kv_cache_permille": round(view.kv_cache_usage[rank] * 1000),
                "in_flight": view.in_flight[rank],
                "own": view.own[rank],
                "weight": view.weights[rank],
                "age_ns": d.age_ns[rank],
                "outstanding_tokens": tokens[rank],
                "cached_tokens": cached[rank],
                "chosen": int(rank == r.choice),
                "other": int(rank == r.other),
            }


def export(path: Path, replayed: Sequence[Replayed]) -> None:
    """Writes `rows` to a CSV or, with pyarrow, a Parquet file, by the name's ending.

    Raises:
        SettingError: another ending, pyarrow is missing, or the file cannot be written.
    """
    if path.suffix not in FORMATS:
        raise SettingError(f"cannot export to {path}: name a file that ends in {' or '.join(FORMATS)}")
    table = list(rows(replayed))
    try:
        if path.suffix == ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(table[0]) if table else [])
                writer.writeheader()
                writer.writerows(table)
            return
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise SettingError("Parquet needs pyarrow: pip install 'dpshm[parquet]', or export to .csv") from None
        pq.write_table(pa.Table.from_pylist(table), path)
    except OSError as e:
        raise SettingError(f"cannot write {path}: {e.strerror}") from e
