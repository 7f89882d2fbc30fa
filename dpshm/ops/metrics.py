"""Metrics for Prometheus. Each scrape reads the board anew; no state is kept between scrapes.

`BoardCollector` turns a frame (`dpshm.ops.frame`) into metric families. `MetricsServer` serves them from a thread
of its own over a read-only handle, so a scrape that hangs delays no other thread. When an engine restarts, its
counters begin again at 0, as Prometheus expects.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus

import numpy as np
from numpy.typing import NDArray

from dpshm.board.board import Board
from dpshm.board.latency import BUCKETS, LIMITS_S, read_latencies
from dpshm.errors import SegmentError, SettingError
from dpshm.net.addresses import bare
from dpshm.ops.bounded_http import BoundedHandler, BoundedServer
from dpshm.ops.frame import Coordinator, Frame, Frontend, Rank
from dpshm.ops.read_frame import read_frame
from dpshm.rules.liveness import State
from dpshm.version import __version__

try:
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        InfoMetricFamily,
        Metric,
    )
    from prometheus_client.exposition import choose_encoder
    from prometheus_client.registry import Collector
except ImportError as e:
    raise SettingError(f"metrics need prometheus-client ({e}): pip install 'dpshm[metrics]'") from None

_UP_HELP = "1 if a coordinator lives and its watch thread runs."
_RANK_GAUGES: tuple[tuple[str, str, Callable[[Rank], float | None]], ...] = (
    ("waiting_requests", "Requests in the engine's queue.", lambda r: r.waiting),
    ("running_requests", "Requests in the engine's batch.", lambda r: r.running),
    ("in_flight_requests", "Requests sent to the engine that it has not received.", lambda r: r.in_flight),
    ("prefill_backlog_tokens", "Prompt tokens to compute, in flight included.", lambda r: r.prefill_backlog),
    ("kv_cache_usage_ratio", "Share of the KV cache in use.", lambda r: r.kv_cache_usage),
    ("stats_age_seconds", "Time since the engine's last publish.", lambda r: r.age_s),
    ("step_age_seconds", "Time since the present step began; 0 between steps.", lambda r: r.step_age_s or 0.0),
    ("routable", "1 if front-ends may choose the engine.", lambda r: int(r.routable)),
    ("incarnation", "Number of processes that have had this rank.", lambda r: r.incarnation),
    ("kv_blocks", "Blocks of the KV cache; 0 if the engine does not say.", lambda r: r.num_blocks),
    ("kv_blocks_in_use", "Blocks of the KV cache that requests hold.", lambda r: r.blocks_in_use),
    ("held_tokens", "Tokens of context of the running requests, computed or cached.", lambda r: r.held_tokens),
    ("indexed_blocks", "Blocks of prompts in the prefix index.", lambda r: r.indexed_blocks),
    ("dropped_blocks", "Blocks that found no place in the prefix index.", lambda r: r.dropped_blocks),
    ("index_fill_ratio", "Blocks in the prefix index, of all of the KV cache.", lambda r: r.index_fill),
)  # fmt: skip
_RANK_COUNTERS: tuple[tuple[str, str, Callable[[Rank], float]], ...] = (
    ("steps", "Steps of the model, including dummy steps.", lambda r: r.steps),
    ("dummy_steps", "Steps without work, which keep the rank in step with the others.", lambda r: r.dummy_steps),
    ("step_seconds", "Time spent in steps.", lambda r: r.busy_s),
    ("prompt_tokens", "Prompt tokens computed.", lambda r: r.prompt_tokens),
    ("cached_tokens", "Prompt tokens found in the KV cache.", lambda r: r.cached_tokens),
    ("generation_tokens", "Tokens generated.", lambda r: r.generation_tokens),
    ("requests_finished", "Requests that ended.", lambda r: r.requests_finished),
    ("preemptions", "Requests that lost their place in the batch.", lambda r: r.preemptions),
)
# In the order of `dpshm.board.latency.KINDS`.
_RANK_HISTOGRAMS = (
    ("time_to_first_token", "Time from a front-end's decision until the first token was there."),
    ("queue_time", "Time in the engine's queue."),
    ("time_per_output_token", "Time per output token after the first, a request."),
)
_COORDINATOR_COUNTERS: tuple[tuple[str, str, Callable[[Coordinator], float]], ...] = (
    ("waves_started", "Waves that began.", lambda c: c.waves_started),
    ("wake_ups_sent", "START messages to the engines.", lambda c: c.starts_sent),
    ("states_published", "Changes of the wave published to front-ends.", lambda c: c.states_published),
    ("counts_published", "Counts published to stock front-ends.", lambda c: c.counts_published),
    ("messages_received", "Messages from engines and front-ends.", lambda c: c.messages_received),
)


class BoardCollector(Collector):
    """Collects one group's metrics.

    Args:
        board: the group's board, attached read-only.
    """

    def __init__(self, board: Board) -> None:
        self._board = board

    def collect(self) -> Iterator[Metric]:
        """The metric families, read from the board now."""
        frame = read_frame(self._board)
        yield from self._group(frame)
        yield from self._coordinator(frame.group, frame.coordinator)
        yield from _ranks(frame.group, frame.ranks)
        yield from _frontends(frame.group, frame.frontends)
        latencies = read_latencies(self._board)
        if latencies is not None:
            yield from _latencies(frame.group, latencies)

    def _group(self, frame: Frame) -> Iterator[Metric]:
        build = InfoMetricFamily(
            "dpshm_build", "The version of dpshm that serves these metrics.", labels=["group"]
        )
        build.add_metric([frame.group], {"version": __version__})
        yield build
        yield _read_now(frame.group)
        yield _gauge("dpshm_ranks", "Ranks that take part.", frame.group, frame.dp_size)
        yield _gauge("dpshm_wave", "The request wave.", frame.group, frame.wave)
        phase = GaugeMetricFamily(
            "dpshm_phase", "1 for the phase that the ranks are in.", labels=["group", "phase"]
        )
        for name in ("paused", "waking", "running"):
            phase.add_metric([frame.group, name], int(frame.phase == name))
        yield phase
        if frame.balance is not None:
            help_ = "Most requests on a routable rank over their mean; absent without requests."
            yield _gauge("dpshm_balance_ratio", help_, frame.group, frame.balance)

    def _coordinator(self, group: str, c: Coordinator) -> Iterator[Metric]:
        yield _gauge("dpshm_coordinator_up", _UP_HELP, group, int(c.state == "alive"))
        yield _gauge("dpshm_coordinator_epoch", "Number of coordinators that the board has had.", group, c.epoch)
        for name, help_, get in _COORDINATOR_COUNTERS:
            yield _counter(f"dpshm_{name}", help_, group, get(c))
        dropped = CounterMetricFamily(
            "dpshm_messages_dropped", "Messages that were dropped, by reason.", labels=["group", "reason"]
        )
        # Every reason from the start, at 0: the first burst of a series that is new is no increase for Prometheus.
        for reason, value in c.drops_by_reason.items():
            dropped.add_metric([group, reason], value)
        yield dropped
        yield _wake_ups(group, c)


def _wake_ups(group: str, c: Coordinator) -> Metric:
    buckets, total = [], 0
    for limit, count in c.wakes_by_limit_ms.items():
        total += count
        buckets.append(("+Inf" if limit == "inf" else f"{float(limit) / 1e3:g}", total))
    family = HistogramMetricFamily(
        "dpshm_wake_seconds",
        "Time from the coordinator's first message about a wake-up until an engine ran.",
        labels=["group"],
    )
    family.add_metric([group], buckets, c.wake_s)
    return family


def _ranks(group: str, ranks: Iterable[Rank]) -> Iterator[Metric]:
    labels = ["group", "dp_rank"]
    state = GaugeMetricFamily("dpshm_rank_state", "1 for the state that it is in.", labels=[*labels, "state"])
    gauges = [GaugeMetricFamily(f"dpshm_rank_{name}", help_, labels=labels) for name, help_, _ in _RANK_GAUGES]
    counters = [CounterMetricFamily(f"dpshm_rank_{n}", help_, labels=labels) for n, help_, _ in _RANK_COUNTERS]
    for rank in ranks:
        of = [group, str(rank.dp_rank)]
        for name in State:
            state.add_metric([*of, name], int(rank.state == name))
        for gauge, (_, _, get) in zip(gauges, _RANK_GAUGES, strict=True):
            value = get(rank)
            if value is not None:
                gauge.add_metric(of, value)
        for counter, (_, _, get) in zip(counters, _RANK_COUNTERS, strict=True):
            counter.add_metric(of, get(rank))
    yield from (state, *gauges, *counters)


def _latencies(group: str, latencies: NDArray[np.int64]) -> Iterator[Metric]:
    limits = [*(f"{limit:g}" for limit in LIMITS_S), "+Inf"]
    for kind, (name, help_) in enumerate(_RANK_HISTOGRAMS):
        family = HistogramMetricFamily(f"dpshm_rank_{name}_seconds", help_, labels=["group", "dp_rank"])
        for dp_rank, histogram in enumerate(latencies[:, kind]):
            totals = np.cumsum(histogram[:BUCKETS]).tolist()
            buckets = list(zip(limits, totals, strict=True))
            family.add_metric([group, str(dp_rank)], buckets, histogram[BUCKETS] / 1e9)
        yield family


def _frontends(group: str, frontends: Iterable[Frontend]) -> Iterator[Metric]:
    labels = ["group", "frontend", "owner"]
    up = GaugeMetricFamily("dpshm_frontend_up", "1 if the front-end lives.", labels=labels)
    age = GaugeMetricFamily(
        "dpshm_frontend_decision_age_seconds", "Time since the front-end's last decision.", labels=labels
    )
    in_flight = GaugeMetricFamily(
        "dpshm_frontend_in_flight_requests", "Requests sent and not yet received.", labels=labels
    )
    routed = CounterMetricFamily(
        "dpshm_frontend_requests_routed", "Requests that the front-end sent.", labels=labels
    )
    for frontend in frontends:
        of = [group, str(frontend.index), frontend.owner]
        up.add_metric(of, int(frontend.state == "alive"))
        if frontend.age_s is not None:
            age.add_metric(of, frontend.age_s)
        in_flight.add_metric(of, frontend.in_flight)
        routed.add_metric(of, frontend.routed)
    yield from (up, age, in_flight, routed)


def _gauge(name: str, help_: str, group: str, value: float) -> Metric:
    family = GaugeMetricFamily(name, help_, labels=["group"])
    family.add_metric([group], value)
    return family


def _read_now(group: str) -> Metric:
    """Of the groups that a target served one after another, this tells an alert which is the last."""
    return _gauge("dpshm_read_timestamp_seconds", "When these metrics were read.", group, time.time())


def _counter(name: str, help_: str, group: str, value: float) -> Metric:
    family = CounterMetricFamily(name, help_, labels=["group"])
    family.add_metric([group], value)
    return family


def collect_group(group: str, *, any_owner: bool = False) -> list[Metric]:
    """The families of a group, of this moment. Of a group that is gone, that its coordinator does not live.

    For a process that outlives the coordinator: its death, and the ranks that are dead with it, stay visible.

    Args:
        group: its name.
        any_owner: look at the board of another user too.
    """
    try:
        with Board.attach(group, any_owner=any_owner) as board:
            return list(BoardCollector(board).collect())
    except SegmentError:
        return [_gauge("dpshm_coordinator_up", _UP_HELP, group, 0), _read_now(group)]


def page(group: str) -> tuple[bytes, str]:
    """The page of any user's group in Prometheus' text format, and its content type."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_GroupCollector(group))
    return generate_latest(registry), CONTENT_TYPE_LATEST


