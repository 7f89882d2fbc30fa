"""Tests of `dpshm.vllm.engine_core`: an engine core of vLLM's shape, its row on a real board, and the way back."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from dpshm import Board, Coordinator, Engine, Frontend
from dpshm.engine.row import EngineRow
from dpshm.vllm.engine_core import busy_loop
from dpshm.vllm.find import owner_name
from tests.support import wait_until
from tests.unit.vllm.fakes import Request, RequestType

INPUTS = ("tcp://127.0.0.1:1111", "tcp://127.0.0.1:2222")
HOOKED = ("_process_input_queue", "_handle_client_request", "_process_engine_step", "execute_dummy_batch")


@pytest.fixture
def coordinator(group, using):
    """A coordinator of two ranks."""
    return using(Coordinator(group=group, dp_size=2))


@pytest.fixture
def board(group, coordinator, using):
    """The board of the group."""
    return using(Board.attach(group))


@pytest.fixture
def make(vllm, coordinator):
    """`make()` gives a lockstep core of rank 0, `make(waves=False)` one that is on its own."""

    def core(waves=True, **kwargs):
        kind = vllm.core.DPEngineCoreProc if waves else vllm.core.EngineCoreProc
        return kind(coordinator.stats_publish_address, inputs=INPUTS, **kwargs)

    return core


@pytest.fixture
def frontend(group, coordinator, using):
    """A front-end in the row of API server 1; rank 1 is there, so that a front-end always finds an engine."""
    using(Engine.attach(group, 1))
    return using(Frontend.attach(group, owner=owner_name(1, INPUTS[1])))


def run(core, body):
    """Runs `body()` where vLLM runs the busy loop of that core."""
    core.body = body
    return busy_loop(type(core).run_busy_loop)(core)


def send(core, request, client_index=1, wave=0):
    """Puts a request into the core's input queue, as its input thread does."""
    request.client_index = client_index
    core.input_queue.put((RequestType.ADD, (request, wave)))


def row(board, rank=0):
    """A row of the board by column names."""
    return board.snapshot()[rank]


def counters(board, *names):
    """Some figures of rank 0's row."""
    return tuple(int(row(board)[name]) for name in names)


def hooked(core):
    """Which methods of the core are hidden behind ours."""
    return [name for name in HOOKED if name in vars(core)]


def test_each_turn_of_the_loop_publishes_the_load(make, board):
    """Guards against a load that front-ends see a step late, and against steps that are not counted."""
    core = make()

    def body():
        assert hooked(core) == list(HOOKED)
        send(core, Request("a", prompt=100, max_tokens=2))
        core._process_input_queue()
        assert (row(board)["waiting"], row(board)["running"]) == (1, 0)
        assert row(board)["prefill_backlog"] == 100
        core._process_engine_step()
        assert (row(board)["waiting"], row(board)["running"]) == (0, 1)
        assert row(board)["prefill_backlog"] == 36
        assert row(board)["kv_cache_usage"] == pytest.approx(0.25, abs=1e-4)
        for _ in range(3):
            core.turn()
        assert (row(board)["waiting"], row(board)["running"]) == (0, 0)
        assert counters(board, "prompt_tokens", "generation_tokens", "requests_finished") == (100, 2, 1)
        assert counters(board, "steps", "dummy_steps") == (4, 1)  # the last turn had nothing to run

    run(core, body)
    assert core.reported == []  # the row said all of it
    assert hooked(core) == []


def test_the_row_shows_what_vllms_own_wave_machine_is_in(make, board):
    """Guards against a row that says another wave than the engine is in, or that it sleeps while it steps."""
    core = make()

    def body():
        send(core, Request("a", max_tokens=1), wave=3)
        core._process_input_queue()
        wait_until(lambda: board.wave == 3)
        core.turn()
        core.turn()
        core.scheduler.paused = True
        core._process_input_queue()
        assert core.current_wave >= 4
        snapshot = row(board)
        assert int(snapshot["wave"]) == core.current_wave
        assert snapshot["state"] == "paused"

    run(core, body)


def test_a_rank_on_its_own_has_no_wave(make, board):
    """Guards against a dense core, which has no `current_wave`, that gives its row up for it."""
    core = make(waves=False)

    def body():
        send(core, Request("a", max_tokens=1))
        core.turn()
        assert int(board.requests_finished[0]) == 1
        assert int(row(board)["wave"]) == 0

    run(core, body)
    assert core.reported == []


def test_a_received_request_is_in_flight_no_more(make, frontend, board):
    """Guards against a request that counts twice: as booked by its API server and as queued at its engine."""
    core = make()

    def body():
        core.turn()  # before the API server's first request: its row is found later
        route = frontend.route(10, dp_rank=0)
        assert int(row(board)["in_flight"]) == 1
        send(core, Request("a", prompt=10))
        core._process_input_queue()
        assert (int(row(board)["in_flight"]), int(row(board)["waiting"])) == (0, 1)
        route.done()
        frontend.route(10, dp_rank=0)
        send(core, Request("b", prompt=10))  # the row is known by now
        core._process_input_queue()
        assert int(row(board)["in_flight"]) == 0

    run(core, body)


