"""Builds a Grafana dashboard of the metrics of `dpshm.ops.metrics` from a table of panels.

The alert rules are in a file beside this one. Dashboard and rules need a data source of type Prometheus and name
no server. A group may live on several nodes, and several groups on one, so every curve keeps the group and the
instance. A test checks that `dpshm.ops.metrics` exports every metric that they use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

ALERTS = Path(__file__).with_name("alerts.yaml")
_G = 'group=~"$group", instance=~"$instance"'
_WHERE = "{{group}} {{instance}}"
_R = f'{_G}, dp_rank=~"$rank"'


class Panel(NamedTuple):
    """One panel: its title, its unit in Grafana's words, and its curves (expression, legend)."""

    title: str
    unit: str
    curves: list[tuple[str, str]]
    kind: str = "timeseries"
    width: int = 12
    help: str = ""


def _rank(metric: str) -> list[tuple[str, str]]:
    return [(f"{metric}{{{_R}}}", f"{_WHERE} rank {{{{dp_rank}}}}")]


def _rate(metric: str) -> list[tuple[str, str]]:
    return [(f"rate({metric}{{{_R}}}[$__rate_interval])", f"{_WHERE} rank {{{{dp_rank}}}}")]


def _latency(title: str, metric: str, help_: str) -> Panel:
    """p50 and p99 by rank, and the mean of all ranks."""
    curves = [
        (
            f"histogram_quantile({share}, sum by (group, instance, dp_rank, le) "
            f"(rate({metric}_bucket{{{_R}}}[$__rate_interval])))",
            f"{_WHERE} rank {{{{dp_rank}}}} {name}",
        )
        for share, name in ((0.5, "p50"), (0.99, "p99"))
    ]
    sums = (
        f"sum by (group, instance) (rate({metric}_{part}{{{_R}}}[$__rate_interval]))" for part in ("sum", "count")
    )
    return Panel(title, "s", [*curves, (" / ".join(sums), f"{_WHERE} mean")], help=help_)


