"""The alert rules, by Prometheus' own `promtool test rules`: when each fires, for whom, and when it does not.

The cases of one table are made for every rule: of two groups, and of one group on two nodes, only the bad one
fires; the good, and a process that starts again, fire nothing. What is special to one rule follows. A sample
comes every 15 s.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import yaml

from dpshm.board.layout import DROP_REASONS
from dpshm.ops.grafana import ALERTS

PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="promtool is not installed: Debian's package prometheus"
)

RULES: dict[str, dict[str, Any]] = {
    rule["alert"]: rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]
}
Series = dict[str, str]
"""By a metric with its labels (those of the target are added), its samples as promtool writes them."""
FOR_ALL = 1000  # samples: more than any test looks at


class Fault(NamedTuple):
    """What makes a rule fire.

    Attributes:
        series: given whether it is bad, what a target serves.
        fires_min: by then it fires.
        not_yet_min: then it does not fire yet; None: it fires at once.
        labels: of the alert, beside group, instance, job and severity.
    """

    series: Callable[[bool], Series]
    fires_min: int
    not_yet_min: float | None
    labels: dict[str, str]


def state(name: str) -> Callable[[bool], Series]:
    """A target of one rank that is in that state or runs."""
    return lambda bad: {
        f'dpshm_rank_state{{dp_rank="3",state="{name}"}}': f"{int(bad)}x{FOR_ALL}",
        'dpshm_rank_state{dp_rank="3",state="running"}': f"{int(not bad)}x{FOR_ALL}",
        "dpshm_ranks": f"8x{FOR_ALL}",
    }


def few_ranks(bad: bool) -> Series:
    """A target of four ranks, of which one or two are routable."""
    ranks = {f'dpshm_rank_routable{{dp_rank="{i}"}}': f"{int(i < (1 if bad else 2))}x{FOR_ALL}" for i in range(4)}
    return ranks | {"dpshm_ranks": f"4x{FOR_ALL}"}


def imbalance(bad: bool) -> Series:
    """A target of two ranks with load."""
    return {
        "dpshm_balance_ratio": f"{2.5 if bad else 1.5}x{FOR_ALL}",
        'dpshm_rank_running_requests{dp_rank="0"}': f"9x{FOR_ALL}",
        'dpshm_rank_running_requests{dp_rank="1"}': f"1x{FOR_ALL}",
    }


def slow_wakes(bad: bool) -> Series:
    """A target where each wake-up, one every five minutes, takes 3 s or 0.3 s."""
    wakes = " ".join(f"{i}x19" for i in range(40))
    return {
        'dpshm_wake_seconds_bucket{le="1"}': f"0x{FOR_ALL}" if bad else wakes,
        'dpshm_wake_seconds_bucket{le="5"}': wakes,
        'dpshm_wake_seconds_bucket{le="+Inf"}': wakes,
    }


def drops(bad: bool) -> Series:
    """A target that exports every reason, and drops 500 messages in the sixth minute."""
    found = {f'dpshm_messages_dropped_total{{reason="{reason}"}}': f"7x{FOR_ALL}" for reason in DROP_REASONS}
    return found | ({'dpshm_messages_dropped_total{reason="flood"}': f"0x20 500x{FOR_ALL}"} if bad else {})


def one_value(metric: str, bad_value: float, good_value: float) -> Callable[[bool], Series]:
    """A target of one series."""
    return lambda bad: {metric: f"{bad_value if bad else good_value}x{FOR_ALL}"}


RANK = '{dp_rank="3"}'
FAULTS = {
    "DpshmCoordinatorDown": Fault(one_value("dpshm_coordinator_up", 0, 1), 2, 0.5, {}),
    "DpshmRankDead": Fault(state("dead"), 2, 0.5, {"dp_rank": "3", "state": "dead"}),
    "DpshmRankStalled": Fault(state("stalled"), 2, 0.5, {"dp_rank": "3", "state": "stalled"}),
    "DpshmRankDrainedForLong": Fault(state("drained"), 125, 115, {"dp_rank": "3", "state": "drained"}),
    "DpshmFewRanksLeft": Fault(few_ranks, 2, 0.5, {}),
    "DpshmImbalance": Fault(imbalance, 11, 9, {}),
    "DpshmKvCacheFull": Fault(
        one_value(f"dpshm_rank_kv_cache_usage_ratio{RANK}", 0.96, 0.9), 11, 9, {"dp_rank": "3"}
    ),
    "DpshmInFlightRequests": Fault(
        one_value(f"dpshm_rank_in_flight_requests{RANK}", 11, 10), 6, 4, {"dp_rank": "3"}
    ),
    "DpshmSlowWakeUp": Fault(slow_wakes, 21, 9, {}),
    "DpshmMessagesDropped": Fault(drops, 6, 4.5, {"reason": "flood"}),
}


def on(series: Series, group: str = "a", node: str = "n1") -> list[dict[str, str]]:
    """Series as a target of that group serves them, in promtool's words."""
    target = f'instance="{node}:9400",job="dpshm"'
    found = []
    for name, values in series.items():
        metric, _, labels = name.partition("{")
        of_group = "" if metric == "up" else f'group="{group}",'
        found.append(
            {"series": f"{metric}{{{of_group}{target}{',' * bool(labels)}{labels or '}'}", "values": values}
        )
    return found


