"""Tests of `dpshm.engine.handle`: the row of a rank, and the rank's part in the waves."""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest

from dpshm import (
    Board,
    CapacityExceeded,
    Coordinator,
    Engine,
    Frontend,
    HandleClosed,
    RowInUse,
    SegmentNotFound,
    SettingError,
    WrongThread,
)
from dpshm.board.words import pack_control, pack_load, unpack_state
from dpshm.linux import processes
from dpshm.net import wire
from dpshm.rules.liveness import Verdict
from dpshm.rules.waves import Phase
from tests.support import (
    LoneBoard,
    Remote,
    RemoteError,
    count_fds,
    count_threads,
    gone,
    interrupted,
    verdict,
    wait_until,
)


@pytest.fixture
def coordinator(group, using):
    """A coordinator of two ranks."""
    return using(Coordinator(group=group, dp_size=2))


@pytest.fixture
def board(group, using):
    """A board of two ranks without a coordinator."""
    return using(LoneBoard(group))


def call(coordinator, function):
    """Runs a function of a coordinator's sockets in the thread that owns them."""
    coordinator._wave.mailbox.call(lambda: function(coordinator._wave._sockets))


def start_from(coordinator, wave, exclude=None):
    """Has a coordinator send START, to the engines that it knows: see `connected`."""
    call(coordinator, lambda sockets: sockets.to_engines.send_multipart(wire.encode_start(wave, exclude)))


def connected(coordinator, count):
    """Waits until so many engines have subscribed: where connections take long, `attach` returns before that."""
    wait_until(lambda: coordinator._wave.stock.connections.count == count)


def test_publish_stores_every_word(board, group, using):
    """Guards against a report of which a word is missing, or lands in another's place."""
    engine = using(Engine.attach(group, 1))
    before = time.monotonic_ns()
    for _ in range(4):
        engine.receive(None, 100, wave=3)
    engine.finished(4)
    engine.preempted(2)
    engine.publish(waiting=5, running=7, kv_cache_usage=0.25, prefill_backlog=99, step=11)
    row = board.snapshot(time.monotonic_ns())[1]
    assert (row["waiting"], row["running"], row["prefill_backlog"], row["step"], row["wave"]) == (5, 7, 99, 11, 3)
    assert row["kv_cache_usage"] == pytest.approx(0.25, abs=1e-4)
    assert row["requests_finished"] == 4
    assert row["preemptions"] == 2
    assert row["pid"] == os.getpid()
    assert before <= board.beat[1] <= time.monotonic_ns()
    assert board.engine_start_time[1] == processes.start_time(os.getpid())
    assert not board.load[0]
    assert not board.engine_pid[0]


def test_publish_saturates(board, group, using):
    """Guards against a number too large for its word that stops the engine, or wraps into a small one."""
    engine = using(Engine.attach(group, 0))
    engine.publish(
        waiting=1 << 70, running=1 << 70, kv_cache_usage=1.0000001, prefill_backlog=1 << 70, step=1 << 70
    )
    row = board.snapshot()[0]
    assert row["waiting"] == (1 << 23) - 1
    assert row["running"] == (1 << 24) - 1
    assert row["kv_cache_usage"] == 1.0
    assert row["prefill_backlog"] > 1 << 60
    engine.publish(waiting=0, running=0, step=-1)
    assert board.snapshot()[0]["step"] == 0


@pytest.mark.parametrize(
    "wrong",
    [
        *({"waiting": -1}, {"running": -1}, {"prefill_backlog": -5}, {"waiting": np.int64(-1)}),
        *({"kv_cache_usage": usage} for usage in (37.0, -0.1, 1.01, float("nan"), float("inf"))),
    ],
    ids=str,
)
def test_a_load_that_cannot_be_is_refused_and_stores_nothing(board, group, using, wrong):
    """Guards against a percentage or a difference of the wrong sign published as a full or an empty rank."""
    engine = using(Engine.attach(group, 0))
    engine.publish(waiting=3, running=2, kv_cache_usage=0.5, prefill_backlog=7, step=1)
    before = bytes(board.words.cast("B"))
    with pytest.raises(SettingError, match=next(iter(wrong))):
        engine.publish(**{"waiting": 9, "running": 9, "step": 2, **wrong})
    assert bytes(board.words.cast("B")) == before


