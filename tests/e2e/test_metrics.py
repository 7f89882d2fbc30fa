"""Metrics as Prometheus scrapes them, and the dashboard and the alert rules that name them."""

from __future__ import annotations

import json
import re
import threading
import urllib.error
import urllib.request
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from dpshm import Coordinator, Engine, Frontend, SettingError
from dpshm.board.layout import DROP_REASONS
from dpshm.coordinator import wave_thread
from dpshm.ops.web import Server
from dpshm.rules import liveness
from dpshm.version import __version__
from tests.e2e.load import LoadedGroup, run, stat
from tests.support import HOUR_NS, TIMEOUT_S, Remote, StockFrontend, wait_until


def scrape(address: tuple[str, int]) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """The samples by name and labels, through prometheus-client's own parser; names are checked on the way."""
    with urllib.request.urlopen(f"http://{address[0]}:{address[1]}/metrics", timeout=TIMEOUT_S) as answer:
        text = answer.read().decode()
    samples: dict[str, Any] = {}
    for family in text_string_to_metric_families(text):
        assert re.fullmatch(r"dpshm_[a-z_]+", family.name)
        assert family.documentation.endswith("."), family.name
        assert family.type != "unknown", family.name
        for sample in family.samples:
            labels = tuple(sorted(sample.labels.items()))
            assert labels not in samples.setdefault(sample.name, {}), sample
            samples[sample.name][labels] = sample.value
    return samples


@pytest.fixture
def coordinator(group, using):
    """A coordinator of two ranks with metrics."""
    return using(Coordinator(group=group, dp_size=2, metrics_port=0))


@pytest.fixture
def busy(group, using, coordinator, monkeypatch):
    """The same with an engine, a front-end and a wave behind them; the engine is never silent."""
    monkeypatch.setattr(liveness, "SILENT_MIN_NS", HOUR_NS)
    engine = using(Engine.attach(group, 0))
    frontend = using(Frontend.attach(group, owner='api "1"\\'))
    route = frontend.route(100, dp_rank=0)
    wait_until(engine.poll)
    engine.receive(route.stamp)
    for _ in range(3):
        engine.receive(None)
    with engine.step(prefill_tokens=100, batch=2):
        pass
    with engine.step():
        pass
    engine.finished(3)
    engine.publish(waiting=4, running=5, kv_cache_usage=0.25, prefill_backlog=60)
    wait_until(lambda: stat(group)["phase"] == "running")
    wait_until(coordinator.board.wake_bucket.any)  # it is counted once the board shows the phase
    return coordinator


def test_latencies_are_histograms_that_outlive_their_front_end(group, using, coordinator):
    """Guards against histograms that Prometheus cannot sum, and counters that fall when an API server dies."""
    using(Engine.attach(group, 0))
    for seconds in (0.0, 0.002):
        api = using(Remote())
        api.run(
            "frontend = Frontend.attach(group, owner='api'); route = frontend.route(dp_rank=0, wake=False)\n"
            "import time; time.sleep(seconds); route.first_token(1.0); route.done(2)",
            group=group,
            seconds=seconds,
        )
        api.kill()
        wait_until(lambda: stat(group)["frontends"][0]["state"] == "dead")
    found = scrape(coordinator.metrics_address)
    for name in ("time_to_first_token", "queue_time", "time_per_output_token"):
        buckets = {
            dict(labels)["le"]: value
            for labels, value in found[f"dpshm_rank_{name}_seconds_bucket"].items()
            if dict(labels)["dp_rank"] == "0"
        }
        assert list(buckets.values()) == sorted(buckets.values()), name
        assert buckets["+Inf"] == 2, name
        assert found[f"dpshm_rank_{name}_seconds_count"][("dp_rank", "0"), ("group", group)] == 2
        assert found[f"dpshm_rank_{name}_seconds_sum"][("dp_rank", "0"), ("group", group)] > 0
    assert found["dpshm_rank_queue_time_seconds_sum"][("dp_rank", "0"), ("group", group)] == 2
    assert found["dpshm_rank_queue_time_seconds_count"][("dp_rank", "1"), ("group", group)] == 0


