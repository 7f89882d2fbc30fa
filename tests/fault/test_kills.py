"""Processes that are killed by the dozen, at random instants."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import closing

import pytest

from dpshm import Board, Coordinator, Engine, Frontend
from dpshm.board import files
from dpshm.board.words import unpack_load, unpack_progress
from dpshm.rules.liveness import Verdict
from dpshm.rules.waves import Phase
from tests.fault.nursery import KV_ONE, Nursery
from tests.support import Remote, leftovers, verdict, wait_until

pytestmark = pytest.mark.slow

ENGINES = 20
ROUNDS = 10


def is_whole(word):
    """Whether a load is one that `write_forever` stored: its three parts come from one counter."""
    waiting, running, _ = unpack_load(word)
    return running == 2 * waiting and word & KV_ONE == waiting % KV_ONE


def test_engines_killed_while_they_publish(group, using):
    """Guards against a word of which a killed engine stored one half, and rows that its death makes unusable.

    200 kills. An engine stores nothing but words that follow from one counter, so each must be that of the last
    step, or of the one before it: whatever else there is was torn.
    """
    rng = random.Random(5)
    board = using(Coordinator(group=group, dp_size=ENGINES)).board
    nursery = using(Nursery())
    killed = 0
    for incarnation in range(1, ROUNDS + 1):
        pids = nursery.rear("write_forever", [(group, e) for e in range(ENGINES)])
        wait_until(lambda i=incarnation: board.engine_incarnation[:ENGINES].tolist() == [i] * ENGINES)
        wait_until(lambda: all(verdict(board, e) is Verdict.ALIVE and board.steps[e] > 2 for e in range(ENGINES)))
        for pid in rng.sample(pids, ENGINES):
            time.sleep(rng.random() * 0.003)
            os.kill(pid, signal.SIGKILL)
            assert all(map(is_whole, board.load[:ENGINES].tolist()))
        killed += nursery.reap().count(-signal.SIGKILL)
        for e in range(ENGINES):
            assert is_whole(int(board.load[e]))
            steps = int(board.steps[e])
            found = {
                "waiting": unpack_load(int(board.load[e]))[0],
                "prompt tokens": board.prompt_tokens[e] / 3,
                "generation tokens": board.generation_tokens[e] / 2,
                "backlog": board.prefill_backlog[e] / 3,
                "finished": board.requests_finished[e],
                "step": unpack_progress(int(board.progress[e]))[1],
            }
            assert all(count in (steps - 1, steps) for count in found.values()), (steps, found)
        wait_until(lambda: all(verdict(board, e) is Verdict.DEAD for e in range(ENGINES)))
        assert not any(board.engine_alive(e) for e in range(ENGINES))
    assert killed == ENGINES * ROUNDS


@pytest.mark.parametrize("patient", [True, False])
def test_everything_killed_at_once_and_started_again(group, using, patient):
    """Guards against a group that cannot be started again once all of it was killed at work.

    A coordinator that starts when all are gone sweeps what they left. One that starts before the kernel has
    released their locks takes the board over, and must serve all the same.
    """
    for _ in range(3):
        processes = [Remote() for _ in range(5)]
        coordinator, *engines, frontend = processes
        coordinator.run("coordinator = Coordinator(group=group, dp_size=3)", group=group)
        for e, remote in enumerate(engines):
            remote.run("engine = Engine.attach(group, e)", group=group, e=e)
            remote.begin("while not told():\n    engine.receive(0)\n    engine.publish(waiting=1, running=0)")
        frontend.run("frontend = Frontend.attach(group)", group=group)
        frontend.begin("routes = []\nwhile not told():\n    routes.append(frontend.route(10))")
        time.sleep(0.05)
        for remote in processes:
            remote.signal(signal.SIGKILL)
        if patient:
            with Board.attach(group) as left:  # a zombie's last thread may still hold a lock
                wait_until(lambda left=left: not left.segment.locks.is_shared())
        with Coordinator(group=group, dp_size=2) as again:
            board = again.board
            if patient:
                assert (board.epoch[0], board.wave, board.dp_size) == (1, 0, 2)
                assert not board.sent_requests.any()
                assert not board.engine_incarnation.any()
            wait_until(lambda board=board: not any(board.engine_alive(e) for e in range(3)))
            with Engine.attach(group, 1) as engine, Frontend.attach(group) as second:
                engine.publish(waiting=0, running=0)
                wait_until(
                    lambda s=second: (
                        {row["state"] for row in s.snapshot() if row["dp_rank"] != 1} <= {"dead", "absent"}
                    )
                )
                route = second.route(10)
                assert route.dp_rank == 1
                engine.receive(second.index, 10, route.wave)
                assert engine.running
                wait_until(lambda board=board: board.phase is Phase.RUNNING)
        for remote in processes:
            remote.close()
        assert leftovers(group) == []


def test_a_frontend_killed_and_restarted_on_its_row(group, using):
    """Guards against a successor that inherits its predecessor's bookings, or whose own are hidden by them."""
    board = using(Coordinator(group=group, dp_size=2, waves=False)).board
    engines = [using(Engine.attach(group, e)) for e in range(2)]
    observer = using(Frontend.attach(group, owner="observer"))
    for life in range(1, 8):
        remote = using(Remote())
        remote.run("frontend = Frontend.attach(group, owner='api')", group=group)
        row = remote.eval("frontend.index")
        remote.run("routes = [frontend.route(10, dp_rank=i % 2) for i in range(6)]")
        for engine in engines:  # all of them arrive: nothing keeps the next one from this row
            for _ in range(3):
                engine.receive(row, 10)
            engine.publish(waiting=0, running=3)
        remote.run("routes += [frontend.route(10, dp_rank=0)]")
        assert observer.snapshot()["in_flight"].tolist() == [1, 0]
        engines[0].receive(row, 10)
        engines[0].publish(waiting=0, running=0)
        remote.run("more = [frontend.route(10, dp_rank=1)]")
        engines[1].receive(row, 10)
        remote.kill()
        engines[1].publish(waiting=0, running=0)
        wait_until(lambda row=row: not board.frontend_alive(row))
        assert (row, board.frontend_incarnation[row]) == (1, life)
        assert observer.snapshot()["in_flight"].tolist() == [0, 0]


def test_any_start_removes_what_dead_groups_left(group, using):
    """Guards against a /dev/shm that fills up with groups whose names never come again."""
    dead, live = f"{group}-killed", f"{group}-live"
    using(Coordinator(group=live, dp_size=1))
    with closing(Remote()) as victim:
        victim.run("kept = Coordinator(group=group, dp_size=1)", group=dead)
        assert dead in files.groups()
        victim.kill()
    using(Coordinator(group=group, dp_size=1))
    assert dead not in files.groups()
    assert not files.sockets_path(dead).exists()
    assert {group, live} <= set(files.groups())
