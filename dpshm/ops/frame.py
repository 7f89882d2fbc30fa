"""A frame: the state of a group at one moment, as `dpshm stat --json` prints it. All tools share this schema.

`top`, `stat`, the metrics and the web page show these fields and no others. Within a schema version fields are
only added; a field that is removed or changes its meaning makes a new version. An unknown rate or age is null.
Ages are unknown where the clocks of reader and writer differ (another time namespace); rates are unknown in the
first frame and across a restart.
"""

from __future__ import annotations

import msgspec

from dpshm.rules.liveness import State

SCHEMA_VERSION = 1


class Coordinator(msgspec.Struct, frozen=True, kw_only=True):
    """The group's coordinator.

    Attributes:
        state: alive; silent (it holds its lock, its beat does not move: stopped or wedged); none.
        epoch: how many coordinators this board has had.
        beat_age_s: since its watch thread's last round.
        ready: whether all ranks have been attached at the same time.
        version: its version of dpshm.
        wakes_by_limit_ms: number of wake-ups by upper limit of their duration, not cumulative; "inf" is the rest.
        wake_s: total duration of all wake-ups.
        drops_by_reason: number of dropped messages by reason; every reason that is known has an item.
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
    drops_by_reason: dict[str, int] = msgspec.field(default_factory=dict)


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """How long requests took.

    Attributes:
        count: requests that were measured.
        mean_s: null without requests, as the two after it.
        p50_s: half of them took no longer; interpolated in a bucket that is 1.6 times as wide as the one before.
        p99_s: 99 of 100 took no longer.
    """

    count: int
    mean_s: float | None
    p50_s: float | None
    p99_s: float | None


class Rank(msgspec.Struct, frozen=True, kw_only=True):
    """One engine.

    Attributes:
        state: running, idle, waking, paused (by the user), silent (it has work and showed no sign of life for many
            of its steps), drained, stalled, stuck (it has work and makes no progress), unknown (on another node,
            and not heard for a moment), dead, absent.
        routable: whether front-ends may choose it.
        stock: whether it is an engine without dpshm, whose load the coordinator writes.
        remote: whether it is on another node, and the coordinator writes its row as it, or its node's relay, says.
        waiting: requests in its queue.
        running: requests in its batch.
        in_flight: requests sent to it that it has not received.
        requests: the sum of the three.
        prefill_backlog: prompt tokens to compute, including those of requests in flight.
        kv_cache_usage: 0 to 1.
        age_s: since its last publish.
        step_age_s: since its present step began; null between steps.
        step_ms: mean time of a step over the rates' window.
        busy: share of the window spent in steps.
        requests_per_s: requests finished.
        prompt_tokens_per_s: prompt tokens computed.
        generation_tokens_per_s: tokens generated.
        steps: this and the five fields after it count since this incarnation began.
        held_tokens: tokens of context of the running requests, computed or cached.
        has_index: whether front-ends can see what its KV cache holds (the prefix index).
        block_tokens: tokens a block of its KV cache; 0 if it does not say, as the fields after it.
        num_blocks: blocks of its KV cache.
        blocks_in_use: blocks that requests hold.
        cached_tokens: prompt tokens that were found in the cache, since this incarnation began.
        indexed_blocks: different blocks in the prefix index.
        dropped_blocks: blocks that found no place in it.
        index_fill: blocks in the prefix index, of all blocks of the KV cache; null without an index.
        cached_share: prompt tokens found in the cache, of all prompt tokens of the rates' window.
        preemptions: requests that lost their place in the batch, since this incarnation began.
        ttft: time to first token: from the front-end's decision until the token was there. Null, as the two after
            it, where this user may not read the front-ends' histograms.
        queue: time in the engine's queue.
        per_token: time per output token after the first.
    """

    dp_rank: int
    state: State
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
    remote: bool = False
    has_index: bool = False
    block_tokens: int = 0
    num_blocks: int = 0
    blocks_in_use: int = 0
    held_tokens: int = 0
    cached_tokens: int = 0
    indexed_blocks: int = 0
    dropped_blocks: int = 0
    index_fill: float | None = None
    step_ms: float | None = None
    busy: float | None = None
    requests_per_s: float | None = None
    prompt_tokens_per_s: float | None = None
    generation_tokens_per_s: float | None = None
    cached_share: float | None = None
    preemptions: int = 0
    ttft: Latency | None = None
    queue: Latency | None = None
    per_token: Latency | None = None

    @property
    def label(self) -> str:
        """The rank's number; of one on another node with a sign."""
        return f"@{self.dp_rank}" if self.remote else str(self.dp_rank)


class Frontend(msgspec.Struct, frozen=True, kw_only=True):
    """One front-end.

    Attributes:
        state: alive, dead, absent (it left).
        age_s: since its last decision.
        routed: requests sent since the row was first used.
        sent_by_rank: these requests by rank. A cancelled booking lowers it; else it only grows.
        in_flight_by_rank: requests in flight by rank.
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
    """The state of one group at one moment.

    Attributes:
        schema_version: the version of this schema.
        time: when the board was read, in seconds since 1970.
        monotonic_s: the same time on CLOCK_MONOTONIC, for intervals.
        linked: whether the segment still has its name, so that new processes can attach.
        balancing: internal, hybrid or external load balancing.
        head: where front-ends connect to the coordinator of another node that this one follows; null: it follows
            none. Ranks of other nodes are then absent here.
        waves: whether ranks run in lockstep.
        phase: paused, waking or running.
        revision: number of changes of marks so far.
        waves_per_minute: waves started per minute in the rates' window; null for a dense group.
        balance: most requests on a routable rank divided by the mean; null without requests.
        rates_over_s: length of the rates' window.
        ttft: of all ranks together, as the two after it.
        beyond: ranks that are attached and not of the group, because it has fewer; they get no requests.
        latency_over_s: length of the window of ttft, queue and per_token; null: they count since the group began.
    """

    schema_version: int
    time: float
    monotonic_s: float
    group: str
    linked: bool
    balancing: str
    head: str | None
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
    ttft: Latency | None
    queue: Latency | None
    per_token: Latency | None
    latency_over_s: float | None
    beyond: list[int]
