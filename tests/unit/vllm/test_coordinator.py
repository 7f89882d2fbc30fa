"""Tests of `dpshm.vllm.coordinator`: when ours is started, with what, and when vLLM's own."""

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace

import pytest

from dpshm.board import files
from dpshm.coordinator.settings import make_settings
from dpshm.vllm import coordinator as module
from dpshm.vllm.coordinator import coordinator_factory
from dpshm.vllm.options import Options
from tests.support import LoneBoard

STOCK = object()


@pytest.fixture
def parallel_config():
    """What the factory reads of vLLM's ``ParallelConfig``, for two ranks on this node."""
    return SimpleNamespace(
        data_parallel_size=2,
        data_parallel_size_local=2,
        data_parallel_master_ip="127.0.0.1",
        data_parallel_external_lb=False,
        data_parallel_hybrid_lb=False,
        enable_elastic_ep=False,
        _api_process_count=2,
    )


@pytest.fixture
def envs(monkeypatch):
    """The module ``vllm.envs`` of this process."""
    envs = ModuleType("vllm.envs")
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.envs", envs)
    return envs


def test_the_factory_gives_ours(group, parallel_config, envs, caplog):
    """Guards against settings that do not reach the coordinator, and against a start that is not logged."""
    caplog.set_level("INFO", logger="vllm.dpshm")
    make = coordinator_factory(lambda *_, **__: STOCK, Options(group=group, stall_timeout_s=7.0))
    coordinator = make(parallel_config, enable_wave_coordination=False, logging_config=None)
    try:
        settings = coordinator.settings
        assert (settings.group, settings.dp_size, settings.waves) == (group, 2, False)
        assert settings.stall_timeout_s == 7.0
        assert coordinator.get_stats_publish_address().startswith("ipc://")
        assert f"coordinates group '{group}': 2 ranks, 2 API servers" in caplog.text
    finally:
        coordinator.shutdown()


@pytest.mark.parametrize(
    ("change", "cause"),
    [("enable_elastic_ep", "elastic"), ("VLLM_USE_RUST_FRONTEND", "Rust front-end")],
)
def test_where_it_cannot_help_it_stays_out(parallel_config, envs, caplog, change, cause):
    """Guards against a coordinator of ours whose board no process reads."""
    caplog.set_level("INFO", logger="vllm.dpshm")
    setattr(envs if change.startswith("VLLM") else parallel_config, change, True)
    make = coordinator_factory(lambda *_, **__: STOCK, Options())
    assert make(parallel_config, True) is STOCK
    assert cause in caplog.text


@pytest.mark.usefixtures("envs")
def test_a_failure_leaves_vllm_its_own(group, parallel_config, caplog, monkeypatch, tmp_path):
    """Guards against a server that does not start because /dev/shm cannot be used."""
    make = coordinator_factory(lambda *_, **__: STOCK, Options(group=group))
    with monkeypatch.context() as environment:
        environment.setenv("DPSHM_DIR", str(tmp_path / "nowhere"))
        assert make(parallel_config, enable_wave_coordination=True) is STOCK
    assert "vLLM starts its own" in caplog.text
    assert "nowhere" in caplog.text


def test_boards_of_killed_servers_are_removed(monkeypatch, parallel_config, envs, group, using):
    """Guards against a /dev/shm that fills up: the names of killed servers' boards never come again."""
    dead = LoneBoard(f"vllm-{group}")
    try:
        coordinator = coordinator_factory(lambda *_, **__: STOCK, Options(group=group))(parallel_config, True)
        coordinator.shutdown()
        assert f"vllm-{group}" not in files.groups()
    finally:
        dead.segment.unlink()
        dead.close()


def test_a_server_on_a_network_starts_as_it_does_without_us(parallel_config):
    """Guards against a plugin that asks for keys, which no stock engine has: vLLM's coordinator asks for none."""
    parallel_config.data_parallel_master_ip = "10.0.0.1"
    parallel_config.data_parallel_hybrid_lb = True
    given = module._settings(parallel_config, True, Options())
    settings = make_settings(**given)
    assert (settings.host, settings.needs_tcp, settings.curve_dir) == ("10.0.0.1", True, None)


def test_a_stale_board_of_another_user_is_stepped_around(tmp_path, monkeypatch):
    """Guards against a server that runs without dpshm because another user left a board under its default name."""
    monkeypatch.setenv("DPSHM_DIR", str(tmp_path))
    assert module._free_name("vllm-7") == "vllm-7"
    files.segment_path("vllm-7").touch()
    assert module._free_name("vllm-7") == "vllm-7"  # this user's: it can be swept
    ours = os.geteuid()
    monkeypatch.setattr(module.os, "geteuid", lambda: ours + 1)
    assert module._free_name("vllm-7") == f"vllm-7-u{ours + 1}"


@pytest.mark.parametrize(
    ("backend", "environ", "missing"),
    [
        ("mp", {"DPSHM_DIR": "/x"}, []),
        ("ray", {}, []),
        ("ray", {"DPSHM_DIR": "/x", "DPSHM": "shadow", "HOME": "/"}, ["DPSHM", "DPSHM_DIR"]),
        ("ray", {"DPSHM_DIR": "/x", module.PREFIXES: "A, DPSHM"}, []),
        ("ray", {"DPSHM_DIR": "/x", "DPSHM_POLICY": "y", module.NAMES: "B,DPSHM_DIR"}, ["DPSHM_POLICY"]),
        ("ray", {"DPSHM_DIR": "/x", module.PREFIXES: ",A"}, ["DPSHM_DIR"]),
    ],
)
def test_variables_that_do_not_reach_actors_are_named(backend, environ, missing):
    """Guards against an actor that looks for its board in another folder, and nothing says why it finds none."""
    assert module.not_for_actors(SimpleNamespace(data_parallel_backend=backend), environ) == missing