def test_a_client_without_a_row_is_served(make, board):
    """Guards against an engine that fails at a request of an API server which has no row."""
    core = make()

    def body():
        send(core, Request("a"), client_index=0)
        core._process_input_queue()
        assert int(row(board)["waiting"]) == 1
        assert int(board.received_requests[0].sum()) == 0

    run(core, body)


def test_a_request_that_the_core_rejects_is_counted(make, frontend, board, monkeypatch):
    """Guards against a booking that stays for ever where a core in shutdown answers a request itself."""
    core = make()
    monkeypatch.setattr(core, "add_request", lambda request, _: core.answered.append(request.request_id))

    def body():
        frontend.route(12, dp_rank=0)
        send(core, Request("a", prompt=12))
        core._process_input_queue()
        assert core.answered == ["a"]
        assert counters(board, "in_flight", "in_flight_tokens", "waiting", "prefill_backlog") == (0, 0, 0, 0)

    run(core, body)


def test_an_older_core_needs_no_more_than_it_has(vllm, make, board, log):
    """Guards against releases whose dense core reports nothing, and which have one kind of refusal."""
    del vllm.core.EngineCoreProc._maybe_publish_request_counts
    del vllm.core.EngineCoreProc._handle_mm_cache_miss
    core = make(waves=False)

    def body():
        send(core, Request("a", max_tokens=2))
        core._process_input_queue()
        core._process_engine_step()
        assert counters(board, "running") == (1,)
        failing(core.scheduler)
        core._process_engine_step()
        assert hooked(core) == []

    run(core, body)
    assert log("gives its row up") == 1


@pytest.mark.parametrize("name", ["_handle_request_preproc_error", "_handle_mm_cache_miss"])
def test_a_request_refused_in_the_input_thread_is_counted(make, frontend, board, name):
    """Guards against a refused request that stays booked for ever: no queue of the engine ever has it."""
    core = make()

    def body():
        frontend.route(12, dp_rank=0)
        arguments = (Request("a", prompt=12), "drift")[: 1 if name.endswith("error") else 2]
        arguments[0].client_index = 1
        thread = threading.Thread(target=getattr(core, name), args=arguments)
        thread.start()
        thread.join()
        assert len(core.answered) == 1
        assert int(row(board)["in_flight"]) == 1  # the row belongs to the busy loop, which is woken
        assert core.input_queue.queue[0] == (RequestType.WAKEUP, None)
        core._process_input_queue()
        assert int(row(board)["in_flight"]) == 0
        assert int(row(board)["in_flight_tokens"]) == 0

    run(core, body)


def test_a_refused_request_whose_prompt_cannot_be_counted_is_counted(make, frontend, board):
    """Guards against an engine that fails in its input thread because of the request which it refuses."""
    core = make()

    def body():
        frontend.route(0, dp_rank=0)
        request = Request("a")
        request.prompt_token_ids = None
        request.client_index = 1
        core._handle_request_preproc_error(request)
        core._process_input_queue()
        assert int(row(board)["in_flight"]) == 0

    run(core, body)


def test_an_aborted_request_leaves_no_step_behind(make, board):
    """Guards against a sleeping rank that is called stalled: its only request was aborted within a step."""
    core = make(queued_batches=True)

    def body():
        send(core, Request("a", prompt=4, max_tokens=9))
        core._process_input_queue()
        core.step_fn()  # computes the prompt and queues its batch: the step ends, for tokens were computed
        core.step_fn()  # gives the outputs
        core.step_fn()  # queues a batch that computes no prompt: the step goes on
        assert int(board.step_start[0]) != 0
        core.batch_queue.clear()
        core.input_queue.put((RequestType.ABORT, ["a"]))
        core._process_input_queue()
        core.scheduler.untold.clear()  # told by another way
        core._process_input_queue()
        assert not core.has_work()
        assert int(board.step_start[0]) == 0
        assert (row(board)["waiting"], row(board)["running"], row(board)["prefill_backlog"]) == (0, 0, 0)

    run(core, body)


def test_an_abort_of_an_idle_engine_publishes(make, board):
    """Guards against a load that stays on the board after the last request was aborted, while the loop waits."""
    core = make()

    def body():
        send(core, Request("a"))
        core._process_input_queue()
        core.scheduler.end("a")
        core.scheduler.untold.clear()
        core._handle_client_request(RequestType.ABORT, [])
        assert int(row(board)["waiting"]) == 0

    run(core, body)


