"""What each policy's decision costs, and what exclusive mode and the recorder add.

`route` and `done`, or `choose` alone, on a fixture board (`bench.fixture_board`) of 8, 64 and 1024 engines and 4
front-ends. All engines have learnt their step times and are in a step. Each has 16 to 22 requests, their context,
and up to 1,200 tokens of prompts. The lock and the recorder are measured with 8.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from bench.fixture_board import FixtureBoard
from dpshm.board.layout import STEP_MODEL_WORDS
from dpshm.frontend.decision_lock import DecisionLock
from dpshm.frontend.recorder import Recorder
from dpshm.policies import NAMES, by_name

pytestmark = pytest.mark.filterwarnings("ignore::pytest_benchmark.logger.PytestBenchmarkWarning")
BATCH = 20


def make_board(name: str, engines: int = 8) -> FixtureBoard:
    """A board on which front-ends decide by that policy."""
    fixture = FixtureBoard(engines, 4, policy=by_name(name))
    model = {
        "base_ns": 8_000_000,
        "per_request_ns": 200_000,
        "per_token_ns": 40_000,
        "chunk_tokens": 4096,
        "max_running": 64,
        "ending_ns": 90_000_000,
        "per_held_token_ps": 65_000,
    }
    board = fixture.board
    for e in range(engines):
        row = {**model, "step_tokens": 512 * (e % 3 == 0), "held_tokens": 20_000 + 977 * e % 7000}
        for name_of_word, value in row.items():
            board.step_model[e, STEP_MODEL_WORDS.index(name_of_word)] = value
        board.request_offset[e] += 16 + e % 5 + e % 3
        board.prefill_backlog[e] = 300 * e % 1300
        board.token_offset[e] += 300 * e % 1300
    begin_steps(fixture)
    fixture.frontend._decisions.reader.refresh()
    return fixture


def begin_steps(fixture: FixtureBoard) -> None:
    """Each engine is in a step that ends 0 to 20 ms from now; the coordinator is there."""
    now_ns, engines = time.monotonic_ns(), fixture.board.dp_size
    fixture.board.step_model[:engines, 0] = [now_ns + e * 7 % 11 * 2_000_000 for e in range(engines)]
    fixture.beat()


def timed(benchmark: Any, fixture: FixtureBoard, key: str | None = None) -> None:
    """Times `route` and `done`; the figure is of `BATCH` of them."""

    def route_and_finish() -> None:
        for route in [fixture.frontend.route(512, key=key) for _ in range(BATCH)]:
            route.done()

    benchmark.pedantic(
        route_and_finish, setup=lambda: begin_steps(fixture), rounds=200, iterations=1, warmup_rounds=5
    )


@pytest.mark.benchmark(group="choose, by policy")
@pytest.mark.parametrize("engines", [8, 64, 1024])
@pytest.mark.parametrize("name", ["least_work", "least_loaded"])
def test_choose(benchmark: Any, using: Any, name: str, engines: int) -> None:
    """A decision alone: read, count every front-end's bookings, choose. The figure is of `BATCH` of them."""
    fixture = using(make_board(name, engines))

    def choose() -> None:
        for _ in range(BATCH):
            fixture.frontend.choose(512)

    benchmark.pedantic(choose, setup=lambda: begin_steps(fixture), rounds=200, iterations=1, warmup_rounds=5)


@pytest.mark.benchmark(group="route and done, by policy")
@pytest.mark.parametrize("engines", [8, 64, 1024])
@pytest.mark.parametrize("name", NAMES)
def test_route_by_policy(benchmark: Any, using: Any, name: str, engines: int) -> None:
    """One policy."""
    timed(benchmark, using(make_board(name, engines)), "conversation" if name == "affinity" else None)


@pytest.mark.benchmark(group="route and done, exclusive")
@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("name", ["least_loaded", "least_work"])
def test_route_exclusive(benchmark: Any, using: Any, name: str, exclusive: bool) -> None:
    """Without the lock, and with the lock while no other process asks for it."""
    fixture = using(make_board(name))
    if exclusive:
        fixture.frontend._decision_lock = DecisionLock(fixture.board.segment)
    timed(benchmark, fixture)


@pytest.mark.benchmark(group="route and done, recorded")
@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("name", ["least_loaded", "least_work"])
def test_route_recorded(benchmark: Any, using: Any, tmp_path: Path, name: str, record: bool) -> None:
    """Without the recorder and with it."""
    fixture = using(make_board(name))
    if record:
        fixture.frontend._decisions.recorder = Recorder.create(
            tmp_path / "ring", engines=8, group="bench", frontend=0
        )
    timed(benchmark, fixture)
