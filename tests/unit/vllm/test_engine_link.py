"""Tests of `dpshm.vllm.engine_link`: what an engine core of vLLM's shape writes to its row on a real board."""

from __future__ import annotations

import socket
import threading
from types import SimpleNamespace

import pytest

from dpshm import Engine
from dpshm.engine.row import EngineRow
from dpshm.net import wire
from dpshm.net.doorbell import Doorbell, DoorbellClient
from tests.support import wait_until
from tests.unit.vllm.fake_core import (
    HOOKED,
    EventType,
    Request,
    RequestType,
    counters,
    failing,
    hooked,
    row,
    run,
    send,
)


def test_each_turn_of_the_loop_publishes_the_load(make_core, board):
    """Guards against a load that front-ends see a step late, and against steps that are not counted."""
    core = make_core()

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


def test_a_step_to_which_nothing_came_publishes_once(make_core, board, monkeypatch):
    """Guards against a report before each step that says what the one after the last step said."""
    core, published, publish = make_core(), [], EngineRow.publish
    monkeypatch.setattr(EngineRow, "publish", lambda row, **load: (published.append(load), publish(row, **load)))

    def body():
        send(core, Request("a", max_tokens=9))
        core.turn()
        published.clear()
        for _ in range(3):
            core.turn()
        assert [load["running"] for load in published] == [1, 1, 1]
        send(core, Request("b", max_tokens=9))
        core._process_input_queue()
        assert [load["waiting"] for load in published[3:]] == [1]

    run(core, body)


def test_what_the_cache_holds_is_published_when_it_changes_without_a_step(make_core, board):
    """Guards against a rank that looks full after its requests were aborted, until it steps again."""
    core = make_core()

    def body():
        send(core, Request("a", max_tokens=9))
        core.turn()
        core.scheduler.kv_cache_usage = 0.5
        core._process_engine_step()
        send(core, Request("b", max_tokens=9))
        core._process_input_queue()
        assert row(board)["kv_cache_usage"] == pytest.approx(0.5, abs=1e-4)
        core.scheduler.kv_cache_usage = 0.125
        core.input_queue.put((RequestType.ABORT, ["a"]))
        send(core, Request("c", max_tokens=9))
        core._process_input_queue()
        assert row(board)["kv_cache_usage"] == pytest.approx(0.125, abs=1e-4)
        core.scheduler.kv_cache_usage = 0.0
        core.input_queue.put((RequestType.ABORT, ["b", "c"]))
        core._process_input_queue()
        assert row(board)["kv_cache_usage"] == 0

    run(core, body)


def test_preempted_requests_are_counted(make_core, board):
    """Guards against a rank that is short of KV cache and does not look so, and other events that count."""
    core = make_core()
    step = core.step_fn

    def step_with_events():
        outputs, executed = step()
        outputs[1].outputs[0].events = [SimpleNamespace(type=kind) for kind in EventType]
        return outputs, executed

    def body():
        send(core, Request("a", max_tokens=9))
        core.turn()
        assert counters(board, "preemptions") == (1,)

    core.step_fn = step_with_events
    run(core, body)


def test_what_changes_between_two_steps_is_published_before_the_second(make_core, board):
    """Guards against a row that hides an abort or a new wave for as long as a step takes."""
    core = make_core()

    def body():
        send(core, Request("a", prompt=5, max_tokens=99))
        send(core, Request("b", prompt=500, max_tokens=99))
        core.turn()
        assert counters(board, "running", "prefill_backlog") == (2, 436)
        core.input_queue.put((RequestType.ABORT, ["b"]))
        core._process_input_queue()
        assert counters(board, "running", "prefill_backlog") == (1, 0)
        core.turn()
        core.current_wave += 1  # the busy loop counts a wave that ended; a request is here already
        core._process_input_queue()
        assert int(row(board)["wave"]) == core.current_wave
        core.turn()
        core.input_queue.put((RequestType.ABORT, ["a"]))
        core._process_input_queue()
        assert counters(board, "running", "waiting") == (0, 0)

    run(core, body)


def test_the_row_shows_what_vllms_own_wave_machine_is_in(make_core, board):
    """Guards against a row that says another wave than the engine is in, or that it sleeps while it steps."""
    core = make_core()

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


def test_a_rank_on_its_own_has_no_wave(make_core, board):
    """Guards against a dense core, which has no `current_wave`, that gives its row up for it."""
    core = make_core(waves=False)

    def body():
        send(core, Request("a", max_tokens=1))
        core.turn()
        assert int(board.requests_finished[0]) == 1
        assert int(row(board)["wave"]) == 0

    run(core, body)
    assert core.reported == []


