"""Tests of `dpshm.vllm.follow`: a further node of hybrid load balancing, whose head has a /dev/shm of its own."""

from __future__ import annotations

import inspect
import os
import pickle
import tempfile
from types import SimpleNamespace

import pytest

from dpshm import Board
from dpshm.board import files
from dpshm.vllm import follow
from dpshm.vllm.find import group_at
from tests.support import Remote, wait_until
from tests.unit.vllm.fake_core import INPUTS, run


@pytest.fixture
def head(group, using, monkeypatch):
    """A head whose board no process here finds."""
    with tempfile.TemporaryDirectory(prefix="dpt-", dir=files.directory()) as elsewhere:
        here = os.environ["DPSHM_DIR"]
        monkeypatch.setenv("DPSHM_DIR", elsewhere)
        remote = using(Remote())
        monkeypatch.setenv("DPSHM_DIR", here)
        settings = {"group": group, "dp_size": 2, "dp_size_local": 1, "balancing": "hybrid"}
        remote.run("coordinator = Coordinator(**settings)", settings=settings)
        yield remote
        remote.run("coordinator.close()")


@pytest.fixture
def make_core(vllm, head):
    """`make_core(local=0)` gives a core of rank 1 on the further node."""

    def make(kind="DPEngineCoreProc", local=0, **config):
        core = getattr(vllm.core, kind)(
            head.eval("coordinator.stats_publish_address"), engine_index=1, inputs=INPUTS
        )
        starts, reports = head.eval("coordinator.engine_addresses")
        core.addresses.coordinator_input, core.addresses.coordinator_output = starts, reports
        known = {"data_parallel_hybrid_lb": True, "data_parallel_rank_local": local}
        known |= {"data_parallel_size": 2, "data_parallel_size_local": 1}
        core.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(**known | config))
        return core

    return make


class EngineManager:
    """Gives an engine its configuration as vLLM does where it spawns: pickled, and then changed.

    That is before the engine's process loads plugins, so only a hook in the launcher can know the numbers.
    """

    def __init__(self, vllm_config, is_moe):
        vllm_config = pickle.loads(pickle.dumps(vllm_config))
        if not is_moe:
            config = vllm_config.parallel_config
            config.data_parallel_size = config.data_parallel_size_local = 1
            config.data_parallel_rank = 0
        self.of_engine = vllm_config


@pytest.mark.parametrize("kind", ["DPEngineCoreProc", "EngineCoreProc"])
def test_the_first_engine_gives_its_node_a_board(make_core, head, log, kind):
    """Guards against a further node that routes by the broadcast, and against a board that outlives its node."""
    core = make_core(kind)
    manager = type("Manager", (EngineManager,), {"__init__": follow.sizes_noted(EngineManager.__init__)})
    core.vllm_config = manager(core.vllm_config, is_moe=kind == "DPEngineCoreProc").of_engine
    address = core.frontend_stats_publish_address
    assert group_at(address) is None

    def body():
        group = group_at(address)
        with Board.attach(group) as board:
            assert board.segment.header.waves == (kind == "DPEngineCoreProc")
            assert board.dp_size == 2
            wait_until(lambda: board.snapshot()[1]["verdict"] == "alive")
            second = make_core(local=1)
            assert follow.start_follower(second, follow.Options()) is None  # there is a board already
        wait_until(lambda: head.eval("coordinator.board.snapshot()[1]['verdict']") == "alive")

    run(core, body)
    assert log("follows the coordinator at tcp:") == 1
    assert log("to the board of group") == 1
    assert group_at(address) is None
    assert core.reported == []


def test_a_configuration_of_another_kind_starts_its_engines_all_the_same():
    """Guards against a launcher that ends where a release has other arguments; and a signature that is hidden."""
    start = follow.sizes_noted(EngineManager.__init__)
    assert inspect.signature(start) == inspect.signature(EngineManager.__init__)
    manager = SimpleNamespace()
    start(manager, "no configuration", is_moe=True)
    assert manager.of_engine == "no configuration"


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"kind": "EngineCoreProc", "data_parallel_size": 1}, "does not know how many ranks there are"),
        ({"data_parallel_hybrid_lb": False}, "sends its row to tcp:"),
        ({"local": 1}, "no board for"),
    ],
)
def test_where_no_follower_is_started(make_core, log, monkeypatch, config, line):
    """Guards against a board for a node that needs none, and against an engine that waits for one for ever."""
    monkeypatch.setattr(follow, "BOARD_TIMEOUT_S", 0.1)
    core = make_core(**config)
    run(core, lambda: None)
    assert log(line) >= 1
    assert group_at(core.frontend_stats_publish_address) is None


def test_a_follower_that_does_not_start(make_core, log, monkeypatch):
    """Guards against an engine that ends because its node can have no board."""
    core = make_core(data_parallel_size=0)
    run(core, lambda: None)
    assert log("gets no board, and goes on") == 1
