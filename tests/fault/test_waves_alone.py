"""Waves without a coordinator: it was killed or stopped, before a wave or amid one, and each later wave begins."""

from __future__ import annotations

import signal

import pytest

from dpshm import Coordinator, Engine, Frontend
from dpshm.board.files import segment_path
from dpshm.board.sweep import sweep
from dpshm.rules.waves import Phase
from tests.support import Remote, polled, wait_until

WAVES = 4


class Sweep:
    """Removes what a killed coordinator leaves, once all others have left."""

    def __init__(self, group):
        self.group = group

    def close(self):
        """Removes it."""
        wait_until(lambda: sweep(self.group) or not segment_path(self.group).exists())


@pytest.fixture
def members(group, using):
    """A coordinator in a process of its own, three ranks that have run one wave, and a front-end."""
    using(Sweep(group))
    remote = using(Remote())
    remote.run("coordinator = Coordinator(group=group, dp_size=3)", group=group)
    engines = [using(Engine.attach(group, dp_rank)) for dp_rank in range(3)]
    frontend = using(Frontend.attach(group))
    wait_until(lambda: polled(engines) or all(engine.ready for engine in engines))
    frontend.wake()
    wait_until(lambda: polled(engines))
    return remote, engines, frontend


def end(engines):
    """The wave is over for all ranks."""
    for engine in engines:
        engine.wave_complete()


def gone(remote, how, frontend):
    """The coordinator ends, or stops; returns once front-ends can know it."""
    if how == "killed":
        remote.kill()
    else:
        remote.signal(signal.SIGSTOP)
    wait_until(lambda: not frontend.board.is_watched())


@pytest.mark.parametrize("amid_a_wave", [False, True])
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_front_ends_wake_every_wave(members, how, amid_a_wave):
    """Guards against a front-end that believes a control word which no coordinator changes any more."""
    remote, engines, frontend = members
    board = frontend.board
    wait_until(lambda: board.phase is Phase.RUNNING)
    if amid_a_wave:
        gone(remote, how, frontend)
        end(engines)
    else:
        end(engines)
        wait_until(lambda: (board.wave, board.phase) == (1, Phase.PAUSED))
        gone(remote, how, frontend)
    for wave in range(1, WAVES):
        wait_until(lambda: frontend.wake() or polled(engines))  # again and again: it learns that it is alone
        assert [engine.wave for engine in engines] == [wave] * 3
        end(engines)
    if how == "stopped":
        remote.signal(signal.SIGCONT)
        wait_until(lambda: (board.wave, board.phase) == (WAVES, Phase.PAUSED))


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_request_wakes_every_wave_at_once(members, how):
    """Guards against a rank that its request wakes and that waits for ranks which no other process calls."""
    remote, engines, frontend = members
    if how == "killed":
        remote.kill()
    else:
        remote.signal(signal.SIGSTOP)
    end(engines)
    for wave in range(1, WAVES):  # from now on, also while front-ends cannot know yet that there is no coordinator
        with frontend.route(wake=False) as route:
            engines[route.dp_rank].receive(frontend.index, wave=route.wave)
        wait_until(lambda: polled(engines))
        assert [engine.wave for engine in engines] == [wave] * 3
        end(engines)
    if how == "stopped":
        remote.signal(signal.SIGCONT)
        wait_until(lambda: (frontend.board.wave, frontend.board.phase) == (WAVES, Phase.PAUSED))


def test_a_new_coordinator_finds_the_wave(members, group, using):
    """Guards against a new coordinator that goes on in the wave in which the last one died."""
    remote, engines, frontend = members
    remote.kill()
    end(engines)
    for _ in range(2):
        with frontend.route(wake=False) as route:
            engines[route.dp_rank].receive(frontend.index, wave=route.wave)
        wait_until(lambda: polled(engines))
        end(engines)
    second = using(Coordinator(group=group, dp_size=3))
    wait_until(lambda: (second.board.wave, second.board.phase) == (3, Phase.PAUSED))
    frontend.wake()
    wait_until(lambda: polled(engines))
    assert [engine.wave for engine in engines] == [3] * 3
