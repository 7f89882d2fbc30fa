"""Tests of `dpshm.vllm.hooks` and `register`: what is installed, once, or why nothing is."""

from __future__ import annotations

import multiprocessing.process

import pytest

from dpshm import vllm as plugin
from dpshm.vllm import hooks, metrics
from dpshm.vllm.options import Options

HOOKS = (
    ("utils", "DPCoordinator"),
    ("utils", "CoreEngineProcManager.__init__"),
    ("core", "EngineCoreProc.run_busy_loop"),
    ("core", "DPEngineCoreProc.run_busy_loop"),
    ("client", "DPAsyncMPClient._ensure_stats_update_task"),
    ("client", "DPAsyncMPClient.add_request_async"),
    ("client", "DPLBAsyncMPClient.process_engine_outputs"),
)


@pytest.fixture(autouse=True)
def _anew():
    """This process has said nothing yet."""
    plugin._say_off.cache_clear()


@pytest.fixture(autouse=True)
def page(monkeypatch):
    """Prometheus-client's page; the test's changes to it are undone."""
    prometheus_client = pytest.importorskip("prometheus_client")
    from prometheus_client import multiprocess

    collector = multiprocess.MultiProcessCollector
    monkeypatch.setattr(collector, "__init__", collector.__init__)
    registry = prometheus_client.CollectorRegistry()
    monkeypatch.setattr(prometheus_client, "REGISTRY", registry)
    return registry


def names(vllm):
    """What stands for each name that is hooked."""
    found = []
    for module, path in HOOKS:
        thing = getattr(vllm, module)
        for part in path.split("."):
            thing = getattr(thing, part)
        found.append(thing)
    return found


def changed(vllm, before):
    """Which names have something else than before."""
    return [path for (_, path), old, new in zip(HOOKS, before, names(vllm), strict=True) if old is not new]


def test_each_hook_is_there_once(vllm):
    """Guards against a hook that is missing, or that wraps itself when vLLM calls the plugin again."""
    before = names(vllm)
    hooks.install(Options())
    assert changed(vllm, before) == [path for _, path in HOOKS]
    after = names(vllm)
    hooks.install(Options())
    assert changed(vllm, after) == []


def test_an_old_release_stays_as_it_is(vllm, log):
    """Guards against hooks on a vLLM whose behaviour was never seen; and against silence about it."""
    vllm.modules["vllm"].__version__ = "0.27.0"
    before = names(vllm)
    hooks.install(Options())
    hooks.install(Options())
    assert changed(vllm, before) == []
    assert log("vLLM 0.27.0") == 1


def test_a_new_release_is_tried(vllm, log):
    """Guards against a plugin that is off on each new release until a list is edited."""
    vllm.modules["vllm"].__version__ = "9.9.0"
    before = names(vllm)
    hooks.install(Options())
    assert len(changed(vllm, before)) == len(HOOKS)
    assert log("vLLM 9.9.0 passed the self-check") == 1


def test_an_old_release_can_be_tried(vllm):
    """Guards against a variable that changes nothing."""
    vllm.modules["vllm"].__version__ = "0.27.0"
    before = names(vllm)
    hooks.install(Options(any_version=True))
    assert len(changed(vllm, before)) == len(HOOKS)


def ours(vllm):
    """Which functions of dpshm stand in vLLM's modules and on its classes."""
    modules = vllm.utils, vllm.core, vllm.client
    places = [vllm.utils, *(kind for module in modules for kind in vars(module).values())]
    values = [value for place in places if hasattr(place, "__dict__") for value in vars(place).values()]
    return [value for value in values if getattr(value, "__module__", "").startswith("dpshm.")]


@pytest.mark.parametrize(("module", "path"), HOOKS)
def test_a_release_without_a_name_stays_as_it_is(vllm, log, module, path):
    """Guards against some of the hooks without the others, in a release where one has no place."""
    owner, _, name = path.rpartition(".")
    place = getattr(vllm, module)
    for holder in getattr(place, owner).__mro__[:-1] if owner else (place,):
        if name in vars(holder):
            delattr(holder, name)
    hooks.install(Options())
    assert log("dpshm is off") == 1
    assert ours(vllm) == []


def test_that_test_sees_hooks(vllm):
    """Guards against the test above finding nothing because it looks in the wrong place."""
    hooks.install(Options())
    assert len(ours(vllm)) == len(HOOKS)


@pytest.mark.parametrize(("word", "count"), [("1", len(HOOKS)), ("0", 0), ("shadow", len(HOOKS))])
def test_the_switch(vllm, monkeypatch, word, count):
    """Guards against a switch that does not turn it off."""
    monkeypatch.setenv("DPSHM", word)
    before = names(vllm)
    plugin.register()
    assert len(changed(vllm, before)) == count


def test_register_never_raises(vllm, monkeypatch, log):
    """Guards against a server that does not start because of a variable with a wrong word."""
    monkeypatch.setenv("DPSHM", "perhaps")
    before = names(vllm)
    plugin.register()
    assert changed(vllm, before) == []
    assert log("dpshm is off: DPSHM is 'perhaps'") == 1


def test_a_wrong_word_is_said_once_and_without_a_traceback(vllm, monkeypatch, caplog):
    """Guards against tracebacks of every process for a mistake of the user, which the message names already."""
    caplog.set_level("DEBUG", logger="vllm.dpshm")
    monkeypatch.setenv("DPSHM_POLICY", "gess")
    plugin.register()
    plugin.register()
    monkeypatch.setattr(multiprocessing.process, "parent_process", lambda: "a launcher")
    plugin._say_off.cache_clear()
    plugin.register()
    assert [(record.levelname, record.exc_info) for record in caplog.records] == [
        ("WARNING", None),
        ("DEBUG", None),
    ]


def test_a_failure_of_ours_has_its_traceback(vllm, monkeypatch, caplog):
    """Guards against a bug of ours that no report can show."""
    monkeypatch.setattr(hooks, "install", lambda _: 1 / 0)
    plugin.register()
    assert [record.exc_info is not None for record in caplog.records] == [True]


def test_the_page_shows_the_board_with_one_api_server_and_with_several(vllm, page, tmp_path):
    """Guards against figures of the board that are on one of vLLM's two kinds of page alone."""
    from prometheus_client import CollectorRegistry, multiprocess

    hooks.install(Options())
    assert metrics._COLLECTOR in page._collector_to_names
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=str(tmp_path))
    assert metrics._COLLECTOR in registry._collector_to_names
    multiprocess.MultiProcessCollector(None, path=str(tmp_path))