def alert(name: str, group: str = "a", node: str = "n1", **labels: str) -> dict[str, str]:
    """The labels of an alert."""
    severity = RULES[name]["labels"]["severity"]
    return {"severity": severity, "group": group, "instance": f"{node}:9400", "job": "dpshm", **labels}


def check(tmp_path, name: str, series: list[dict[str, str]], expected: dict[float, list[dict[str, str]]]) -> None:
    """Plays series, and compares the labels of a rule's alerts at these minutes."""
    rules = yaml.safe_load(ALERTS.read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            del rule["annotations"]  # promtool would compare them too
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(rules))
    tests = {
        "rule_files": ["alerts.yaml"],
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": series,
                "alert_rule_test": [
                    {
                        "eval_time": f"{round(minute * 60)}s",
                        "alertname": name,
                        "exp_alerts": [{"exp_labels": labels} for labels in alerts],
                    }
                    for minute, alerts in expected.items()
                ],
            }
        ],
    }
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(tests))
    done = subprocess.run(
        [PROMTOOL or "promtool", "test", "rules", "tests.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_rule_has_its_fault():
    """Guards against a rule that no test plays."""
    assert FAULTS.keys() == RULES.keys()


@pytest.mark.parametrize("name", FAULTS)
def test_annotations_name_labels_that_the_alert_has(name):
    """Guards against a page at night that reads `No coordinator of  answers`."""
    named = set(re.findall(r"\$labels\.(\w+)", str(RULES[name]["annotations"])))
    assert {"group", "instance"} <= named
    assert named <= alert(name, **FAULTS[name].labels).keys()


@needs_promtool
@pytest.mark.parametrize("name", FAULTS)
def test_the_bad_one_fires_alone(tmp_path, name):
    """Guards against an alert that never fires, that names no group, or that names another group or node."""
    fault = FAULTS[name]
    series = [
        *on(fault.series(True)),
        *on(fault.series(False), group="b"),
        *on(fault.series(False), node="n2"),
        *on(fault.series(True), group="b", node="n3"),
    ]
    both = [alert(name, **fault.labels), alert(name, group="b", node="n3", **fault.labels)]
    expected = {fault.fires_min: both} | ({} if fault.not_yet_min is None else {fault.not_yet_min: []})
    check(tmp_path, name, series, expected)


@needs_promtool
@pytest.mark.parametrize("name", FAULTS)
def test_the_good_fire_nothing(tmp_path, name):
    """Guards against an alert that a healthy group raises, also one on two nodes, or at its start."""
    fault = FAULTS[name]
    series = [*on(fault.series(False)), *on(fault.series(False), group="b"), *on(fault.series(False), node="n2")]
    check(tmp_path, name, series, {0: [], 5: [], fault.fires_min: []})


@needs_promtool
@pytest.mark.parametrize("name", FAULTS)
def test_a_restart_fires_nothing(tmp_path, name):
    """Guards against an alert for a process that was away for 45 s and counts from 0 again."""
    fault = FAULTS[name]
    series = []
    for metric, values in fault.series(False).items():
        value = values.partition("x")[0].split()[-1] if " " not in values else "5"
        counts = metric.startswith(("dpshm_messages", "dpshm_wake"))
        series += on({metric: f"{value}x20 stale _x2 {0 if counts else value}x{FOR_ALL}"})
    series += on({"up": f"1x20 0x2 1x{FOR_ALL}"})
    check(tmp_path, name, series, {5.25: [], 5.75: [], 6: [], 7: [], 7 + fault.fires_min: []})


@needs_promtool
@pytest.mark.parametrize(
    "others", [[], on({"dpshm_coordinator_up": f"1x{FOR_ALL}", "up": f"1x{FOR_ALL}"}, "b", "n2")]
)
def test_a_coordinator_that_served_its_metrics_is_killed(tmp_path, others):
    """Guards against a death that no alert tells because its series are gone, alone and beside other groups."""
    name = "DpshmCoordinatorDown"
    series = on({"dpshm_coordinator_up": "1x20 stale", "up": f"1x20 0x{FOR_ALL}"})
    expected = {5.5: [], 10: [alert(name)], 200: [alert(name)]}
    check(tmp_path, name, series + others, expected)


@needs_promtool
def test_a_target_that_is_taken_away_is_no_death(tmp_path):
    """Guards against a page for a node that was put out of service, or whose coordinator has moved to another."""
    series = on({"dpshm_coordinator_up": "1x20 stale", "up": "1x20 stale"})
    series += on({"dpshm_coordinator_up": f"_x22 1x{FOR_ALL}", "up": f"_x22 1x{FOR_ALL}"}, node="n2")
    check(tmp_path, "DpshmCoordinatorDown", series, {5.5: [], 7: [], 10: [], 60: []})


@needs_promtool
def test_groups_that_a_target_served_before_are_not_mourned(tmp_path):
    """A server whose group has a new name at each start raises one alert when it is down: of the last."""
    series = on({"up": f"1x20 0x2 1x20 0x2 1x20 0x{FOR_ALL}"})
    for at, (before, samples) in {"a": ("", 20), "b": ("_x23 ", 19), "c": ("_x46 ", 19)}.items():
        first = 15 * (0 if not before else int(before[2:]) + 1)
        own = {
            "dpshm_coordinator_up": f"{before}1x{samples} stale",
            "dpshm_read_timestamp_seconds": f"{before}{first}+15x{samples} stale",
        }
        series += on(own, f"vllm-{at}")
    lasting = {"dpshm_coordinator_up": f"1x{FOR_ALL}", "dpshm_read_timestamp_seconds": f"0+15x{FOR_ALL}"}
    series += on({"up": f"1x{FOR_ALL}"} | lasting, "vllm-a", "n2")
    name = "DpshmCoordinatorDown"
    last = [alert(name, group="vllm-c")]
    check(tmp_path, name, series, {5.5: [], 10: [], 16.5: [], 18.5: last, 60: last, 200: last})


@needs_promtool
def test_a_coordinator_that_comes_back_ends_the_alert(tmp_path):
    """Guards against an alert that stays until its memory ends."""
    series = on({"dpshm_coordinator_up": f"1x20 stale _x20 1x{FOR_ALL}", "up": f"1x20 0x20 1x{FOR_ALL}"})
    name = "DpshmCoordinatorDown"
    check(tmp_path, name, series, {8: [alert(name)], 11: []})


@needs_promtool
@pytest.mark.parametrize("name", ["DpshmRankDead", "DpshmRankStalled", "DpshmFewRanksLeft"])
def test_ranks_that_are_out_are_told_on(tmp_path, name):
    """Guards against alerts that end because the process that served the metrics has died as well."""
    fault = FAULTS[name]

    def until(bad: bool) -> Series:
        return {metric: values.replace(f"x{FOR_ALL}", "x30 stale") for metric, values in fault.series(bad).items()}

    series = on(until(True)) + on(until(False), "b") + on(fault.series(False), node="n2")
    fires = [alert(name, **fault.labels)]
    check(tmp_path, name, series, {7: fires, 12: fires, 21: fires, 30: []})


@needs_promtool
def test_a_rank_that_came_back_is_not_dead_from_memory(tmp_path):
    """Guards against a memory that speaks while there is something to see, and that hides a group that shrank."""
    dead = 'dpshm_rank_state{dp_rank="3",state="dead"}'
    check(
        tmp_path,
        "DpshmRankDead",
        on({dead: "1x20 0x60", "dpshm_ranks": "8x80"}),
        {4: [alert("DpshmRankDead", dp_rank="3", state="dead")], 6: [], 12: []},
    )
    shrunk = {f'dpshm_rank_routable{{dp_rank="{i}"}}': "1x20 0x60" if i < 4 else "1x20 stale" for i in range(8)}
    series = on(shrunk | {"dpshm_ranks": "8x20 4x60"})
    check(tmp_path, "DpshmFewRanksLeft", series, {4: [], 7: [alert("DpshmFewRanksLeft")]})


@needs_promtool
def test_the_first_burst_of_a_new_reason_is_told(tmp_path):
    """Guards against a series that is born at 500 and has no increase."""
    name = "DpshmMessagesDropped"
    born = 'dpshm_messages_dropped_total{reason="malformed message"}'
    old = 'dpshm_messages_dropped_total{reason="flood"}'
    series = on({born: f"_x20 500x{FOR_ALL}", old: f"0x{FOR_ALL}"}) + on({old: f"0x{FOR_ALL}"}, "b")
    check(tmp_path, name, series, {4.5: [], 6: [alert(name, reason="malformed message")], 20: []})


@needs_promtool
def test_drops_before_the_first_scrape_fire_nothing(tmp_path):
    """Guards against an alert each time that Prometheus starts beside a group that dropped a message last week."""
    series = on({f'dpshm_messages_dropped_total{{reason="{reason}"}}': f"40x{FOR_ALL}" for reason in DROP_REASONS})
    check(tmp_path, "DpshmMessagesDropped", series, {0: [], 1: [], 6: []})
