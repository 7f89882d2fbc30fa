"""``dpshm stat`` on a group under load."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from tests.e2e.load import LoadedGroup, environment, run, stat
from tests.support import Popen, wait_until


@pytest.mark.slow
def test_a_group_under_load(group):
    """Guards against a state that is only right at rest: a killed, a stopped and a drained rank under load."""
    with LoadedGroup(group, ranks=4, rate=20, stall_timeout_s=0.5) as loaded:
        wait_until(lambda: sum(r["requests_finished"] for r in stat(group)["ranks"]) > 5)
        loaded.engines[1].kill()
        loaded.engines[2].signal(signal.SIGSTOP)
        run("drain", "3", "-g", group, "--no-wait")
        wait_until(lambda: stat(group)["ranks"][2]["state"] == "stalled")
        frame = json.loads(run("stat", "--json", "-g", group).stdout)
        text = run("stat", "-g", group, "--ascii").stdout
        loaded.engines[2].signal(signal.SIGCONT)
    assert [r["state"] for r in frame["ranks"]][1:] == ["dead", "stalled", "drained"]
    assert [r["routable"] for r in frame["ranks"]] == [True, False, False, False]
    assert [r["pid"] for r in frame["ranks"]] == [remote.pid for remote in loaded.engines]
    assert frame["rates_over_s"] >= 0.5
    assert frame["ranks"][0]["generation_tokens_per_s"] > 0
    assert sum(f["routed"] for f in frame["frontends"]) >= sum(r["requests_finished"] for r in frame["ranks"])
    assert text.isascii()
    assert "x dead" in text
    assert "out of routing: rank 1 dead, 2 stalled" in text


@pytest.mark.slow
def test_watch_prints_a_line_each_time_until_it_is_told_to_end(group):
    """Guards against a watcher that buffers its lines, or ends with a traceback."""
    with LoadedGroup(group, ranks=1, frontends=1, rate=20):
        command = [sys.executable, "-m", "dpshm", "stat", "--json", "--watch", "0.1", "-g", group]
        with Popen(
            command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            frames = [json.loads(process.stdout.readline()) for _ in range(4)]
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
            assert process.stderr.read() == ""
    times = [frame["time"] for frame in frames]
    assert times == sorted(times)
    assert frames[3]["rates_over_s"] >= 0.1


def test_the_schema_is_printed():
    """Guards against a documented schema that is not the one of this version."""
    schema = json.loads(run("stat", "--schema").stdout)
    assert "ranks" in schema["$defs"]["Frame"]["properties"]
    assert "stalled" in schema["$defs"]["Rank"]["description"]


def test_an_unknown_group_is_an_error_that_says_what_to_do(group):
    """Guards against a traceback, and an error that leaves one alone."""
    done = run("stat", "-g", group, expect=2)
    assert done.stderr.startswith(f"dpshm: error: no group '{group}' on this node")
    assert "Start its coordinator first" in done.stderr
    assert done.stdout == ""