def test_requests_that_never_came_cannot_end(board, group, using):
    """Guards against requests that are counted as finished twice, or by an engine that received none."""
    engine = using(Engine.attach(group, 0))
    with pytest.raises(SettingError, match="0 requests are unfinished"):
        engine.finished(10)
    engine.receive(0, 5)
    engine.receive(None)
    engine.finished(1)
    for wrong in (2, -1):
        with pytest.raises(SettingError, match="1 requests are unfinished: 2 were received, 1 have ended"):
            engine.finished(wrong)
    assert board.snapshot()[0]["requests_finished"] == 1
    engine.finished(1)
    engine.close()
    successor = using(Engine.attach(group, 0))  # what its predecessor received is not its own
    with pytest.raises(SettingError):
        successor.finished(1)


@pytest.mark.parametrize("carry", [tuple, list, lambda stamp: json.loads(json.dumps(stamp))])
def test_a_stamp_is_received(board, group, using, carry):
    """Guards against a request that is counted for another front-end, or with other tokens, than it was booked."""
    engine = using(Engine.attach(group, 0))
    frontend = using(Frontend.attach(group))
    route = frontend.route(512, dp_rank=0)
    assert route.stamp == (frontend.index, 512, route.wave)
    assert board.snapshot()[0]["in_flight"] == 1
    engine.receive(carry(route.stamp))
    engine.publish(waiting=1, running=0, prefill_backlog=512)
    row = board.snapshot()[0]
    assert (row["in_flight"], row["requests"], row["in_flight_tokens"]) == (0, 1, 0)
    assert engine.running


@pytest.mark.parametrize("wrong", [(), (0,), (0, 5, 0, 0), ("0", 5, 0), (0, 5.0, 0), [None, 0, 0], (99, 5, 0)])
def test_what_is_no_stamp_is_refused_and_counts_nothing(board, group, using, wrong):
    """Guards against a message of a stranger that ends an engine with a traceback, or is half counted."""
    engine = using(Engine.attach(group, 0))
    before = bytes(board.words.cast("B"))
    with pytest.raises(SettingError):
        engine.receive(wrong)
    assert bytes(board.words.cast("B")) == before


def test_an_engine_that_starts_first_waits_for_its_group(group, using):
    """Guards against engines that have to be started after their coordinator, and hang if none comes."""
    with pytest.raises(SegmentNotFound):
        Engine.attach(group, 0, timeout_s=0.1)
    remote = using(Remote())
    remote.begin("engine = Engine.attach(group, 0, timeout_s=60)", group=group)
    coordinator = using(Coordinator(group=group, dp_size=1))
    coordinator.wait_ready(30)
    assert remote.eval("engine.dp_rank") == 0


def test_an_engine_that_waits_does_not_take_a_dead_groups_board(group, using):
    """Guards against an engine that attaches to what a dead group left, which the new coordinator then takes for
    a live group of other settings.
    """
    dead = using(Remote())
    dead.run("coordinator = Coordinator(group=group, dp_size=1)", group=group)
    dead.kill()
    remote = using(Remote())
    remote.begin("engine = Engine.attach(group, 1, timeout_s=60)", group=group)
    coordinator = using(Coordinator(group=group, dp_size=2, waves=False))
    wait_until(lambda: coordinator.board.engine_alive(1))
    assert remote.eval("engine.dp_rank") == 1


@pytest.mark.parametrize("kind", [int, np.int8, np.int32, np.uint16, np.int64, np.uint64])
def test_a_load_is_packed_as_the_layout_says(board, group, using, kind):
    """Guards against `publish`, which packs the usual case itself, storing another word than `pack_load` makes."""
    engine = using(Engine.attach(group, 0))
    for waiting, running, kv in ((0, 0, 0.0), (3, 100, 0.4), (1, 2, 1.0), (5, 0, np.float32(0.7))):
        engine.publish(waiting=kind(waiting), running=kind(running), kv_cache_usage=kv)
        assert board.load[0] == pack_load(waiting, running, kv)
        assert board.request_offset[0] == waiting + running


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64])
def test_numbers_of_any_kind(board, group, using, kind):
    """Guards against numpy's integers, which do not mix with each other, ending a report half way."""
    engine = using(Engine.attach(group, 0))
    engine.receive(None, wave=1000)
    engine.publish(waiting=kind(3), running=np.uint64(4), prefill_backlog=kind(5), step=kind(6))
    row = board.snapshot()[0]
    assert [row[name] for name in ("waiting", "running", "prefill_backlog", "step")] == [3, 4, 5, 6]
    engine.publish(waiting=2.0, running=Fraction(1))
    assert board.snapshot()[0]["waiting"] == 2


