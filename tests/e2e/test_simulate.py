"""``dpshm simulate`` and ``dpshm replay`` as a user runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpshm import Engine, Frontend
from tests.support import TIMEOUT_S, LoneBoard, Marked, Popen, wait_until
from tests.unit.sim.workloads.samples import SAMPLES

PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
SMALL = ("--rate", "9", "--requests", "150", "--seeds", "2")


def command(*arguments: str, **environment: str) -> Popen[str]:
    """Starts it."""
    return started([sys.executable, "-m", "dpshm", *arguments], **environment)


def started(line: list[str], **environment: str) -> Popen[str]:
    """Starts a command line."""
    path = os.pathsep.join([PACKAGE_ROOT, os.environ.get("PYTHONPATH", "")])
    return Popen(
        line,
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ran(*arguments: str) -> tuple[int, str, str]:
    """Its exit status, stdout and stderr."""
    with command(*arguments) as process:
        out, err = process.communicate()
    return process.returncode, out, err


@pytest.mark.slow
def test_simulate_prints_what_it_promises():
    """Guards against scripts that break: the names in the JSON are documented."""
    status, out, err = ran("simulate", *SMALL, "--policies", "vllm,least_work", "--slow", "3:2", "--json")
    assert status == 0
    assert all(line.startswith("dpshm simulate: ") for line in err.splitlines())  # progress, if it takes long
    found = json.loads(out)
    assert [(r["policy"], r["information"]) for r in found["results"]] == [
        *(("vllm", "broadcast"), ("least_work", "live"), ("oracle", "live")),
    ]
    for result in found["results"]:
        assert {"mean", "p50", "p99"} <= result["ttft_ms"].keys()
        assert {"mean", "p50", "p99"} <= result["e2e_ms"].keys()
        assert result["imbalance"] > 0
        assert result["prefix_hit_rate"] is None
        assert result["regret"] is not None


@pytest.mark.slow
def test_simulate_for_people():
    """Guards against a table or a plot that cannot be made."""
    status, out, err = ran(
        "simulate",
        *SMALL,
        "--policies",
        "least_work,affinity:epsilon=0.5",
        "--information",
        "live,scrape",
        "--plot",
    )
    assert status == 0, err
    assert "8 engines, 8 front-ends, workload: built-in chat at 9x, 150 requests" in out
    for name in ("least_work on live", "affinity:epsilon=0.5 on scrape", "oracle on live"):
        assert name in out


@pytest.mark.parametrize(
    ("times", "says"),
    [([5], "1 request (all at once)"), ([5, 5], "2 requests (all at once)"), ([5, 6], "2 requests (2.0/s)")],
)
def test_requests_that_come_at_once(line, tmp_path, times, says):
    """Guards against 1,000,000,000 requests a second where there is one."""
    trace = tmp_path / "trace"
    trace.write_text("request_id,timestamp,input_tokens,output_tokens\n" + "".join(f"1,{s},20,5\n" for s in times))
    arguments = ("--trace", str(trace), "--policies", "vllm", "--engines", "1", "--seeds", "1", "--no-oracle")
    status, out, err = line.run("simulate", *arguments)
    assert status == 0, err
    assert says in out.splitlines()[0]


@pytest.mark.parametrize("name", SAMPLES)
def test_a_trace_of_each_format(line, tmp_path, name):
    """Guards against times and block sizes that the reader knows and the simulation does not get."""
    trace = tmp_path / "trace"
    trace.write_bytes(SAMPLES[name])
    arguments = ("--trace", str(trace), "--policies", "affinity", "--engines", "1", "--seeds", "1", "--no-oracle")
    status, out, err = line.run("simulate", *arguments, "--json")
    assert status == 0, err
    found = json.loads(out.splitlines()[-1])
    assert found["requests_per_s"] == pytest.approx(2.0)
    assert name.partition(" ")[0] in found["workload"]
    hit_rate = found["results"][0]["prefix_hit_rate"]
    if name in ("Mooncake", "Qwen-Bailian", "vLLM timed"):
        # Of four prompts with 5,248 tokens, the second and third find 1,024 tokens of the first.
        assert hit_rate == pytest.approx(2048 / 5248)
    else:
        assert hit_rate is None


def test_hashes_of_no_known_size_are_refused(line, tmp_path):
    """Guards against a prefix cache that is simulated with blocks of a size that was guessed."""
    trace = tmp_path / "trace"
    head = b'{"chat_id": 1, "parent_chat_id": -1, "timestamp": '
    trace.write_bytes(head + b'61.114, "input_length": 521, "output_length": 13, "hash_ids": [1, 2, 3, 4, 5]}')
    few = ("simulate", "--trace", str(trace), "--seeds", "1", "--policies", "affinity", "--no-oracle")
    status, out, err = line.run(*few)
    assert (status, out) == (2, "")
    assert "say so with --block-tokens" in err
    assert line.run(*few, "--block-tokens", "128")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policies", "best"), "no policy 'best': choose one of affinity, "),
        (("--information", "dead"), "no information model 'dead'"),
        (("--slow", "3"), "--slow '3' is not RANK:FACTOR, such as 3:2"),
        (("--restart", "3:1"), "--restart '3:1' is not RANK:AT:FOR"),
        (("--trace", "/none"), "cannot read the trace /none"),
        (("--time-unit", "min"), "there is no time unit 'min': choose s, ms, us, ns"),
        (("--block-tokens", "-1"), "a hash cannot be for -1 tokens"),
        (("--engines", "0"), "engines is 0: choose 1 to 4096"),
        (("--kv-tokens", "0"), "kv_tokens is 0: choose 1 to"),
        (("--clients", "-1"), "clients is -1: choose 0 to"),
        (("--time-unit", "s"), "are of a trace: name it with --trace"),
        (("--block-tokens", "16"), "are of a trace: name it with --trace"),
        (("--workload", "agents", "--trace", "/none"), "leave --workload or --trace out"),
    ],
)
def test_simulate_refuses(line, arguments, message):
    """Guards against a traceback where a sentence would do."""
    status, out, err = line.run("simulate", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("dpshm: error: ")
    assert message in err


LONG = ("--requests", "1000000", "--processes", "2", "--no-oracle")


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_simulate_ends_when_it_is_told(signum, send):
    """Guards against workers that go on after Ctrl-C, which a terminal sends to all, or print a traceback."""
    marked = Marked()
    with command("simulate", *LONG, DPSHM_TEST_RUN=marked.mark) as process:
        # A worker that still starts, too.
        wait_until(lambda: len(marked.pids()) >= (2 if send is os.killpg else 3))
        send(process.pid, signum)
        _, err = process.communicate()
    assert process.returncode == 128 + signum
    assert f"ended by {signum.name}; nothing is left behind" in err
    assert "Traceback" not in err
    wait_until(lambda: not marked.pids())


COMPARES = """
import time
from dpshm.linux.signals import EndedError, raising_once
from dpshm.sim.lab import study