PANELS = (
    Panel("Coordinator", "bool_on_off", [(f"dpshm_coordinator_up{{{_G}}}", _WHERE)], "stat", 4),
    Panel(
        "Ranks to route to",
        "short",
        [(f"sum by (group, instance) (dpshm_rank_routable{{{_G}}})", _WHERE)],
        "stat",
        4,
    ),
    Panel(
        "Ranks out of routing",
        "short",
        [
            (
                "sum by (group, instance, state) "
                f'(dpshm_rank_state{{{_G}, state=~"dead|stalled|stuck|unknown|silent|drained|absent"}}) > 0',
                f"{_WHERE} {{{{state}}}}",
            )
        ],
        "stat",
        4,
    ),
    Panel(
        "Balance",
        "short",
        [(f"dpshm_balance_ratio{{{_G}}}", _WHERE)],
        "stat",
        4,
        "Most requests on a rank over their mean: 1 is even.",
    ),
    Panel("Waves a minute", "short", [(f"rate(dpshm_waves_started_total{{{_G}}}[5m]) * 60", _WHERE)], "stat", 4),
    Panel(
        "Wake-up, p99",
        "s",
        [
            (
                "histogram_quantile(0.99, sum by (group, instance, le) "
                f"(rate(dpshm_wake_seconds_bucket{{{_G}}}[5m])))",
                _WHERE,
            )
        ],
        "stat",
        4,
        "Time from the coordinator's first message about a wake-up until an engine ran.",
    ),
    Panel("Waiting requests", "short", _rank("dpshm_rank_waiting_requests")),
    Panel("Running requests", "short", _rank("dpshm_rank_running_requests")),
    _latency(
        "Time to first token",
        "dpshm_rank_time_to_first_token_seconds",
        "From the decision of a front-end until it had the first token.",
    ),
    _latency(
        "Time per output token",
        "dpshm_rank_time_per_output_token_seconds",
        "The mean of each request, first token excepted.",
    ),
    _latency("Time in the queue", "dpshm_rank_queue_time_seconds", "As the engine tells it."),
    Panel(
        "Preemptions",
        "short",
        _rate("dpshm_rank_preemptions_total"),
        help="Requests that lost their place in the batch, for want of KV cache.",
    ),
    Panel("KV cache", "percentunit", _rank("dpshm_rank_kv_cache_usage_ratio")),
    Panel("Tokens of context of running requests", "short", _rank("dpshm_rank_held_tokens")),
    Panel(
        "KV-cache blocks in use",
        "percentunit",
        [
            (
                f"dpshm_rank_kv_blocks_in_use{{{_R}}} / dpshm_rank_kv_blocks{{{_R}}}",
                f"{_WHERE} rank {{{{dp_rank}}}}",
            )
        ],
    ),
    Panel("Blocks in the prefix index", "short", _rank("dpshm_rank_indexed_blocks")),
    Panel(
        "Blocks without a place in the prefix index",
        "short",
        _rank("dpshm_rank_dropped_blocks"),
        help="They are computed again. Above 0 the index is too small, which should not happen.",
    ),
    Panel(
        "Prefill backlog", "short", _rank("dpshm_rank_prefill_backlog_tokens"), help="Prompt tokens to compute."
    ),
    Panel(
        "In-flight requests",
        "short",
        _rank("dpshm_rank_in_flight_requests"),
        help="Requests sent and not yet received.",
    ),
    Panel("Age of stats", "s", _rank("dpshm_rank_stats_age_seconds"), help="Time since the rank's last publish."),
    Panel("Tokens generated", "short", _rate("dpshm_rank_generation_tokens_total")),
    Panel(
        "Prompt tokens cached",
        "short",
        _rate("dpshm_rank_cached_tokens_total"),
        help="Prompt tokens that ranks found in their KV cache.",
    ),
    Panel("Prompt tokens computed", "short", _rate("dpshm_rank_prompt_tokens_total")),
    Panel("Requests finished", "reqps", _rate("dpshm_rank_requests_finished_total")),
    Panel(
        "Mean step",
        "s",
        [
            (
                f"rate(dpshm_rank_step_seconds_total{{{_R}}}[$__rate_interval]) "
                f"/ rate(dpshm_rank_steps_total{{{_R}}}[$__rate_interval])",
                f"{_WHERE} rank {{{{dp_rank}}}}",
            )
        ],
    ),
    Panel(
        "Share of dummy steps",
        "percentunit",
        [
            (
                f"rate(dpshm_rank_dummy_steps_total{{{_R}}}[$__rate_interval]) "
                f"/ rate(dpshm_rank_steps_total{{{_R}}}[$__rate_interval])",
                f"{_WHERE} rank {{{{dp_rank}}}}",
            )
        ],
        help="Steps without work, which keep a rank in step with the others.",
    ),
    Panel("Balance over time", "short", [(f"dpshm_balance_ratio{{{_G}}}", _WHERE)]),
    Panel(
        "Requests sent by front-end",
        "reqps",
        [
            (
                f"rate(dpshm_frontend_requests_routed_total{{{_G}}}[$__rate_interval])",
                f"{_WHERE} {{{{frontend}}}} {{{{owner}}}}",
            )
        ],
    ),
    Panel(
        "Messages dropped",
        "short",
        [(f"rate(dpshm_messages_dropped_total{{{_G}}}[$__rate_interval])", f"{_WHERE} {{{{reason}}}}")],
    ),
)


def dashboard() -> dict[str, Any]:
    """The dashboard, ready for Grafana's import."""
    return {
        "title": "dpshm",
        "uid": "dpshm",
        "description": "Data-parallel ranks of LLM deployments, from the board of each group.",
        "tags": ["llm", "dpshm"],
        "schemaVersion": 39,
        "refresh": "5s",
        "time": {"from": "now-30m", "to": "now"},
        "editable": True,
        "templating": {
            "list": [
                {"name": "source", "label": "Data source", "type": "datasource", "query": "prometheus"},
                _variable("group", "Group", "label_values(dpshm_ranks, group)"),
                _variable("instance", "Instance", 'label_values(dpshm_ranks{group=~"$group"}, instance)'),
                _variable("rank", "Rank", f"label_values(dpshm_rank_routable{{{_G}}}, dp_rank)"),
            ]
        },
        "panels": _place(),
    }


def _variable(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${source}"},
        "query": query,
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "current": {"text": "All", "value": "$__all"},
    }


def _place() -> list[dict[str, Any]]:
    """The panels from left to right, a new row where the next does not fit in 24 columns."""
    placed, x, y, height = [], 0, 0, 0
    for number, panel in enumerate(PANELS, 1):
        if x + panel.width > 24:
            x, y = 0, y + height
        height = 4 if panel.kind == "stat" else 8
        placed.append(_panel(number, panel, {"x": x, "y": y, "w": panel.width, "h": height}))
        x += panel.width
    return placed


def _panel(number: int, panel: Panel, position: dict[str, int]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${source}"}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.help,
        "gridPos": position,
        "datasource": source,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": source, "expr": expression, "legendFormat": legend}
            for i, (expression, legend) in enumerate(panel.curves)
        ],
    }