@pytest.mark.parametrize("wrong", ["waiting", "running", "kv_cache_usage", "prefill_backlog", "step"])
def test_a_report_that_is_none_leaves_the_row_as_it_was(board, group, using, wrong):
    """Guards against half of a report: a load of now beside a backlog of before."""
    engine = using(Engine.attach(group, 0))
    engine.publish(waiting=1, running=2, kv_cache_usage=0.5, prefill_backlog=3, step=4)
    before = board.words.tolist()
    report = {"waiting": 5, "running": 6, "kv_cache_usage": 0.7, "prefill_backlog": 7, "step": 8}
    with pytest.raises(TypeError, match="NoneType"):
        engine.publish(**report | {wrong: None})
    beat = board.index("coordinator_beat")
    assert [w for at, w in enumerate(board.words.tolist()) if at != beat] == [
        w for at, w in enumerate(before) if at != beat
    ]


def test_a_request_with_an_absurd_size_does_not_stop_the_reports(board, group, using):
    """Guards against one hostile or broken message after which an engine can never publish again."""
    engine = using(Engine.attach(group, 0))
    engine.receive(0, prompt_tokens=1 << 63)
    engine.receive(1, prompt_tokens=10)
    engine.publish(waiting=2, running=0)
    engine.publish(waiting=1, running=1)
    assert board.received_requests[0, 0] == board.received_requests[0, 1] == 1
    assert board.received_tokens[0, 1] == 10
    assert board.snapshot()[0]["running"] == 1


def test_a_received_request_is_outstanding_until_it_ends(board, group, using):
    """Guards against a request that counts twice or not at all while it goes from a socket into the queue."""
    engine = using(Engine.attach(group, 0))

    def outstanding():
        counted = [0, 1, 2, 3]
        return board.outstanding_requests(counted).count()[0], board.outstanding_tokens(counted).count()[0]

    board.frontend_incarnation[:] = 1
    board.sent_requests[[0, 2], 0] = [1, 2]
    board.sent_tokens[2, 0] = 42
    assert outstanding() == (3, 42)
    engine.receive(2, 30)
    assert outstanding() == (3, 42)
    engine.receive(2, 12)
    engine.receive(0, -7)
    assert board.received_requests[0].tolist() == [1, 0, 2, 0]
    assert board.received_tokens[0].tolist() == [0, 0, 42, 0]
    assert outstanding() == (3, 42)
    for waiting, running, backlog in ((3, 0, 42), (1, 2, 12), (1, 1, 12), (0, 0, 0)):
        engine.publish(waiting=waiting, running=running, prefill_backlog=backlog)
        assert outstanding() == (waiting + running, backlog)
    engine.publish(waiting=1 << 70, running=0)
    assert outstanding() == (board.snapshot()[0]["waiting"], 0)


@pytest.mark.parametrize("frontend", [-1, 4])
def test_a_frontend_that_does_not_exist(board, group, using, frontend):
    """Guards against an index from a message that writes into another row."""
    engine = using(Engine.attach(group, 0))
    with pytest.raises(SettingError, match="outside 0 to 3"):
        engine.receive(frontend, 10)
    engine.publish(waiting=0, running=0)
    assert not board.received_requests.any()


def test_steps_are_counted_and_timed(board, group, using):
    """Guards against counters that shrink, dummy steps taken for work, and a step that never ends on the board."""
    engine = using(Engine.attach(group, 0))
    with engine.step(prefill_tokens=512, batch=3):
        assert board.step_start[0] > 0
    with engine.step():
        time.sleep(0.002)
    with pytest.raises(ZeroDivisionError), engine.step(batch=1):
        raise ZeroDivisionError
    row = board.snapshot()[0]
    assert (row["steps"], row["dummy_steps"], row["prompt_tokens"], row["generation_tokens"]) == (3, 1, 512, 4)
    assert row["busy_ns"] >= 2_000_000
    assert board.step_start[0] == 0