def test_a_queued_batch_is_one_step_until_its_outputs_are_here(make, board):
    """Guards against steps that seem to take no time, or twice as many, under asynchronous scheduling."""
    core = make(queued_batches=True)

    def body():
        send(core, Request("a", prompt=4, max_tokens=2))
        core._process_input_queue()
        steps = []
        for _ in range(4):
            core._process_engine_step()
            steps.append(int(row(board)["steps"]))
        assert row(board)["generation_tokens"] == 2
        assert steps == [1, 2, 2, 3]

    run(core, body)


def test_telling_who_finished_is_no_step(make, board):
    """Guards against a step without work, which spoils the model of step times and starts a wave for nothing."""
    core = make()

    def body():
        send(core, Request("a", max_tokens=1))
        core._process_input_queue()
        core._process_engine_step()
        core.engines_running = False
        assert core.has_work()  # it has still to tell
        core._process_input_queue()
        assert row(board)["state"] != "running"
        core._process_engine_step()
        assert int(row(board)["steps"]) == 1
        assert int(board.step_start[0]) == 0

    run(core, body)


def test_a_dummy_batch_is_a_dummy_step(make, board):
    """Guards against dummy steps that pass for work."""
    core = make()

    def body():
        core.engines_running = True
        core.execute_dummy_batch()
        assert core.dummy_batches == 1
        assert counters(board, "steps", "dummy_steps") == (1, 1)

    run(core, body)


def test_a_step_function_without_work_is_not_timed(make, board):
    """Guards against a step that begins while the rank has nothing to do and never ends."""
    core = make()

    def body():
        core.step_fn()
        assert int(board.step_start[0]) == 0
        assert int(row(board)["steps"]) == 0

    run(core, body)


def test_an_older_scheduler_gives_its_cache_usage(make, board):
    """Guards against releases up to 0.24, whose scheduler has no `get_kv_cache_usage`."""
    core = make()
    scheduler = core.scheduler
    type_without = type("Older", (type(scheduler),), {"get_kv_cache_usage": property(lambda _: missing())})
    scheduler.__class__ = type_without
    scheduler.kv_cache_manager = SimpleNamespace(usage=0.75)
    run(core, lambda: None)
    seen = []
    run(core, lambda: seen.append(float(row(board)["kv_cache_usage"])))
    assert seen == [pytest.approx(0.75, abs=1e-4)]


def missing():
    """What a class without an attribute does."""
    raise AttributeError("get_kv_cache_usage")


def failing(scheduler):
    """Makes the next publish fail, as a release with another scheduler would."""
    scheduler.get_kv_cache_usage = lambda: 1 / 0


@pytest.mark.parametrize("waves", [True, False])
def test_an_engine_that_fails_reports_to_the_coordinator_again(make, frontend, board, log, waves):
    """Guards against a hook that breaks the engine, logs at each step, or leaves a load that never changes."""
    core = make(waves)

    def body():
        frontend.route(10, dp_rank=0)
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
    assert int(row(board)["in_flight"]) == 0
    assert int(board.engine_pid[0]) == 0


def test_a_row_is_given_up_in_the_middle_of_a_step(make, board, log):
    """Guards against the rest of a hook that goes on with a row which its beginning gave up."""
    core = make()

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


def test_a_row_that_cannot_be_closed_is_given_up_all_the_same(make, board, log, monkeypatch):
    """Guards against a failure on the way back that reaches vLLM."""
    core = make()

    def body():
        failing(core.scheduler)
        with monkeypatch.context() as broken:
            broken.setattr(EngineRow, "close", lambda _: 1 / 0)
            core._process_input_queue()
        assert hooked(core) == []
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


def test_a_rank_that_is_taken_goes_on_without_a_row(make, group, using, log):
    """Guards against two processes that write one row, and against an engine that does not start because of it."""
    using(Engine.attach(group, 0))
    core = make()
    run(core, core.turn)
    assert hooked(core) == []
    assert log("goes on without a row") == 1


def test_an_engine_that_cannot_be_hooked_leaves_its_row(make, board, log):
    """Guards against a row that no thread writes and that front-ends take for an idle engine."""
    core = make()
    failing(core.scheduler)
    run(core, core.turn)
    assert hooked(core) == []
    assert int(board.engine_pid[0]) == 0
    assert log("goes on without a row") == 1
    core.scheduler.get_kv_cache_usage = lambda: 0.0
    seen = []
    run(core, lambda: seen.append(hooked(core)))  # the row is free
    assert seen == [list(HOOKED)]


def test_the_row_is_given_back_when_the_loop_ends(make, board):
    """Guards against a row that outlives its engine's loop, which ends with `SystemExit`."""
    core = make()

    def body():
        assert int(board.engine_pid[0]) != 0
        raise SystemExit

    with pytest.raises(SystemExit):
        run(core, body)
    assert int(board.engine_pid[0]) == 0
    assert hooked(core) == []
