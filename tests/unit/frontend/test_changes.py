"""Tests of `dpshm.frontend.changes`: an API server hears what happens to its group, in a loop and in a thread."""

from __future__ import annotations

import asyncio
import logging

import pytest

from dpshm import Coordinator, Engine, Event, Frontend, HandleClosed, SegmentNotFound
from tests.support import Remote, count_fds, count_threads, wait_until


@pytest.fixture
def coordinator(group, using):
    """A coordinator of two ranks in lockstep."""
    return using(Coordinator(group=group, dp_size=2, stall_timeout_s=0.3))


def until(frontend, kind, act=lambda: None):
    """Runs `act` after the changes were asked for; returns them up to the first of a kind."""

    async def collect():
        changes, seen = frontend.changes(), []
        act()
        async with asyncio.timeout(30):
            async for change in changes:
                seen.append(change)
                if change.kind == kind:
                    break
        changes.close()
        return seen

    return asyncio.run(collect())


def test_what_happens_to_a_rank_is_heard(coordinator, group, using):
    """Guards against an API server that learns of a dead, hung or drained rank only from failing requests."""
    frontend = using(Frontend.attach(group))
    remote = using(Remote())
    joined = until(frontend, "rank_joined", lambda: remote.run("engine = Engine.attach(group, 1)", group=group))
    assert (joined[-1].row, joined[-1].group, type(joined[-1])) == (1, group, Event)
    assert until(frontend, "rank_drained", lambda: coordinator.drain(1))[-1].row == 1
    assert until(frontend, "rank_undrained", lambda: coordinator.undrain(1))[-1].row == 1
    stalled = until(frontend, "rank_stalled", lambda: remote.run("engine.publish(waiting=1, running=0)"))
    assert stalled[-1].row == 1
    recovered = until(frontend, "rank_recovered", lambda: remote.run("engine.publish(waiting=0, running=0)"))
    assert recovered[-1].row == 1
    assert until(frontend, "rank_died", remote.kill)[-1].row == 1


def test_a_wave_is_heard(coordinator, group, using):
    """Guards against a server that cannot tell when its ranks wake up and pause."""
    engines = [using(Engine.attach(group, rank)) for rank in range(2)]
    frontend = using(Frontend.attach(group))

    def wake():
        frontend.route().cancel()
        wait_until(lambda: all([engine.poll(1) for engine in engines]))  # noqa: C419 - each has to look

    assert until(frontend, "wave_started", wake)[-1].value == 0
    assert until(frontend, "wave_ended", lambda: [engine.wave_complete() for engine in engines])[-1].value == 1


def test_changes_end_with_the_group_and_with_the_front_end(coordinator, group, using):
    """Guards against a task that waits for ever, or keeps a descriptor, when its server shuts down."""
    frontend = using(Frontend.attach(group))
    before = count_fds()

    async def read(end):
        changes = frontend.changes()
        reading = asyncio.create_task(_all(changes))
        await asyncio.sleep(0)
        await asyncio.to_thread(end)
        async with asyncio.timeout(30):
            return await reading

    assert asyncio.run(read(frontend.close)) == []
    with pytest.raises(HandleClosed):
        frontend.changes()
    frontend = using(Frontend.attach(group))
    assert asyncio.run(read(coordinator.close))[-1].kind == "group_ended"
    assert count_fds() <= before
    with pytest.raises(SegmentNotFound):
        frontend.changes()
    using(Coordinator(group=group, dp_size=2))
    with pytest.raises(SegmentNotFound, match="another has its name"):  # it would tell of the other's ranks
        frontend.changes()


async def _all(changes):
    return [change async for change in changes]


def test_a_function_is_called_with_each_change(coordinator, group, using, caplog):
    """Guards against changes that a server without an event loop cannot hear, and a fault in its function that
    ends them.
    """
    heard = []

    def on_change(event):
        heard.append((event.kind, event.row))
        if event.kind == "rank_joined":
            raise RuntimeError("a fault of the server")

    threads = count_threads()
    frontend = using(Frontend.attach(group, on_change=on_change))
    assert count_threads() == threads + 1
    with caplog.at_level(logging.ERROR):
        engine = using(Engine.attach(group, 0))
        wait_until(lambda: ("rank_joined", 0) in heard)
        engine.close()
        wait_until(lambda: ("rank_left", 0) in heard)
    assert "a fault of the server" in caplog.text
    frontend.close()
    assert count_threads() <= threads


def test_the_function_may_close_the_front_end(coordinator, group, using):
    """Guards against a server that hangs because it shuts down when it hears of a change."""
    closed = []
    frontends = []

    def on_change(event):
        if event.kind == "rank_joined":
            frontends[0].close()
            closed.append(event.row)

    frontends.append(using(Frontend.attach(group, on_change=on_change)))
    using(Engine.attach(group, 0))
    wait_until(lambda: closed == [0])