def test_attach_takes_a_row_from_its_predecessor(board, group, using):
    """Guards against a restarted engine that inherits a queue it does not have, or looks like its predecessor."""
    first = Engine.attach(group, 0)
    with first.step(batch=2):
        pass
    first.receive(1, 5, wave=9)
    first.publish(waiting=3, running=4, prefill_backlog=5, step=6)
    first.close()
    board.sent_requests[1, 0] = 8
    board.sent_tokens[1, 0] = 80
    board.control[0] = pack_control(5, Phase.PAUSED)
    second = using(Engine.attach(group, 0))
    row = board.snapshot()[0]
    assert row["incarnation"] == 2
    assert [row[name] for name in ("requests", "in_flight_tokens", "steps", "generation_tokens", "step")] == [
        0
    ] * 5
    assert (board.received_requests[0, 1], board.received_tokens[0, 1]) == (8, 80)
    assert (second.wave, second.running, row["wave"]) == (5, False, 5)


def test_close_frees_the_row(coordinator, group):
    """Guards against a rank that left in good order and is still chosen, or called dead."""
    engine = Engine.attach(group, 0)
    engine.publish(waiting=3, running=1)
    engine.close()
    engine.close()
    wait_until(lambda: verdict(coordinator.board, 0) is Verdict.ABSENT)
    assert coordinator.board.snapshot()[0]["requests"] == 0
    Engine.attach(group, 0).close()


def test_attach_returns_when_the_coordinator_has_marked_it_alive(coordinator, group, using):
    """Guards against a rank that says it is up and is not chosen yet."""
    for dp_rank in (0, 1):
        using(Engine.attach(group, dp_rank))
        assert verdict(coordinator.board, dp_rank) is Verdict.ALIVE


def test_a_rank_is_held_by_one(coordinator, group, using):
    """Guards against two engines that write one row."""
    using(Engine.attach(group, 0))
    with pytest.raises(RowInUse, match=f"rank 0 .* live process {os.getpid()}"):
        Engine.attach(group, 0)
    remote = using(Remote())
    with pytest.raises(RemoteError, match="RowInUse"):
        remote.run("Engine.attach(group, 0)", group=group)
    using(Engine.attach(group, 1))


@pytest.mark.parametrize("dp_rank", [-1, 64])
def test_a_rank_beyond_the_board(coordinator, group, dp_rank):
    """Guards against writing past the board."""
    with pytest.raises(CapacityExceeded, match="0 to 63"):
        Engine.attach(group, dp_rank)


def test_no_such_group(group):
    """Guards against a missing coordinator that shows as anything but a clear error."""
    with pytest.raises(SegmentNotFound, match=group):
        Engine.attach(group, 0)


def test_closed(coordinator, group):
    """Guards against use of memory that is not there any more."""
    engine = Engine.attach(group, 0)
    engine.close()
    for use in USES:
        with pytest.raises(HandleClosed, match=group):
            use(engine)


USES = [
    lambda e: e.publish(waiting=0, running=0),
    lambda e: e.receive(0),
    lambda e: e.step(),
    lambda e: e.finished(),
    lambda e: e.preempted(),
    lambda e: e.poll(),
    lambda e: e.wave_complete(),
    lambda e: e.pause(),
    lambda e: e.resume(has_work=True),
]


def test_another_thread(coordinator, group, using):
    """Guards against two threads that write one row without a lock, and share a ZMQ socket."""
    engine = using(Engine.attach(group, 0))
    with ThreadPoolExecutor(1) as pool:
        for use in [*USES, Engine.close]:
            with pytest.raises(WrongThread, match="engine 0"):
                pool.submit(use, engine).result()
    engine.publish(waiting=1, running=0)


def test_a_forked_child_may_not_use_it(coordinator, group, using):
    """Guards against a child that writes its parent's row, and one whose close() closes its parent's handle."""
    remote = using(Remote())
    remote.run("engine = Engine.attach(group, 0)", group=group)
    remote.run("""
read_end, write_end = os.pipe()
if (child := os.fork()) == 0:
    said = []
    for use in (lambda: engine.publish(waiting=9, running=9), engine.poll, engine.wave_complete):
        try:
            use()
        except HandleForked as e:
            said.append("attach after the fork" in str(e))
    engine.close()
    os.write(write_end, repr(said).encode())
    os._exit(0)
os.close(write_end)
said = os.read(read_end, 1000)
os.waitpid(child, 0)
engine.publish(waiting=1, running=2)
""")
    assert remote.eval("said") == b"[True, True, True]"
    row = coordinator.board.snapshot()[0]
    assert (row["waiting"], row["running"], row["state"]) == (1, 2, "idle")


