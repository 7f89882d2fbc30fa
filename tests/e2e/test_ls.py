"""``dpshm ls`` and ``dpshm scale``, and ``dpshm top`` where there are several groups."""

from __future__ import annotations

import json
import signal
import sys
from subprocess import PIPE

import pytest

from dpshm import Coordinator, Engine, Frontend
from tests.e2e.load import environment, run
from tests.e2e.test_top import Terminal, needs_tmux
from tests.support import Popen, Remote, wait_until


@pytest.mark.slow
def test_groups_are_listed_and_scaled(group, using):
    """Guards against a list without a group, and ranks taken away with what they have."""
    using(Coordinator(group=group, dp_size=2, max_engines=4, waves=False))
    engine, frontend = using(Engine.attach(group, 1)), using(Frontend.attach(group))
    rows = {row["group"]: row for row in map(json.loads, run("ls", "--json").stdout.splitlines())}
    assert rows[group]["dp_size"] == 2
    assert group in run("ls").stdout
    assert "4 ranks (before: 2)" in run("scale", "4", "-g", group).stdout
    route = frontend.route(dp_rank=1)
    refused = run("scale", "1", "-g", group, expect=2).stderr
    assert f"rank 1 has 1. Drain them first: dpshm drain 1-3 --group {group}" in refused
    assert "its board holds 1 to 4" in run("scale", "5", "-g", group, expect=2).stderr
    route.cancel()
    assert "1 rank (before: 4)" in run("scale", "1", "-g", group).stdout
    assert engine.board.dp_size == 1


@pytest.mark.slow
def test_a_dead_rank_is_scaled_away(group, using):
    """What a dead rank had is lost, so it keeps nobody from scaling, and asks for no --force."""
    using(Coordinator(group=group, dp_size=2, max_engines=4, waves=False))
    using(Engine.attach(group, 0))
    remote = using(Remote())
    remote.run("engine = Engine.attach(group, 1)", group=group)
    frontend = using(Frontend.attach(group))
    route = frontend.route(dp_rank=1)
    remote.kill()
    wait_until(lambda: frontend.health().ranks[1] == "dead")
    assert "1 rank (before: 2)" in run("scale", "1", "-g", group).stdout
    route.cancel()


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_scale_that_is_ended_leaves_no_rank_drained(group, using, signum):
    """A terminal that is closed while `dpshm scale` waits does not leave a group that refuses all requests."""
    using(Coordinator(group=group, dp_size=2, max_engines=4))
    engines = [using(Engine.attach(group, rank)) for rank in range(2)]
    frontend = using(Frontend.attach(group))
    route = frontend.route(dp_rank=1)  # so that the ranks are not at rest
    with Popen(
        [sys.executable, "-m", "dpshm", "scale", "1", "-g", group], env=environment(), stderr=PIPE, text=True
    ) as scaling:
        wait_until(lambda: all(row["drained"] for row in frontend.snapshot()))
        scaling.send_signal(signum)
        _, err = scaling.communicate()
    assert scaling.returncode == 128 + signum
    assert f"stopped waiting ({signum.name}); nothing was changed" in err
    assert not any(row["drained"] for row in frontend.snapshot())
    route.cancel()
    assert frontend.choose() in (0, 1)
    assert all(engine.board.dp_size == 2 for engine in engines)


@needs_tmux
@pytest.mark.slow
def test_top_asks_which_group(group, using):
    """Guards against a command that ends with a list where it could ask."""
    first, second = f"{group}a", f"{group}b"
    using(Coordinator(group=first, dp_size=1))
    using(Coordinator(group=second, dp_size=3))
    terminal = using(Terminal(group, f"{sys.executable} -m dpshm top"))
    terminal.wait_for("Which group", first, second)
    terminal.keys("nothing", "Enter")
    terminal.wait_for("there is no 'nothing'")
    terminal.keys(second, "Enter")
    terminal.wait_for(f"{second} ·", "3 ranks: 3 absent")
    terminal.keys("q")
    terminal.wait_for("ended 0")
