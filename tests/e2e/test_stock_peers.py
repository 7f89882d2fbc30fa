"""vLLM's own engines and front-ends against our coordinator, played with plain sockets and vLLM's very bytes.

The bytes are those that vLLM 0.32.0 encodes (``tests/data/wire-vllm-0.32.json``); nothing here goes through
dpshm's encoders but what the golden messages leave open, a number in another place.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import msgspec
import pytest

from dpshm import Coordinator, CoordinatorProcess
from tests.support import StockEngine, StockFrontend, numbers, wait_until

GOLDEN = json.loads((Path(__file__).parent.parent / "data" / "wire-vllm-0.32.json").read_text(encoding="utf-8"))


def golden(link, meaning):
    """The bytes of one golden message, or of its frames."""
    (found,) = [m for m in GOLDEN[link] if m["meaning"].startswith(meaning)]
    if "frames" in found:
        return [bytes.fromhex(frame) for frame in found["frames"]]
    return bytes.fromhex(found["hex"])


READY = golden("coordinator_to_engine", "ready")
START_5_EXCLUDE_2 = golden("coordinator_to_engine", "start wave 5, exclude engine 2")
START_5 = golden("coordinator_to_engine", "start wave 5, exclude nobody")
STATS_3 = golden("engine_to_coordinator", "stats: engine_index 3")
STATS_0 = golden("engine_to_coordinator", "stats: engine_index 0")
WAVE_COMPLETE_4 = golden("engine_to_coordinator", "wave_complete 4")
START_WAVE_5 = golden("engine_to_coordinator", "start_wave 5")
SUBSCRIBE = golden("frontend_to_coordinator", "subscribe")
UNSUBSCRIBE = golden("frontend_to_coordinator", "unsubscribe")
FIRST_REQUEST_INTEGER = golden("frontend_to_coordinator", "first request while paused")
FIRST_REQUEST_IDENTITY = golden("frontend_to_coordinator", "the same as 0.32.0 sends it")
SCALE_TO_6 = golden("frontend_to_coordinator", "elastic scale to 6")
COUNTS = golden("coordinator_to_frontend", "counts of 2 engines")
COUNTS_2025 = golden("coordinator_to_frontend", "counts as the August 2025")

NEVER_AGAIN = {"idle_refresh_ms": 3_600_000, "resend_interval_ms": 3_600_000}  # each message comes once


def stats(engine, waiting, running, kv=0.0):
    """The golden report of engine 3 with other numbers in it."""
    fields = msgspec.msgpack.decode(STATS_3)
    fields[0] = engine
    fields[2] |= {"num_waiting_reqs": waiting, "num_running_reqs": running, "kv_cache_usage": kv}
    return msgspec.msgpack.encode(fields)


def start(using, count, **settings):
    """A coordinator and its stock engines, each past READY."""
    coordinator = using(Coordinator(dp_size=count, stats_interval_ms=10, **NEVER_AGAIN | settings))
    engines = [using(StockEngine(coordinator.engine_addresses, dp_rank)) for dp_rank in range(count)]
    for engine in engines:
        assert engine.heard() == READY
    for engine in engines:
        while engine.input.poll(20):
            assert engine.input.recv_multipart() == READY  # again, for those who came after
    return coordinator, engines


@pytest.mark.parametrize(
    "first_request",
    [FIRST_REQUEST_INTEGER, FIRST_REQUEST_IDENTITY, b"\x92\xc0\x03"],
    ids=["integer", "identity", "nil"],
)
def test_a_whole_life(group, using, first_request):
    """Guards against any message of a deployment's life that stock vLLM would not understand, or not send."""
    coordinator, engines = start(using, 4, group=group)
    frontends = [using(StockFrontend(coordinator.stats_publish_address)) for _ in range(2)]
    for frontend in frontends:
        assert frontend.heard() == b"\x93\x94" + b"\x93\x00\x00\xcb\0\0\0\0\0\0\0\0" * 4 + b"\x00\xc2"
    while frontends[0].socket.poll(20):
        frontends[0].heard()  # once more, for the second one's sake

    engines[3].send(STATS_3)
    engines[0].send(STATS_0)
    for frontend in frontends:
        state = frontend.wait_for(lambda state: state.counts and state.counts[3].waiting)
        assert numbers(state) == [(0, 0, 0.0)] * 3 + [(5, 7, 0.25)]

    engines[0].send(WAVE_COMPLETE_4)
    for frontend in frontends:
        assert frontend.heard() == b"\x93\xc0\x05\xc2"

    frontends[1].send(first_request)
    for engine in engines:
        assert engine.heard() == START_5

    engines[2].send(START_WAVE_5)
    for frontend in frontends:
        assert frontend.heard() == b"\x93\xc0\x05\xc3"
    for engine in engines:
        assert engine.heard() == START_5_EXCLUDE_2

    frontends[0].send(FIRST_REQUEST_INTEGER)  # it had not heard yet that they run
    engines[0].send(STATS_0)
    assert not engines[1].input.poll(30)

    frontends[0].send(SCALE_TO_6)
    for frontend in frontends:
        state = frontend.wait_for(lambda state: len(state.counts or ()) == 6)
        assert (state.wave, state.running) == (5, True)
    late = using(StockEngine(coordinator.engine_addresses, 4))
    using(StockEngine(coordinator.engine_addresses, 5))
    assert late.heard() == READY

    frontends[1].send(UNSUBSCRIBE)
    wait_until(lambda: coordinator._wave.publisher.listeners == 1)
    engines[1].send(stats(1, 9, 9))
    frontends[0].wait_for(lambda state: (numbers(state) or [(), ()])[1] == (9, 9, 0.0))
    assert frontends[1].is_silent(0.05)
    frontends[1].send(SUBSCRIBE)
    frontends[1].wait_for(lambda state: (numbers(state) or [(), ()])[1] == (9, 9, 0.0))
    assert coordinator.dropped == {}