def test_a_child_that_outlives_its_engine_does_not_keep_the_row(coordinator, group, using):
    """Guards against an engine that looks alive because a worker that it forked still has its descriptors."""
    remote = using(Remote())
    remote.run(
        """
engine = Engine.attach(group, 0)
if (child := os.fork()) == 0:
    signal.pause()
    os._exit(0)
""",
        group=group,
    )
    child = remote.eval("child")
    try:
        remote.kill()
        wait_until(lambda: verdict(coordinator.board, 0) is Verdict.DEAD)
        assert not gone(child)
        using(Engine.attach(group, 0))
        assert verdict(coordinator.board, 0) is Verdict.ALIVE
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_subprocess_does_not_keep_the_row(coordinator, group, using):
    """Guards against a descriptor that is not closed on exec."""
    remote = using(Remote())
    remote.run("engine = Engine.attach(group, 0)", group=group)
    remote.run("import subprocess\nchild = subprocess.Popen(['sleep', '600'])")
    child = remote.eval("child.pid")
    try:
        remote.kill()
        wait_until(lambda: verdict(coordinator.board, 0) is Verdict.DEAD)
        assert not gone(child)
    finally:
        os.kill(child, signal.SIGKILL)


# Waves.


def test_a_request_wakes_an_idle_engine_and_the_group(coordinator, group, using):
    """Guards against a wake-up that depends on a front-end's notice, which may be late, lost or never sent."""
    engines = [using(Engine.attach(group, dp_rank)) for dp_rank in (0, 1)]
    engines[1].receive(None)
    assert engines[1].running
    assert unpack_state(int(coordinator.board.engine_state[1])) == (0, True, False)
    wait_until(lambda: engines[0].poll(timeout_ms=10))
    wait_until(lambda: coordinator.board.phase is Phase.RUNNING)


def test_a_request_with_a_newer_stamp_lifts_the_wave(board, group, using):
    """Guards against an engine that stays in a wave that the others have left."""
    engine = using(Engine.attach(group, 1))
    engine.receive(None, wave=4)
    assert (engine.wave, engine.running) == (4, True)
    engine.receive(None, wave=6)
    engine.receive(None, wave=2)
    assert (engine.wave, engine.running) == (6, True)


def test_only_the_right_start_wakes(coordinator, group, using):
    """Guards against an engine that obeys a START of an old wave, or one that leaves it out."""
    engine = using(Engine.attach(group, 1))
    connected(coordinator, 1)

    def after(wave, exclude=None):
        start_from(coordinator, wave, exclude)
        call(coordinator, lambda sockets: sockets.to_engines.send(wire.READY))  # comes after it
        engine.ready = False
        wait_until(lambda: engine.poll(10) is not None and engine.ready)
        return engine.wave, engine.running

    assert after(0, exclude=1) == (0, False)
    assert after(0, exclude=0) == (0, True)
    engine.wave_complete()
    assert after(0) == (1, False)
    assert after(3) == (3, True)
    assert after(1) == (3, True)
    assert after(4, exclude=1) == (3, True)
    assert after(4) == (4, True)


def test_rank_0_confirms_and_completes(coordinator, group, using):
    """Guards against a group that is never known to run, or never known to have paused."""
    engine = using(Engine.attach(group, 0))
    using(Engine.attach(group, 1))
    connected(coordinator, 2)
    start_from(coordinator, 0)
    wait_until(lambda: engine.poll(10))
    wait_until(lambda: coordinator.board.phase is Phase.RUNNING)
    engine.wave_complete()
    assert (engine.wave, engine.running) == (1, False)
    wait_until(lambda: (coordinator.board.wave, coordinator.board.phase) == (1, Phase.PAUSED))


def test_pause_and_resume(coordinator, group, using):
    """Guards against ranks that run although the user paused them, or that never resume."""
    engines = [using(Engine.attach(group, dp_rank)) for dp_rank in (0, 1)]
    for engine in engines:
        engine.receive(None)
        engine.pause()
    assert [(e.wave, e.running, e.paused) for e in engines] == [(1, False, True)] * 2
    assert coordinator.board.snapshot()["state"].tolist() == ["paused", "paused"]
    wait_until(lambda: coordinator.board.wave == 1)
    connected(coordinator, 2)
    start_from(coordinator, 1)
    engines[0].receive(None, wave=1)
    assert not engines[0].poll(timeout_ms=50)
    for engine in engines:
        engine.resume(has_work=True)
    assert [(e.wave, e.running, e.paused) for e in engines] == [(1, True, False)] * 2
    wait_until(lambda: coordinator.board.phase is Phase.RUNNING)