class _GroupCollector(Collector):
    def __init__(self, group: str) -> None:
        self._group = group

    def collect(self) -> Iterator[Metric]:
        yield from collect_group(self._group, any_owner=True)


class MetricsServer:
    """Serves a group's metrics over HTTP from a thread of its own, until `close`.

    Attributes:
        address: (host, port) that it listens on.

    Raises:
        SettingError: it cannot listen there.
    """

    def __init__(self, group: str, host: str, port: int) -> None:
        self._pid = os.getpid()
        self._board = Board.attach(group)
        try:
            self._server = _Server(host, port, BoardCollector(self._board))
        except BaseException:
            self._board.close()
            raise
        self._thread = threading.Thread(target=self._server.serve_forever, name="dpshm-metrics", daemon=True)
        self._thread.start()
        self.address: tuple[str, int] = (bare(host), self._server.server_port)

    def close(self) -> None:
        """Ends the thread. Does nothing in a forked child, which has no such thread."""
        if os.getpid() != self._pid or not self._thread.is_alive():
            return
        self._server.shutdown()  # returns within the server's poll interval, half a second
        self._thread.join(timeout=5.0)
        self._server.server_close()
        self._board.close()


class _Server(BoundedServer):
    def __init__(self, host: str, port: int, collector: BoardCollector) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(collector)
        super().__init__(host, port, _Handler, settings=("metrics_host", "metrics_port (0: any)"))


class _Handler(BoundedHandler):
    server: _Server

    def do_GET(self) -> None:
        """Answers a scrape, in the format that the client prefers."""
        encode, kind = choose_encoder(self.headers.get("Accept", ""))
        body = encode(self.server.registry)
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.send_body(body)
