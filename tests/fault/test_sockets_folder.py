"""The folder of a live group's sockets, or what is in it, is removed while the segment stays."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from dpshm import Coordinator, Engine, Frontend, GroupInUse
from dpshm.net.doorbell import DoorbellClient
from dpshm.rules.waves import Phase
from tests.support import polled, wait_until


def remove_files(folder: Path) -> None:
    """Removes what is in the folder."""
    for path in folder.iterdir():
        path.unlink()


def replaced(folder: Path) -> bool:
    """Puts a link to nowhere in the place of the folder, unless the coordinator is quicker."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(FileExistsError):
        folder.symlink_to("/nowhere")
    return folder.is_symlink()


@pytest.fixture
def coordinator(group, using):
    """A coordinator of two ranks."""
    return using(Coordinator(group=group, dp_size=2))


@pytest.mark.parametrize("remove", [shutil.rmtree, remove_files])
def test_the_sockets_are_made_again(group, using, coordinator, remove, caplog):
    """Guards against a rank that attaches later and never hears START: its group hangs at the next wave."""
    folder = coordinator.board.segment.sockets_path
    engines = [using(Engine.attach(group, e)) for e in range(2)]
    wait_until(lambda: polled(engines) or all(engine.ready for engine in engines))
    frontend = using(Frontend.attach(group))
    bell = engines[0].bell
    engines[1].close()
    remove(folder)
    engines[1] = using(Engine.attach(group, 1))
    engines[0].ready = False
    wait_until(lambda: polled(engines) or all(engine.ready for engine in engines))
    assert "were removed from" in caplog.text
    route = frontend.route(dp_rank=0, wake=False)
    engines[0].receive(frontend.index, 0, route.wave)
    wait_until(lambda: polled(engines))
    wait_until(lambda: coordinator.board.phase is Phase.RUNNING)
    route.done()
    for engine in engines:
        engine.wave_complete()
    # The doorbells are there again, under the same number.
    wait_until(lambda: not polled(engines) and coordinator.board.phase is Phase.PAUSED)
    assert engines[0].bell == bell
    assert engines[1].bell is not None
    client = using(DoorbellClient(folder, 2))
    client.ring(engines[0].wave)
    assert polled(engines)


def test_a_second_coordinator_is_still_refused(group, coordinator):
    """Guards against two coordinators: the lock of the first is on a folder that is gone."""
    folder = coordinator.board.segment.sockets_path
    shutil.rmtree(folder)
    wait_until(folder.exists)
    with pytest.raises(GroupInUse):
        Coordinator(group=group, dp_size=2)
    assert coordinator.is_healthy()


def test_a_folder_that_cannot_be_made(group, using, coordinator):
    """Guards against a coordinator that ends, or gives up, because something is in the place of the folder."""
    engine = using(Engine.attach(group, 0))
    wait_until(lambda: engine.poll(10) or coordinator.board.engine_mark[0])
    folder = coordinator.board.segment.sockets_path
    wait_until(lambda: replaced(folder))
    wait_until(lambda: coordinator.dropped.get("the sockets' folder cannot be made again yet"))
    folder.unlink()
    wait_until((folder / "to-engines").exists)
    other = using(Engine.attach(group, 1))
    wait_until(lambda: polled([engine, other]) or other.ready)


def test_a_group_whose_segment_is_gone_makes_nothing(group, coordinator):
    """Guards against an old coordinator that takes the folder of a new group of the same name."""
    segment = coordinator.board.segment
    segment.path.unlink()
    shutil.rmtree(segment.sockets_path)
    with Coordinator(group=group, dp_size=1) as other:
        assert other.board.segment.sockets_path == segment.sockets_path
        coordinator.close()
        assert segment.sockets_path.exists()
        assert other.is_healthy()