def test_resume_without_work_stays_idle(board, group, using):
    """Guards against a rank that steps alone after a resume."""
    engine = using(Engine.attach(group, 0))
    engine.pause()
    engine.resume(has_work=False)
    assert (engine.running, engine.paused, engine.wave) == (False, False, 0)


def test_poll_waits_as_long_as_it_is_told(board, group, using):
    """Guards against a poll that returns at once, and makes an idle engine spin."""
    engine = using(Engine.attach(group, 0))
    before = time.monotonic()
    assert engine.poll(timeout_ms=60) is False
    assert time.monotonic() - before >= 0.055


def test_ready_is_heard(coordinator, group, using):
    """Guards against an engine that never learns that the group is complete."""
    engines = [using(Engine.attach(group, dp_rank)) for dp_rank in (0, 1)]
    for engine in engines:
        wait_until(lambda engine=engine: engine.poll(10) or engine.ready)


def test_rubbish_from_the_coordinator_is_dropped(coordinator, group, using, caplog):
    """Guards against an engine that a single wrong message ends."""
    engine = using(Engine.attach(group, 0))
    connected(coordinator, 1)
    start_from(coordinator, 0)
    wait_until(lambda: engine.poll(10))
    engine.wave_complete()
    for frames in ([b"\x02"], [b"\x02", b"\xc1"], [b"\x03", b"\x90"], [b""], [b"\x02", b"\x92\x00\xc0", b""]):
        call(coordinator, lambda sockets, frames=frames: sockets.to_engines.send_multipart(frames))
    start_from(coordinator, 1)
    wait_until(lambda: engine.poll(10))
    assert len([r for r in caplog.records if "dropped a message" in r.message]) == 5


def test_it_never_waits_for_a_coordinator(board, group, using):
    """Guards against an engine that stops when its messages pile up at a coordinator that is gone."""
    engine = using(Engine.attach(group, 0))
    for wave in range(3000):  # more than a socket's queue holds
        engine.receive(None, wave=wave)
        engine.wave_complete()
    assert engine.wave == 3000
    assert board.snapshot()[0]["wave"] == 3000


def test_nothing_is_left_open(coordinator, group):
    """Guards against descriptors and threads that pile up over restarts in one process."""
    Engine.attach(group, 0).close()
    before = wait_until(count_fds)
    threads = count_threads()
    for _ in range(30):
        Engine.attach(group, 0).close()
    for _ in range(10):
        for refused in (0, 99):
            with Engine.attach(group, 0), pytest.raises((RowInUse, CapacityExceeded)):
                Engine.attach(group, refused)
    wait_until(lambda: count_fds() <= before)  # ZMQ closes in its own thread
    assert count_threads() <= threads


def test_frontends_see_a_report_at_once(coordinator, group, using):
    """Guards against a report that is seen only after a message, or an interval."""
    engine = using(Engine.attach(group, 0))
    using(Engine.attach(group, 1)).publish(waiting=0, running=50)
    frontend = using(Frontend.attach(group))
    with using(Board.attach(group)) as board:
        for running in (1, 99, 3):
            engine.publish(waiting=0, running=running)
            assert board.snapshot()[0]["requests"] == frontend.snapshot()[0]["requests"] == running
            frontend_choice = frontend.route()
            assert frontend_choice.dp_rank == (1 if running == 99 else 0)
            frontend_choice.cancel()


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.uint64, np.int64])
def test_integers_of_numpy(board, group, using, kind):
    """Guards against counts that wrap, or a wave that cannot be sent: numpy's integers are narrow and no ints."""
    engine = using(Engine.attach(group, kind(1)))
    assert type(engine.dp_rank) is int
    for _ in range(5):
        engine.receive(kind(0), kind(100), kind(3))
    assert int(board.received_tokens[1, 0]) == 500
    assert type(engine.wave) is int
    engine.wave_complete()  # its message names rank and wave
    for _ in range(5):
        with engine.step(kind(100), kind(100)) as step:
            step.batch = kind(101)
        engine.finished(kind(1))
    engine.publish(waiting=kind(100), running=kind(100), prefill_backlog=kind(100), step=kind(100))
    row = board.snapshot()[1]
    assert (row["prompt_tokens"], row["generation_tokens"], row["requests_finished"]) == (500, 505, 5)
    engine.show(kind(100), running=True)
    assert board.snapshot()[1]["wave"] == 100


