"""As many waves as wake-ups, no more: on a machine that is busy, with front-ends whose sockets still connect."""

from __future__ import annotations

import os

from dpshm import Engine, Frontend
from dpshm.rules.waves import Phase
from tests.support import Remote, polled, wait_until

WAVES = 60
RANKS = 4


def test_each_wave_has_a_request(group, using):
    """Guards against an empty wave: a late message begins it, and the next request waits for its steps."""
    remote = using(Remote())
    remote.run(f"coordinator = Coordinator(group=group, dp_size={RANKS}, resend_interval_ms=10_000)", group=group)
    for _ in range(min(8, 2 * len(os.sched_getaffinity(0)))):
        using(Remote()).begin("while not told(): pass")
    engines = [using(Engine.attach(group, dp_rank)) for dp_rank in range(RANKS)]
    board = engines[0].board
    wait_until(lambda: polled(engines) or all(engine.ready for engine in engines))
    for wave in range(WAVES):
        with Frontend.attach(group, owner="newest") as frontend:
            with frontend.route(dp_rank=wave % RANKS, wake=wave % 2 == 0) as route:
                engines[route.dp_rank].receive(frontend.index, wave=route.wave)
                frontend.wake()
            wait_until(lambda: polled(engines))
            for engine in engines[:: 1 if wave % 3 else -1]:
                engine.wave_complete()
        wait_until(lambda wave=wave: (board.wave, board.phase) == (wave + 1, Phase.PAUSED))
    assert not polled(engines)
    assert board.words[board.index("waves_started")] <= WAVES
    assert [engine.wave for engine in engines] == [WAVES] * RANKS
    remote.run("coordinator.close()")
