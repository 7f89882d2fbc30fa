"""Tests of `dpshm.sim.lab.mapping`; `e2e/test_simulate.py` ends it in every way."""

from __future__ import annotations

import os

import pytest

from dpshm.errors import DpshmError, SettingError
from dpshm.sim.lab.mapping import mapping
from tests.support import Marked, wait_until


def called(given: int, task: int) -> tuple[int, int]:
    """A product, and the process that made it."""
    if task < 0:
        raise SettingError("a task below 0")
    return given * task, os.getpid()


@pytest.fixture
def marked(monkeypatch):
    """The processes that a test starts."""
    made = Marked()
    monkeypatch.setenv("DPSHM_TEST_RUN", made.mark)
    return made


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_results_are_those_of_the_function(processes, marked):
    """Guards against tasks that are lost or done twice, and against processes that stay."""
    with mapping(called, 3, processes) as results:
        found = list(results(range(20)))
    assert sorted(product for product, _ in found) == [3 * task for task in range(20)]
    assert ({pid for _, pid in found} == {os.getpid()}) == (processes == 1)
    wait_until(lambda: not marked.workers())


@pytest.mark.slow
def test_what_a_task_raises_is_raised_here(marked):
    """Guards against an error of a process that shows as a killed one, or ends nothing."""
    with pytest.raises(SettingError, match="a task below 0"), mapping(called, 3, 2) as results:
        list(results([1, -1, 2]))
    wait_until(lambda: not marked.workers())


@pytest.mark.slow
def test_a_process_that_is_killed_is_an_error(marked):
    """Guards against a wait for ever for what it would have given."""
    with pytest.raises(DpshmError, match="was killed"), mapping(killed, 0, 2) as results:
        list(results([1]))
    wait_until(lambda: not marked.workers())


def killed(given: int, task: int) -> None:
    """Ends its process, as the system does to free memory."""
    os.kill(os.getpid(), 9)