def test_a_scrape_says_what_the_board_says(group, busy):
    """Guards against a metric that shows another one's value, or a label that is wrong."""
    found = scrape(busy.metrics_address)

    def one(name: str, **labels: str) -> float:
        return found[name][tuple(sorted({"group": group, **labels}.items()))]

    assert one("dpshm_rank_waiting_requests", dp_rank="0") == 4
    assert one("dpshm_rank_running_requests", dp_rank="0") == 5
    assert one("dpshm_rank_kv_cache_usage_ratio", dp_rank="0") == pytest.approx(0.25, abs=1e-4)
    assert one("dpshm_rank_prefill_backlog_tokens", dp_rank="0") == 60
    assert one("dpshm_rank_steps_total", dp_rank="0") == 2
    assert one("dpshm_rank_dummy_steps_total", dp_rank="0") == 1
    assert one("dpshm_rank_requests_finished_total", dp_rank="0") == 3
    assert one("dpshm_rank_generation_tokens_total", dp_rank="0") == 2
    assert one("dpshm_rank_state", dp_rank="0", state="running") == 1
    assert one("dpshm_rank_state", dp_rank="1", state="absent") == 1
    assert sum(v for k, v in found["dpshm_rank_state"].items() if ("dp_rank", "1") in k) == 1
    assert one("dpshm_rank_routable", dp_rank="1") == 0
    assert one("dpshm_frontend_requests_routed_total", frontend="0", owner='api "1"\\') == 1
    assert one("dpshm_build_info", version=__version__) == 1
    assert one("dpshm_coordinator_up") == 1
    assert one("dpshm_waves_started_total") == 1
    assert one("dpshm_phase", phase="running") == 1
    assert one("dpshm_balance_ratio") == 1
    # The wake-up above, once, in cumulative buckets.
    buckets = [v for k, v in found["dpshm_wake_seconds_bucket"].items()]
    assert buckets == sorted(buckets)
    assert one("dpshm_wake_seconds_bucket", le="+Inf") == one("dpshm_wake_seconds_count") == 1
    assert 0 <= one("dpshm_wake_seconds_sum") < 30
    with pytest.raises(KeyError):
        one("dpshm_rank_stats_age_seconds", dp_rank="1")  # never published: no age, not age 0


def test_dropped_messages_have_their_reason(group, using, coordinator):
    """Guards against drops that cannot be told apart."""
    peer = using(StockFrontend(coordinator.stats_publish_address))
    peer.send(b"\xc1 no message")
    wait_until(lambda: coordinator.dropped)
    found = scrape(coordinator.metrics_address)["dpshm_messages_dropped_total"]
    assert found == {
        (("group", group), ("reason", reason)): int(reason == "malformed message") for reason in DROP_REASONS
    }


def test_every_reason_of_a_drop_is_known():
    """Guards against a reason that the board has no word for: its message would end in an exception."""
    source = Path(wave_thread.__file__).read_text(encoding="utf-8")
    assert sorted(re.findall(r"_drop\(\s*\"([^\"]+)\"", source)) == sorted(DROP_REASONS)


def test_metrics_outlive_the_coordinator(group, using):
    """Guards against alerts that go blind with the coordinator, and drops that its successor counts again."""
    first = using(Remote())
    first.run("coordinator = Coordinator(group=group, dp_size=1)", group=group)
    peer = using(StockFrontend(first.eval("coordinator.stats_publish_address")))
    peer.send(b"\xc1 no message")
    server = using(Server(group))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    address = ("127.0.0.1", server.server_port)
    engine = using(Engine.attach(group, 0))
    engine.publish(waiting=2, running=0)

    def one(name: str, **labels: str) -> float:
        return scrape(address)[name].get(tuple(sorted({"group": group, **labels}.items())), -1)

    def malformed() -> float:
        return one("dpshm_messages_dropped_total", reason="malformed message")

    try:
        wait_until(lambda: malformed() == 1 and one("dpshm_coordinator_up") == 1)
        first.kill()
        wait_until(lambda: one("dpshm_coordinator_up") == 0)
        assert one("dpshm_rank_waiting_requests", dp_rank="0") == 2
        with Coordinator(group=group, dp_size=1):
            wait_until(lambda: one("dpshm_coordinator_up") == 1)
            assert malformed() == 1
            engine.close()
        assert one("dpshm_coordinator_up") == 0
    finally:
        server.shutdown()