@pytest.mark.parametrize(("with_kv", "expected"), [(True, COUNTS), (False, COUNTS_2025)], ids=["2026", "2025"])
def test_counts_are_vllms_to_the_byte(group, using, with_kv, expected):
    """Guards against counts that the front-ends of one release or the other cannot decode."""
    coordinator, engines = start(using, 2, group=group, counts_with_kv=with_kv)
    engines[0].send(stats(0, 1, 2, 0.5))
    engines[1].send(stats(1, 0, 4, 0.0))
    engines[1].send(START_WAVE_5.replace(b"\x05", b"\x03").replace(b"\x99\x02", b"\x99\x01"))
    for engine in engines:
        engine.heard()
    wait_until(coordinator.board.load[:2].all)  # the two come over two sockets
    frontend = using(StockFrontend(coordinator.stats_publish_address))
    while (heard := frontend.heard()) == b"\x93\xc0\x03\xc3":
        pass  # it may just hear that they run now
    assert heard == expected


def test_counts_come_at_the_interval(group, using):
    """Guards against the 100 ms of stock front-ends being ignored, either way."""
    coordinator = using(Coordinator(group=group, dp_size=1, stats_interval_ms=150))
    engine = using(StockEngine(coordinator.engine_addresses, 0))
    frontend = using(StockFrontend(coordinator.stats_publish_address))
    frontend.heard()
    began = time.monotonic()
    for i in range(1, 5):
        engine.send(stats(0, i, i))
        frontend.wait_for(lambda state, i=i: numbers(state) == [(i, i, 0.0)])
    assert time.monotonic() - began >= 3 * 0.15  # the first may come at once


def test_ready_comes_again_for_a_late_engine(group, using):
    """Guards against an engine that scaled in, or was restarted, and waits for READY for ever."""
    coordinator, engines = start(using, 2, group=group)
    engines[1].close()
    wait_until(lambda: coordinator._wave.stock.connections.count == 1)
    assert using(StockEngine(coordinator.engine_addresses, 1)).heard() == READY
    assert engines[0].heard() == READY


def test_against_the_coordinators_own_process(group, using):
    """Guards against a coordinator that works in the process of its test alone."""
    process = using(
        CoordinatorProcess(group=group, dp_size=3, balancing="hybrid", dp_size_local=0, stats_interval_ms=10)
    )
    engines = [using(StockEngine(process.get_engine_socket_addresses(), dp_rank)) for dp_rank in range(3)]
    frontend = using(StockFrontend(process.get_stats_publish_address()))
    for engine in engines:
        assert engine.heard() == READY
    engines[2].send(START_WAVE_5)
    state = frontend.wait_for(lambda state: state.running)
    assert state.wave == 5
    engines[1].send(stats(1, 2, 3, 1.0))
    state = frontend.wait_for(lambda state: (numbers(state) or [(), ()])[1] == (2, 3, 1.0))
    assert (state.wave, state.running) == (5, True)
