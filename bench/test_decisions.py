"""What each policy's decision costs, and what exclusive mode and the recorder add.

`route` and `done` on a still board (`bench.still`) of 8, 64 and 1024 engines and 4 front-ends, all of which have
learnt their step times and are in a step; the lock and the recorder with 8.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from bench.still import StillBoard
from dpshm.board.layout import STEP_MODEL_WORDS
from dpshm.frontend.decision_lock import DecisionLock
from dpshm.frontend.recorder import Recorder
from dpshm.policies import NAMES, by_name

pytestmark = pytest.mark.filterwarnings("ignore::pytest_benchmark.logger.PytestBenchmarkWarning")
BATCH = 20


def still_board(name: str, engines: int = 8) -> StillBoard:
    """A board on which front-ends decide by that policy."""
    still = StillBoard(engines, 4, policy=by_name(name))
    model = (8_000_000, 200_000, 40_000, 4096, 64, 90_000_000)
    for e in range(engines):
        row = (time.monotonic_ns() + 3_600_000_000_000, 512, *model)
        for i in range(len(STEP_MODEL_WORDS)):
            still.board.step_model[e, i] = row[i]
        still.board.prefill_backlog[e] = 300 * e
    still.beat()
    still.frontend._reader.refresh()
    return still


def timed(benchmark: Any, still: StillBoard, key: str | None = None) -> None:
    """Times `route` and `done`; the figure is of `BATCH` of them."""

    def route_and_finish() -> None:
        for route in [still.frontend.route(512, key=key) for _ in range(BATCH)]:
            route.done()

    benchmark.pedantic(route_and_finish, setup=still.beat, rounds=200, iterations=1, warmup_rounds=5)


@pytest.mark.benchmark(group="route and done, by policy")
@pytest.mark.parametrize("engines", [8, 64, 1024])
@pytest.mark.parametrize("name", NAMES)
def test_route_by_policy(benchmark: Any, using: Any, name: str, engines: int) -> None:
    """One policy."""
    timed(benchmark, using(still_board(name, engines)), "conversation" if name == "affinity" else None)


@pytest.mark.benchmark(group="route and done, exclusive")
@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("name", ["least_loaded", "least_work"])
def test_route_exclusive(benchmark: Any, using: Any, name: str, exclusive: bool) -> None:
    """Without the lock, and with it and nobody else asking for it."""
    still = using(still_board(name))
    if exclusive:
        still.frontend._decision_lock = DecisionLock(still.board.segment)
    timed(benchmark, still)


@pytest.mark.benchmark(group="route and done, recorded")
@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("name", ["least_loaded", "least_work"])
def test_route_recorded(benchmark: Any, using: Any, tmp_path: Path, name: str, record: bool) -> None:
    """Without the recorder and with it."""
    still = using(still_board(name))
    if record:
        still.frontend._recorder = Recorder.create(tmp_path / "ring", engines=8, group="bench", frontend=0)
    timed(benchmark, still)