def test_every_metric_that_the_dashboard_and_the_alerts_name_is_exported(busy):
    """Guards against panels that stay empty and alerts that never fire, because a metric was renamed."""
    exported = set(scrape(busy.metrics_address))
    board = json.loads(run("dashboard").stdout)
    rules = yaml.safe_load(run("dashboard", "--alerts").stdout)["groups"][0]["rules"]
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    expressions += [v["query"] for v in board["templating"]["list"]] + [rule["expr"] for rule in rules]
    named = {name for expression in expressions for name in re.findall(r"\bdpshm_\w+", expression)}
    assert len(named) > 15
    assert named <= exported
    # And nothing that is exported of a rank is forgotten.
    shown = {name for name in exported if name.startswith("dpshm_rank_")}
    assert shown - named <= {"dpshm_rank_step_age_seconds", "dpshm_rank_incarnation"}


def test_the_dashboard_is_whole():
    """Guards against panels that lie over each other, and a dashboard that names a server."""
    board = json.loads(run("dashboard").stdout)
    cells = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        area = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & area, panel["title"]
        assert max(x for x, _ in area) < 24
        cells |= area
        assert panel["datasource"]["uid"] == "${source}"
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_the_dashboard_tells_groups_and_nodes_apart():
    """Guards against one curve, or one number, for the ranks of two groups or of two nodes of a group."""
    board = json.loads(run("dashboard").stdout)
    assert {"group", "instance", "rank"} <= {variable["name"] for variable in board["templating"]["list"]}
    for panel in board["panels"]:
        for target in panel["targets"]:
            expression, legend = target["expr"], target["legendFormat"]
            assert expression.count("{group=~") == len(re.findall(r"dpshm_\w+", expression)), expression
            assert expression.count('instance=~"$instance"') == expression.count("{group=~"), expression
            assert legend.startswith("{{group}} {{instance}}"), panel["title"]
            for kept in re.findall(r" by \(([^)]*)\)", expression):
                assert {"group", "instance"} <= set(kept.split(", ")), expression


def test_every_alert_says_what_it_means_and_what_to_do():
    """Guards against a page at night that says nothing, and against braces in a rule that do not pair."""
    rules = yaml.safe_load(run("dashboard", "--alerts").stdout)["groups"][0]["rules"]
    assert len(rules) >= 10
    for rule in rules:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert len(rule["annotations"]["description"]) > 30
        for text in (rule["expr"], *rule["annotations"].values()):
            for a, b in ("()", "[]", "{}"):
                assert text.count(a) == text.count(b), rule["alert"]


def test_a_port_that_is_taken_is_named(group, using, coordinator):
    """Guards against a coordinator that comes up without the metrics that it was told to serve."""
    port = coordinator.metrics_address[1]
    with pytest.raises(SettingError, match=rf"cannot listen on 127.0.0.1:{port}: .*metrics_port"):
        Coordinator(group=f"{group}-2", dp_size=1, metrics_port=port)


def test_metrics_end_with_the_coordinator(group):
    """Guards against a port that stays taken, and a scrape of released memory."""
    with Coordinator(group=group, dp_size=1, metrics_port=0) as coordinator:
        address = coordinator.metrics_address
        scrape(address)
    with pytest.raises(urllib.error.URLError):
        scrape(address)


@pytest.mark.slow
def test_scrapes_under_load(group):
    """Guards against counters that fall, or fail, while engines and front-ends store."""
    with LoadedGroup(group, ranks=3, rate=30, metrics_port=0) as loaded:
        wait_until(lambda: sum(r["requests_finished"] for r in stat(group)["ranks"]) > 3)
        seen = [scrape(loaded.coordinator.metrics_address) for _ in range(20)]
    for before, after in pairwise(seen):
        for name in after:
            if name.endswith("_total"):
                assert all(after[name][labels] >= value for labels, value in before[name].items()), name
