"""Tests of `dpshm.vllm.engine_link`: no row, or one that fails later: logged once, hooks off, vLLM goes on."""

from __future__ import annotations

import pytest

from dpshm import Coordinator, Engine
from dpshm.engine.row import EngineRow
from dpshm.vllm.engine_core import engine_dead
from tests.unit.vllm.fake_core import HOOKED, Request, RequestType, failing, hooked, run, send


@pytest.mark.parametrize("waves", [True, False])
def test_an_engine_that_fails_reports_to_the_coordinator_again(make_core, frontend, board, log, waves):
    """Guards against a hook that breaks the engine, logs at each step, or leaves a load that never changes."""
    core = make_core(waves)

    def body():
        _booked = frontend.route(10, dp_rank=0)
        send(core, Request("a", prompt=10, max_tokens=3))
        core._process_input_queue()
        failing(core.scheduler)
        core._process_engine_step()
        assert hooked(core) == []
        assert core.step_fn == core.scheduler.step
        assert core.reported == [(1, 0)]  # at once: until it comes the coordinator knows no load of this rank
        for _ in range(3):
            core.turn()
        assert not core.scheduler.requests
        assert core.reported[-1] == (0, 0)

    run(core, body)
    assert log("gives its row up") == 1
    assert int(board.snapshot()[0]["in_flight"]) == 0
    assert int(board.engine_pid[0]) == 0


def test_a_row_is_given_up_in_the_middle_of_a_step(make_core, board, log):
    """Guards against the rest of a hook that goes on with a row which its beginning gave up."""
    core = make_core()

    def body():
        send(core, Request("a", max_tokens=5))
        core._process_input_queue()
        failing(core.scheduler)
        held = core._process_engine_step, core.step_fn, core._handle_client_request
        held[0]()  # gives up
        for _ in range(2):
            held[0]()  # as vLLM may have looked it up before
            held[1]()
        held[2](RequestType.WAKEUP, None)
        assert "a" not in core.scheduler.requests  # each call did one step: five tokens

    run(core, body)
    assert log("gives its row up") == 1


def test_a_row_that_cannot_be_closed_is_given_up_all_the_same(make_core, board, log, monkeypatch):
    """Guards against a failure on the way back that reaches vLLM."""
    core = make_core()

    def body():
        failing(core.scheduler)
        with monkeypatch.context() as broken:
            broken.setattr(EngineRow, "close", lambda _: 1 / 0)
            core._process_engine_step()
        assert hooked(core) == []
        assert core.reported == [(0, 0)]  # unchanged, and told all the same: the coordinator never heard of it
        core.turn()

    run(core, body)
    assert log("gives its row up") == 1


def test_without_a_board_the_engine_is_untouched(vllm, log):
    """Guards against an engine on another node that fails, and a line in the log without data parallelism."""
    for address, lines in ((None, 0), ("ipc:///nowhere", 1)):
        core = vllm.core.EngineCoreProc(address)
        run(core, lambda core=core: core.input_queue.put(hooked(core)))
        assert core.input_queue.get_nowait() == []
        assert log("finds no board") == lines


def test_a_rank_that_is_taken_goes_on_without_a_row(make_core, group, using, log):
    """Guards against two processes that write one row, and against an engine that does not start because of it."""
    using(Engine.attach(group, 0))
    core = make_core()
    run(core, core.turn)
    assert hooked(core) == []
    assert log("goes on without a row") == 1


def test_an_engine_that_cannot_be_hooked_leaves_its_row(make_core, board, log):
    """Guards against a row that no thread writes and that front-ends take for an idle engine."""
    core = make_core()
    failing(core.scheduler)
    run(core, core.turn)
    assert hooked(core) == []
    assert int(board.engine_pid[0]) == 0
    assert log("goes on without a row") == 1
    core.scheduler.get_kv_cache_usage = lambda: 0.0
    seen = []
    run(core, lambda: seen.append(hooked(core)))  # the row is free
    assert seen == [list(HOOKED)]


def test_the_row_is_given_back_when_the_loop_ends(make_core, board):
    """Guards against a row that outlives its engine's loop, which ends with `SystemExit`."""
    core = make_core()

    def body():
        assert int(board.engine_pid[0]) != 0
        raise SystemExit

    with pytest.raises(SystemExit):
        run(core, body)
    assert int(board.engine_pid[0]) == 0
    assert hooked(core) == []


@pytest.mark.parametrize("waves", [True, False])
def test_a_core_that_fails_ends_api_servers_only_where_ranks_need_each_other(make_core, group, using, waves):
    """Guards against a message that ends all API servers, of a rank that the others can do without."""
    told = []
    hook = engine_dead(told.append)
    coordinator = using(Coordinator(group=f"{group}-own", dp_size=1, waves=waves))
    core = make_core(waves=waves)
    core.frontend_stats_publish_address = coordinator.stats_publish_address

    def fails():
        raise RuntimeError("the device is lost")

    with pytest.raises(RuntimeError):
        run(core, fails)
    hook(core)
    assert told == ([core] if waves else [])
