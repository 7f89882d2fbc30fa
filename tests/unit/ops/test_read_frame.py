"""One look at a board."""

from __future__ import annotations

import json
import os
import signal
from contextlib import ExitStack, closing

import msgspec
import pytest

from dpshm import Board, Coordinator, Engine, Frontend
from dpshm.board.sweep import sweep
from dpshm.ops.frame import Frame
from dpshm.ops.read_frame import SILENT_AFTER_S, balance, read_frame
from dpshm.version import __version__
from tests.support import Remote, wait_until


@pytest.fixture
def coordinator(group, using):
    """A coordinator of two ranks."""
    return using(Coordinator(group=group, dp_size=2))


@pytest.fixture
def seen(group, using):
    """Looks at the group."""
    boards = []

    def look_now() -> Frame:
        if not boards:
            boards.append(using(Board.attach(group)))
        return read_frame(boards[0])

    return look_now


def test_everything_that_was_published_is_seen(group, using, coordinator, seen):
    """Guards against a field that shows another's value."""
    engine = using(Engine.attach(group, 0))
    frontend = using(Frontend.attach(group, owner="api"))
    route = frontend.route(300, dp_rank=0)
    _booked = frontend.route(500, dp_rank=0)
    engine.receive(route.stamp)
    for _ in range(4):
        engine.receive(None)
    engine.finished(4)
    with engine.step(prefill_tokens=300, batch=3):
        pass
    engine.publish(waiting=2, running=5, kv_cache_usage=0.5, prefill_backlog=70, step=9)
    frame = seen()
    rank, row = frame.ranks[0], frame.frontends[0]
    assert (rank.waiting, rank.running, rank.in_flight, rank.requests) == (2, 5, 1, 8)
    assert (rank.prefill_backlog, rank.step, rank.steps, rank.requests_finished) == (570, 9, 1, 4)
    assert (rank.prompt_tokens, rank.generation_tokens, rank.dummy_steps) == (300, 3, 0)
    assert rank.kv_cache_usage == pytest.approx(0.5, abs=1e-4)
    assert (rank.state, rank.routable, rank.pid, rank.version) == ("running", True, os.getpid(), __version__)
    assert 0 <= rank.age_s < 30
    assert (row.owner, row.state, row.routed, row.in_flight) == ("api", "alive", 2, 1)
    assert (row.sent_by_rank, row.in_flight_by_rank) == ([2, 0], [1, 0])
    assert frame.ranks[1].state == "absent"
    assert (frame.coordinator.state, frame.coordinator.version) == ("alive", __version__)


def test_the_schema_is_what_is_printed(coordinator, seen):
    """Guards against a schema for readers that the output does not keep."""
    frame = seen()
    assert msgspec.json.decode(msgspec.json.encode(frame), type=Frame) == frame
    schema = msgspec.json.schema(Frame)["$defs"]["Frame"]
    assert set(schema["required"]) == set(json.loads(msgspec.json.encode(frame)))


def test_the_fields_of_schema_1_are_these(coordinator, seen):
    """Guards against a field that is removed or renamed without a new schema version: scripts rely on them."""
    frame = json.loads(msgspec.json.encode(seen()))
    assert frame["schema_version"] == 1
    assert " ".join(frame) == (
        "schema_version time monotonic_s group linked balancing head waves dp_size max_engines max_frontends wave "
        "phase revision waves_per_minute balance rates_over_s coordinator ranks frontends "
        "ttft queue per_token latency_over_s beyond"
    )
    assert " ".join(frame["ranks"][0]) == (
        "dp_rank state routable drained stock waiting running in_flight requests prefill_backlog kv_cache_usage "
        "wave step age_s step_age_s pid incarnation version steps dummy_steps busy_s prompt_tokens "
        "generation_tokens requests_finished remote has_index block_tokens num_blocks blocks_in_use held_tokens "
        "cached_tokens indexed_blocks dropped_blocks index_fill step_ms busy requests_per_s prompt_tokens_per_s "
        "generation_tokens_per_s cached_share preemptions ttft queue per_token"
    )


@pytest.fixture
def elsewhere(group):
    """A process to be killed with the coordinator in it; what it leaves is swept."""
    with ExitStack() as stack:
        stack.callback(sweep, group)
        yield stack.enter_context(closing(Remote()))


def test_without_a_coordinator_the_locks_tell(group, elsewhere, using, seen):
    """Guards against marks of a dead coordinator: ranks and front-ends that died since would look alive."""
    elsewhere.run("coordinator = Coordinator(group=group, dp_size=2)", group=group)
    victim, stays = using(Remote()), using(Engine.attach(group, 1))
    victim.run("e = Engine.attach(group, 0); f = Frontend.attach(group); r = f.route(10, dp_rank=1)", group=group)
    stays.publish(waiting=1, running=0)
    assert seen().ranks[1].in_flight == 1
    elsewhere.kill()
    victim.kill()
    frame = seen()
    assert frame.coordinator.state == "none"
    assert frame.ranks[0].state == "dead"
    assert frame.ranks[1].state in ("idle", "running")
    assert [r.routable for r in frame.ranks] == [False, True]
    assert (frame.frontends[0].state, frame.ranks[1].in_flight, frame.ranks[1].requests) == ("dead", 0, 1)


@pytest.mark.slow
def test_a_stopped_coordinator_is_silent(group, seen, elsewhere):
    """Guards against a coordinator that hangs and is called alive because it holds its lock."""
    elsewhere.run("coordinator = Coordinator(group=group, dp_size=1)", group=group)
    elsewhere.signal(signal.SIGSTOP)
    frame = wait_until(lambda: (f := seen()).coordinator.state == "silent" and f)
    assert frame.coordinator.beat_age_s > SILENT_AFTER_S
    elsewhere.signal(signal.SIGCONT)
    wait_until(lambda: seen().coordinator.state == "alive")


def test_dense_ranks_run_while_they_have_requests(group, using, seen):
    """Guards against a rank of a dense group that is called running for ever after its first request."""
    using(Coordinator(group=group, dp_size=1, waves=False))
    engine = using(Engine.attach(group, 0))
    engine.receive(None, 10)
    engine.publish(waiting=1, running=0)
    assert seen().ranks[0].state == "running"
    engine.publish(waiting=0, running=0)
    assert seen().ranks[0].state == "idle"


def test_ages_need_the_same_clock(coordinator, seen, monkeypatch: pytest.MonkeyPatch):
    """Guards against nonsense ages where CLOCK_MONOTONIC has another zero: another boot or time namespace."""
    assert seen().coordinator.beat_age_s is not None
    monkeypatch.setattr("dpshm.linux.processes.boot_id", lambda: "another")
    frame = seen()
    assert frame.coordinator.beat_age_s is None
    assert frame.ranks[0].age_s is None
    assert frame.coordinator.state == "alive"  # its lock says so


@pytest.mark.parametrize(
    ("requests", "value"), [([], None), ([0, 0], None), ([4, 4], 1.0), ([8, 0, 0, 0], 4.0), ([3, 1], 1.5)]
)
def test_balance(requests: list[int], value: float | None):
    """Guards against a balance that an idle group makes fail, or that a uniform load makes look bad."""
    assert balance(requests) == value
