"""What one look at a group found, as `dpshm stat --json` prints it: the one schema that all tools share.

`top`, `stat`, the metrics and the web page show these fields and no others. Fields are only added within a
schema version; one that is removed or changes its meaning makes a new version. A rate or an age that cannot be
known is null: ages where the clocks of reader and writer differ (another time namespace), rates on a first look
or across a restart.
"""

from __future__ import annotations

import msgspec

SCHEMA_VERSION = 1


class Coordinator(msgspec.Struct, frozen=True, kw_only=True):
    """The group's coordinator.

    Attributes:
        state: alive; silent (it holds its lock, its beat does not move: stopped or wedged); none.
        epoch: how many coordinators this board has had.
        beat_age_s: since its watch thread's last round.
        ready: all ranks were there once.
        version: of its dpshm.
        wakes_by_limit_ms: how many wake-ups took at most so long, not cumulative; "inf" holds the rest.
        wake_s: how long all wake-ups took together.
    """

    state: str
    pid: int
    epoch: int
    beat_age_s: float | None
    ready: bool
    version: str
    waves_started: int
    starts_sent: int
    states_published: int
    counts_published: int
    messages_received: int
    messages_dropped: int
    wakes_by_limit_ms: dict[str, int]
    wake_s: float


class Rank(msgspec.Struct, frozen=True, kw_only=True):
    """One engine.

    Attributes:
        state: running, idle, waking, paused (by the user), silent (it has work and showed no sign of life for many
            of its steps), drained, stalled, stuck (it has work and makes no progress), dead, absent.
        routable: front-ends may choose it.
        stock: it has no row of its own; the coordinator writes its load on its behalf.
        waiting: requests in its queue.
        running: requests in its batch.
        in_flight: requests sent to it that it has not taken in.
        requests: the sum of the three.
        prefill_backlog: prompt tokens to compute, those of in flight requests among them.
        kv_cache_usage: 0 to 1.
        age_s: since its last publish.
        step_age_s: since its present step began; null between steps.
        step_ms: mean time of a step over the rates' window.
        busy: share of the window spent in steps.
        requests_per_s: finished.
        prompt_tokens_per_s: computed.
        generation_tokens_per_s: generated.
        steps: and the five after it: counters since this incarnation began.
    """

    dp_rank: int
    state: str
    routable: bool
    drained: bool
    stock: bool
    waiting: int
    running: int
    in_flight: int
    requests: int
    prefill_backlog: int
    kv_cache_usage: float
    wave: int
    step: int
    age_s: float | None
    step_age_s: float | None
    pid: int
    incarnation: int
    version: str
    steps: int
    dummy_steps: int
    busy_s: float
    prompt_tokens: int
    generation_tokens: int
    requests_finished: int
    step_ms: float | None = None
    busy: float | None = None
    requests_per_s: float | None = None
    prompt_tokens_per_s: float | None = None
    generation_tokens_per_s: float | None = None


class Frontend(msgspec.Struct, frozen=True, kw_only=True):
    """One front-end.

    Attributes:
        state: alive, dead, absent (it left).
        age_s: since its last decision.
        routed: requests it has sent since the row was first taken.
        sent_by_rank: how many of them each rank got; grows, except for bookings taken back.
        in_flight_by_rank: of these, those on their way now.
    """

    index: int
    owner: str
    state: str
    age_s: float | None
    pid: int
    incarnation: int
    version: str
    routed: int
    in_flight: int
    sent_by_rank: list[int]
    in_flight_by_rank: list[int]
    routed_per_s: float | None = None


class Frame(msgspec.Struct, frozen=True, kw_only=True):
    """One look at one group.

    Attributes:
        schema_version: of this schema.
        time: of the look, seconds since 1970.
        monotonic_s: the same on CLOCK_MONOTONIC, for intervals.
        linked: the segment still has its name: new processes can attach.
        balancing: internal, hybrid or external load balancing.
        waves: whether ranks run in lockstep.
        phase: paused, waking or running.
        revision: how many changes of marks there have been.
        waves_per_minute: started, over the rates' window; null for a dense group.
        balance: the most requests on a rank over their mean, over the routable ranks; null when there are none.
        rates_over_s: the window of the rates.
    """

    schema_version: int
    time: float
    monotonic_s: float
    group: str
    linked: bool
    balancing: str
    waves: bool
    dp_size: int
    max_engines: int
    max_frontends: int
    wave: int
    phase: str
    revision: int
    waves_per_minute: float | None
    balance: float | None
    rates_over_s: float | None
    coordinator: Coordinator
    ranks: list[Rank]
    frontends: list[Frontend]