run = study.run

def run_or_last(plant, jobs, policy, information):
    if policy == "round_robin":
        time.sleep(3600)
    return run(plant, jobs, policy, information)

study.run = run_or_last

if __name__ == "__main__":
    settings = study.SimulationSettings(policies=("vllm", "round_robin"), requests=50, seeds=1, oracle=False)
    try:
        with raising_once():
            study.compare(settings, 2, lambda done, _: print(done, flush=True))
    except EndedError as e:
        print(e.name)
"""


@pytest.mark.slow
def test_a_comparison_ends_while_a_worker_has_nothing_to_do(tmp_path):
    """Guards against a wait for a lock that a worker held, waiting for work, when the same signal ended it."""
    script = tmp_path / "compares.py"
    script.write_text(COMPARES)
    marked = Marked()
    with started([sys.executable, str(script)], DPSHM_TEST_RUN=marked.mark) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["0\n", "1\n"]
        time.sleep(0.05)  # the worker whose run is done waits for the next
        for _ in range(2):  # `timeout` sends it to the process, and to the group
            os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, out, err) == (0, "SIGTERM\n", "")
    wait_until(lambda: not marked.pids())


@pytest.mark.slow
def test_a_worker_that_was_killed_ends_the_simulation():
    """Guards against a wait for ever for the run of a process that the system killed to free memory."""
    marked = Marked()
    with command("simulate", *LONG, DPSHM_TEST_RUN=marked.mark) as process:
        wait_until(lambda: len(marked.workers()) == 2)
        os.kill(marked.workers()[0], signal.SIGKILL)
        out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, out) == (2, "")
    assert "a process of the simulation was killed" in err
    assert "choose fewer --processes" in err
    assert "Traceback" not in err
    wait_until(lambda: not marked.pids())


@pytest.mark.slow
def test_workers_end_with_a_killed_simulation():
    """Guards against processes that use a processor each for hours after the command that started them."""
    marked = Marked()
    with command("simulate", *LONG, DPSHM_TEST_RUN=marked.mark) as process:
        wait_until(lambda: len(marked.workers()) == 2)
        process.kill()
        wait_until(lambda: not marked.pids())


def test_replay(group, using, tmp_path):
    """Guards against a recording that the command cannot read, also while it is written."""
    using(LoneBoard(group, watched=False, dp_size=2))
    engines = [using(Engine.attach(group, rank)) for rank in (0, 1)]
    engines[0].publish(waiting=0, running=5)
    ring = tmp_path / "ring"
    frontend = using(Frontend.attach(group, policy="round_robin", record=ring))
    for _ in range(10):
        frontend.route(100).done()
    table = tmp_path / "out.csv"
    arguments = ("replay", str(ring), "--policy", "least_loaded")
    status, out, err = ran(*arguments, "--json", "--export", str(table))
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert (found["group"], found["decisions"], found["agreed"]) == (group, 10, 5)
    assert (found["by_rank"], found["other_by_rank"]) == ([5, 5], [0, 10])
    assert len(table.read_text().splitlines()) == 21
    status, out, err = ran(*arguments)
    assert (status, err) == (0, "")
    assert "10, 5 of them the same (50.0%)" in out
    status, out, err = ran("replay", str(ring), "--policy", "least_work")
    assert (status, err) == (0, "")
    status, _, err = ran("replay", str(tmp_path / "none"))
    assert status == 2
    assert "cannot read the decision ring" in err
