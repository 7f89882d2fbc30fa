"""Tests of `dpshm.coordinator.follower` on one node: a head and a follower under two names, over tcp.

`tests/nodes/test_follower.py` has them on two.
"""

from __future__ import annotations

import pytest

from dpshm import Coordinator, Engine, Frontend, SettingError
from dpshm.net import wire
from dpshm.net.keys import make_keys
from dpshm.rules.waves import Phase
from tests.support import StockEngine, polled, wait_until

HYBRID = {"dp_size": 2, "dp_size_local": 1, "balancing": "hybrid"}


@pytest.fixture
def pair(group, using, request):
    """A head with rank 0 and a follower with rank 1; `request.param` are settings of both."""
    settings = HYBRID | getattr(request, "param", {})
    head = using(Coordinator(group=group, **settings))
    return head, using(Coordinator(group=f"{group}-b", head=head.head_addresses, **settings))


def waves(pair):
    """Wave and phase on both boards."""
    return [(c.board.wave, c.board.phase) for c in pair]


def test_waves_of_both_kinds_of_engines(pair, group, using):
    """Guards against a stock engine of the further node that hears no START, or whose load the head never sees."""
    _head, follower = pair
    ours = using(Engine.attach(group, 0))
    stock = using(StockEngine(follower.engine_addresses, 1))
    stock.report(2, 3)
    wait_until(lambda: pair[0].board.snapshot()[1]["running"] == 3)
    wait_until(lambda: pair[0].board.snapshot()["stock"].tolist() == [False, True])  # stored last
    ours.receive(None, wave=0)
    while (frames := stock.heard())[0] != wire.START_FRAME:
        assert frames == [wire.READY]
    assert wire.decode_start(frames[1]).wave == 0
    stock.send(wire.encode_wave_started(1, 4))
    wait_until(lambda: waves(pair) == [(4, Phase.RUNNING)] * 2)
    wait_until(lambda: ours.poll(10) and ours.wave == 4)


def test_a_late_rank_gets_the_present_wave(pair, group, using):
    """Guards against a rank that starts while a wave runs and sleeps through it, since the head is elsewhere."""
    ours = using(Engine.attach(group, 0))
    first = Engine.attach(f"{group}-b", 1)
    for coordinator in pair:
        coordinator.wait_ready(30)
    using(Frontend.attach(f"{group}-b", ranks=[1])).wake()
    wait_until(lambda: polled([ours, first]))
    wait_until(lambda: waves(pair) == [(0, Phase.RUNNING)] * 2)
    first.close()
    again = using(Engine.attach(f"{group}-b", 1))
    wait_until(lambda: again.poll(10))
    assert again.wave == 0


def test_a_follower_of_a_head_that_was_ready_before(group, using):
    """Guards against a follower that never hears READY, since its subscription came after the last rank's."""
    head = using(Coordinator(group=group, **HYBRID))
    using(Engine.attach(group, 0))
    using(StockEngine(head.engine_addresses, 1))
    head.wait_ready(30)
    follower = using(Coordinator(group=f"{group}-b", head=head.head_addresses, **HYBRID))
    follower.wait_ready(30)


def test_a_rank_that_comes_after_ready(pair, group, using):
    """Guards against a stock engine of the further node that starts again and waits for READY for ever."""
    using(Engine.attach(group, 0))
    early = StockEngine(pair[1].engine_addresses, 1)
    connections = pair[1]._wave.stock.connections
    wait_until(lambda: connections.count == 1)
    using(StockEngine(pair[0].engine_addresses, 1))
    assert early.heard() == [wire.READY]
    early.close()
    wait_until(lambda: connections.count == 0)
    late = using(StockEngine(pair[1].engine_addresses, 1))
    assert late.heard() == [wire.READY]


@pytest.mark.parametrize("with_keys", [True, False])
def test_a_head_with_keys(group, using, short_path, with_keys):
    """Guards against a follower that cannot come in with the right keys, or can without any."""
    make_keys(short_path / "keys")
    keys = {"curve_dir": str(short_path / "keys")}
    head = using(Coordinator(group=group, **HYBRID, **keys))
    follower = using(
        Coordinator(group=f"{group}-b", head=head.head_addresses, **HYBRID, **(keys if with_keys else {}))
    )
    engine = using(Engine.attach(f"{group}-b", 1))
    engine.publish(waiting=0, running=7)
    if with_keys:
        wait_until(lambda: head.board.snapshot()[1]["running"] == 7)
        engine.receive(None, wave=3)
        wait_until(lambda: follower.board.wave == 3)
    else:
        wait_until(lambda: head.dropped)
        assert head.board.snapshot()[1]["state"] == "absent"


@pytest.mark.parametrize("head", ["tcp://a:1", "", "tcp://a:1,tcp://a:2"])
def test_a_head_has_three_addresses(group, head):
    """Guards against a follower that waits for a head which it cannot reach."""
    with pytest.raises(SettingError, match="three addresses"):
        Coordinator(group=group, head=head, **HYBRID)
