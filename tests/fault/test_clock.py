"""Clocks that jump: the wall clock, on which nothing may depend, and a monotonic one of another time namespace."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from dpshm import Coordinator, Engine, Frontend
from dpshm.rules.liveness import Verdict
from tests.e2e.load import environment
from tests.support import Remote, publish_forever, verdict, wait_until

DAY_NS = 86_400 * 10**9

JUMP = """
import random
_time, _time_ns, _jumps = time.time, time.time_ns, random.Random(3)
def _day():
    asked.append(1)
    return _jumps.randrange(-365, 365) * 86_400
asked = []
time.time = lambda: _time() + _day()
time.time_ns = lambda: _time_ns() + _day() * 10**9
"""
"""From now on this process's wall clock shows another day each time it is read."""


def test_the_day_changes(group, using):
    """Guards against a clock that an operator or NTP sets: engines called stalled, waits that never end."""
    keeper, *engines, api = (using(Remote()) for _ in range(4))
    for remote in (keeper, *engines, api):
        remote.run(JUMP, group=group)
    keeper.run("coordinator = Coordinator(group=group, dp_size=2, stall_timeout_s=1.0)")
    for e, remote in enumerate(engines):
        remote.run("engine = Engine.attach(group, e)", e=e)
        publish_forever(remote, running=1)
    api.run("frontend = Frontend.attach(group)\nroutes = [frontend.route(5) for _ in range(20)]")
    assert {api.eval(f"routes[{i}].dp_rank") for i in range(20)} == {0, 1}
    board = using(Frontend.attach(group)).board
    wait_until(lambda: board.phase)
    for _ in range(50):  # with work on both, and days that come and go
        assert [verdict(board, e) for e in range(2)] == [Verdict.ALIVE] * 2
        assert all(0 <= age < DAY_NS for age in api.eval("frontend.snapshot()['age_ns'].tolist()"))
    engines[0].signal(signal.SIGSTOP)
    wait_until(lambda: verdict(board, 0) is Verdict.STALLED)
    assert verdict(board, 1) is Verdict.ALIVE
    engines[0].signal(signal.SIGCONT)
    wait_until(lambda: verdict(board, 0) is Verdict.ALIVE)
    keeper.run("asked.clear()\ntime.time()\nimport logging\nlogging.warning('a line')")
    assert keeper.eval("len(asked)") >= 2  # the jumps were there to be seen
    keeper.run("coordinator.close()")


STRANGER = """
import sys, time
from dpshm import Frontend
with Frontend.attach(sys.argv[1]) as frontend:
    print(time.monotonic_ns(), flush=True)
    for line in sys.stdin:
        print(sorted({frontend.route().dp_rank for _ in range(9)}), flush=True)
"""


@pytest.mark.slow
def test_a_frontend_of_another_time_namespace(group, using):
    """Guards against a container whose monotonic clock is a day ahead, and to which every beat looks a day old."""
    unshare = ["unshare", "--time", "--fork", "--monotonic", "86400"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not make a time namespace")
    coordinator = using(Coordinator(group=group, dp_size=2, stall_timeout_s=0.3))
    remote = using(Remote())
    remote.run("engine = Engine.attach(group, 1)", group=group)
    using(Engine.attach(group, 0))
    stranger = subprocess.Popen(
        [*unshare, sys.executable, "-c", STRANGER, group],
        env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with stranger:

        def chosen():
            stranger.stdin.write("\n")
            stranger.stdin.flush()
            return stranger.stdout.readline()

        theirs = int(stranger.stdout.readline())
        assert theirs - int(coordinator.board.coordinator_beat[0]) > DAY_NS // 2
        assert chosen() == "[0, 1]\n"
        remote.kill()
        wait_until(lambda: chosen() == "[0]\n")
        stranger.stdin.close()
