"""A coordinator that is killed again and again while requests flow, and restarted from the command line."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import ExitStack

import pytest

from dpshm import Board, Engine, Frontend, SegmentNotFound
from dpshm.net import wire
from dpshm.rules.waves import Phase
from tests.e2e.load import environment, run
from tests.soak.group import BEGIN
from tests.soak.ledger import Ledger
from tests.support import Remote, StockFrontend, wait_until

pytestmark = pytest.mark.slow

RANKS = 2
"""That work; one more is drained."""
FRONTENDS = 2
KILLS = 3


@pytest.fixture
def start(group, tmp_path):
    """`start(*options)` starts ``dpshm coordinator --group G``; it is gone when the test ends."""
    with ExitStack() as stack:

        def start(*more):
            with (tmp_path / "log").open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "dpshm", "coordinator", "--group", group, *more],
                    env=environment(),
                    stderr=log,
                )
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        yield start


def test_a_coordinator_killed_while_requests_flow(group, using, start, tmp_path):
    """Guards against requests that a coordinator's death loses or refuses, and a successor that begins anew."""
    coordinator = start("--dp-size", str(RANKS + 1))
    wait_until(lambda: _is_up(group))
    board = using(Board.attach(group))
    ledger = Ledger(tmp_path / "ledger", RANKS + 1)
    slots = [("engine", e) for e in range(RANKS)] + [("front-end", f) for f in range(FRONTENDS)]
    remotes = [using(Remote()) for _ in slots]
    for life, (role, slot) in enumerate(slots):
        remotes[life].run("os.nice(10)")  # they take all there is, and the coordinator has to start beside them
        remotes[life].begin(
            BEGIN,
            role=role,
            group=group,
            ledger=str(tmp_path / "ledger"),
            peers=RANKS + 1,
            slot=slot,
            life=life,
            fork=False,
        )
    frontends = range(RANKS, RANKS + FRONTENDS)
    drained = using(Engine.attach(group, RANKS))
    own = using(Frontend.attach(group))
    wait_until(lambda: drained.poll(10) or drained.ready)
    stock = using(StockFrontend(board.segment.header.stats_address))
    run("drain", str(RANKS), "-g", group, "--force")

    def total(name):
        return sum(sum(ledger.by_peer(life, name)) for life in frontends)

    def wait_for_answers():
        before = total("completed")
        wait_until(lambda: total("completed") > before + 300)

    for epoch in range(1, KILLS + 1):
        wait_for_answers()
        wave = board.wave
        assert (board.epoch[0], board.coordinator_pid[0]) == (epoch, coordinator.pid)
        held = own.route(10, dp_rank=0)  # a booking whose request is never sent
        coordinator.kill()
        coordinator.wait()
        assert not board.coordinator_alive()
        wait_for_answers()
        coordinator = start()
        wait_until(lambda epoch=epoch: board.epoch[0] == epoch + 1)
        assert board.wave >= wave
        assert board.sent_requests[own.index, 0] > board.received_requests[0, own.index]
        wait_until(lambda pid=coordinator.pid: board.coordinator_pid[0] == pid)
        assert board.snapshot()["state"].tolist()[RANKS] == "drained"
        assert board.snapshot()["verdict"].tolist() == ["alive"] * (RANKS + 1)
        held.cancel()

        # All fall asleep, which this coordinator has to hear or see; then one wakes the others through it.
        ledger.paused = True
        wait_until(lambda: all(ledger.get(life, "quiet") for life in range(len(slots))))

        def at_rest():
            if drained.poll(1):  # a START, or a ring of another rank, may come late
                drained.wave_complete()
                return False
            return board.phase is Phase.PAUSED

        wait_until(at_rest)
        ledger.paused = False

        def told():
            stock.send(wire.encode_first_request(0, board.wave))  # rings no doorbell; lost while it reconnects
            return drained.poll(50)

        wait_until(told)
        wait_until(lambda: board.phase is Phase.RUNNING)

    ledger.paused = True
    wait_until(lambda: all(ledger.get(life, "quiet") for life in frontends))
    assert not any(remote.ended() for remote in remotes)
    assert total("sent") == total("completed") > 600 * KILLS
    assert total("lost") == 0
    for name in ("no_engine", "unexpected"):  # `route()` never raised
        assert sum(ledger.get(life, name) for life in frontends) == 0
    assert board.snapshot()["in_flight"].tolist() == [0] * (RANKS + 1)
    for remote in remotes:
        remote.run("")
    coordinator.send_signal(signal.SIGINT)
    assert coordinator.wait(60) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


def _is_up(group):
    try:
        with Board.attach(group) as board:
            return board.epoch[0] == 1
    except SegmentNotFound:
        return False