def test_an_older_core_needs_no_more_than_it_has(vllm, make_core, board, log):
    """Guards against releases whose dense core reports nothing, and which have one kind of refusal."""
    del vllm.core.EngineCoreProc._maybe_publish_request_counts
    del vllm.core.EngineCoreProc._handle_mm_cache_miss
    del vllm.core.EngineCoreProc._handle_request_validation_error
    core = make_core(waves=False)

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


def test_an_aborted_request_leaves_no_step_behind(make_core, board):
    """Guards against a sleeping rank that is called stalled: its only request was aborted within a step."""
    core = make_core(waves=False, queued_batches=True)

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


def test_an_abort_of_an_idle_engine_publishes(make_core, board):
    """Guards against a load that stays on the board after the last request was aborted, while the loop waits."""
    core = make_core(waves=False)

    def body():
        send(core, Request("a"))
        core._process_input_queue()
        core.scheduler.end("a")
        core.scheduler.untold.clear()
        core._handle_client_request(RequestType.ABORT, [])
        assert int(row(board)["waiting"]) == 0

    run(core, body)


def test_a_queued_batch_is_one_step_until_its_outputs_are_here(make_core, board):
    """Guards against steps that seem to take no time, or twice as many, under asynchronous scheduling."""
    core = make_core(queued_batches=True)

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


def test_telling_who_finished_is_no_step(make_core, board):
    """Guards against a step without work, which spoils the model of step times and starts a wave for nothing."""
    core = make_core()

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


def test_a_dummy_batch_is_a_dummy_step(make_core, board):
    """Guards against dummy steps that pass for work."""
    core = make_core()

    def body():
        core.engines_running = True
        core.execute_dummy_batch()
        assert core.dummy_batches == 1
        assert counters(board, "steps", "dummy_steps") == (1, 1)

    run(core, body)


def test_a_step_function_without_work_is_not_timed(make_core, board):
    """Guards against a step that begins while the rank has nothing to do and never ends."""
    core = make_core()

    def body():
        core.step_fn()
        assert int(board.step_start[0]) == 0
        assert int(row(board)["steps"]) == 0

    run(core, body)


# Doorbells.


def started(core):
    """The waves for which a rank was told to start, and has not yet handled."""
    queued = list(core.input_queue.queue)
    return [request[0] for kind, request in queued if kind is RequestType.START_DP_WAVE]


def test_a_request_that_wakes_a_rank_wakes_the_others_of_the_node(make_core, group, using):
    """Guards against ranks that sleep on, and a request that waits for them, while the coordinator is stopped."""
    other = using(Engine.attach(group, 1))
    core = make_core()

    def body():
        send(core, Request("a"), wave=3)
        core._process_input_queue()
        wait_until(other.poll)
        assert other.wave == 3
        assert core.engines_running  # itself too: the request may be aborted before its first step
        send(core, Request("b"), wave=3)
        core._process_input_queue()
        assert started(core) == []  # awake by now

    run(core, body)


def test_a_sleeping_rank_hears_its_doorbell(make_core, board):
    """Guards against ranks without a bell: only the coordinator could wake them."""
    core = make_core()

    def body():
        bells = DoorbellClient(board.segment.sockets_path, 2)
        bells.ring(5)
        wait_until(lambda: started(core) == [5])
        core._process_input_queue()
        assert (core.current_wave, core.engines_running) == (5, True)
        bells.ring(4)
        bells.ring(6)
        wait_until(lambda: started(core) == [4, 6])
        bells.close()

    run(core, body)
    assert not any(thread.name == "dpshm-bell" for thread in threading.enumerate())


def test_what_is_no_start_is_dropped_and_the_bell_is_heard_on(make_core, board, log):
    """Guards against a thread that ends because another process wrote into the socket."""
    core = make_core()

    def body():
        folder = board.segment.sockets_path
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
            stranger.sendto(b"rubbish", str(folder / "bell-0"))
        bells = DoorbellClient(folder, 2)
        bells.ring(5)
        wait_until(lambda: started(core) == [5])
        bells.close()

    run(core, body)
    assert log("dropped what came through a doorbell") == 1


def test_ranks_that_the_user_paused_are_not_rung(make_core, board, using):
    """Guards against a request that wakes ranks which the user paused."""
    core = make_core()
    other = using(Doorbell(board.segment.sockets_path, 1))

    def body():
        core.scheduler.paused = True
        send(core, Request("a"), wave=3)
        core._process_input_queue()
        core.scheduler.paused = False
        core.scheduler.end("a")
        send(core, Request("b"), wave=4)
        core._process_input_queue()
        assert other.drain() == [wire.encode_start(4, None)[1]]

    run(core, body)


def test_ranks_on_their_own_have_no_bells(make_core, board):
    """Guards against dense ranks that wake each other."""
    core = make_core(waves=False)

    def body():
        send(core, Request("a"))
        core._process_input_queue()
        assert core.input_queue.empty()
        assert not any(thread.name == "dpshm-bell" for thread in threading.enumerate())

    run(core, body)