@pytest.mark.parametrize("wrong", [1.0, "1", [1], np.float32(1)])
def test_what_is_no_integer_is_refused_and_counts_nothing(board, group, using, wrong):
    """Guards against half a call: a request that is counted and raises is counted again when it is tried again."""
    engine = using(Engine.attach(group, 1))
    for call in (
        lambda: engine.receive(wrong, 5),
        lambda: engine.receive(0, wrong),
        lambda: engine.receive(0, 5, wrong),
        lambda: engine.finished(wrong),
        lambda: engine.step(wrong, 1),
        lambda: engine.preempted(wrong),
        lambda: engine.show(wrong, running=True),
    ):
        before = bytes(board.words.cast("B"))
        with pytest.raises((TypeError, SettingError)):
            call()
        assert bytes(board.words.cast("B")) == before
    with pytest.raises(TypeError):
        Engine.attach(group, wrong)


def test_counts_that_cannot_be_are_refused_and_change_nothing(board, group, using):
    """Counters never fall, and no number ends the engine's later reports."""
    engine = using(Engine.attach(group, 1))
    for call in (
        lambda: engine.step(-1, 1),
        lambda: engine.step(1, -1),
        lambda: engine.step(1, 1, -1),
        lambda: engine.preempted(-1),
        lambda: engine.publish(waiting=float("inf"), running=0),
        lambda: engine.publish(waiting=0, running=float("nan")),
        lambda: engine.publish(waiting=0, running=0, prefill_backlog=float("inf")),
        lambda: engine.publish(waiting=1.5, running=0),
        lambda: engine.publish(waiting=0, running=Fraction(1, 3)),
        lambda: engine.publish(waiting=0, running=0, prefill_backlog=0.5),
    ):
        before = bytes(board.words.cast("B"))
        with pytest.raises(SettingError):
            call()
        assert bytes(board.words.cast("B")) == before


@pytest.mark.parametrize("huge", [1 << 63, 10**30, np.uint64(2**64 - 1)])
def test_a_huge_step_saturates(board, group, using, huge):
    """A step of more tokens than a word holds is counted as one of very many, and the reports after it go on."""
    engine = using(Engine.attach(group, 1))
    for _ in range(3):
        with engine.step(huge, huge, huge) as step:
            step.batch = -1
        with engine.step(5, 2) as step:
            step.held_tokens = huge
        engine.publish(waiting=1, running=2)
    row = board.snapshot()[1]
    assert (row["steps"], row["waiting"], row["running"]) == (6, 1, 2)
    assert (row["prompt_tokens"], row["generation_tokens"]) == (3 * (2**31 - 1 + 5), 6)


def test_an_interrupted_receipt_counts_nothing(board, group, using):
    """Guards against sums that are wrong for ever because a signal handler raised within `receive`."""
    engine = using(Engine.attach(group, 1))
    at, received, went_through = 0, 0, False
    while not went_through:
        at += 1
        went_through = not interrupted(lambda: engine.receive(0, 7, 5), at)
        engine.publish(waiting=0, running=0)
        count = int(board.received_requests[1, 0])
        assert count - received in (0, 1)
        received = count
        assert int(board.received_tokens[1, 0]) == 7 * received
        assert int(board.request_offset[1]) == -received
        assert int(board.token_offset[1]) == -7 * received
    assert (at > 3, received) == (True, 1)


def test_a_rank_that_the_group_does_not_have_is_an_error(group, using):
    """Guards against a mistyped rank that is healthy and gets no request, while another one is missing."""
    coordinator = using(Coordinator(group=group, dp_size=3, max_engines=8))
    with pytest.raises(SettingError, match=rf"3 ranks, 0 to 2, and no rank 7.*dpshm scale 8 --group {group}"):
        Engine.attach(group, 7)
    assert not coordinator.board.engine_incarnation[7]
    with pytest.raises(CapacityExceeded, match="dp_rank 8 is outside 0 to 7"):
        Engine.attach(group, 8, timeout_s=60)
    using(Engine.attach(group, 2))
