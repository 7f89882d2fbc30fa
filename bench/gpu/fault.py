"""One rank is killed during a step, under load: the time of each reaction, and of new ranks on the same board."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

from bench.gpu.driver import LOAD_PROMPT_TOKENS, TIMEOUT_S, Driver, Stuck
from bench.processes import Worker
from dpshm import NoEngineAvailable


def measure_fault(driver: Driver, ranks: Sequence[Worker], restart: Callable[[], str]) -> dict[str, Any]:
    """Kills the last rank during a step, then restarts all ranks."""
    board, victim = driver.frontend.board, driver.dp_size - 1
    for _ in range(4):
        for rank in range(driver.dp_size):
            driver.send(rank, LOAD_PROMPT_TOKENS, 2000)
    words, at_steps = board.words, board.index("steps", victim)
    steps = words[at_steps]
    driver.wait(lambda: words[at_steps] > steps + 20, "some steps under load")
    while not board.step_start[victim]:
        pass
    os.kill(ranks[victim].pid, signal.SIGKILL)
    killed = time.monotonic()
    result: dict[str, Any] = {}
    while "route_raises_ms" not in result:
        elapsed_ms = (time.monotonic() - killed) * 1e3
        verdicts = board.snapshot()["verdict"].tolist()
        if verdicts[victim] == "dead":
            result.setdefault("killed_rank_dead_ms", elapsed_ms)
        try:
            route = driver.frontend.route(1)
            if route.dp_rank == victim:
                result["last_chosen_ms"] = elapsed_ms
            route.cancel()
        except NoEngineAvailable as e:
            result["route_raises_ms"] = elapsed_ms
            result["route_says"] = str(e)
        if elapsed_ms > TIMEOUT_S * 1e3:
            raise Stuck(f"route() goes on; the board:\n{board.snapshot()}")
        time.sleep(0.0005)
    result["all_dead"] = board.snapshot()["verdict"].tolist() == ["dead"] * driver.dp_size
    survivors = [r for i, r in enumerate(ranks) if i != victim]
    result["survivors_exit_status"] = [survivor.exit_status() for survivor in survivors]
    began = time.monotonic()
    prefix = restart()
    result["restart_s"] = time.monotonic() - began
    driver.connect(prefix)
    driver.wait(driver.paused, "the new ranks to be idle")
    for rank in range(driver.dp_size):
        driver.send(rank, LOAD_PROMPT_TOKENS, 20)
    driver.wait(lambda: not driver.out, "replies of the new ranks")
    driver.wait(driver.paused, "a pause of the new ranks")
    result["answered_after_restart"] = driver.dp_size
    return result
