"""A function of many tasks, computed in several processes that end with this one, also amid a task."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from typing import Any, TypeAlias, TypeVar

from dpshm.errors import DpshmError
from dpshm.linux.signals import END_SIGNALS, held

Given = TypeVar("Given")
Task = TypeVar("Task")
Result = TypeVar("Result")
Results: TypeAlias = Callable[[Sequence[Task]], Iterator[Result]]
"""Of some tasks, in any order. It raises what the function raises, and DpshmError if a process was killed."""


@contextmanager
def mapping(
    function: Callable[[Given, Task], Result], given: Given, processes: int
) -> Iterator[Results[Task, Result]]:
    """Computes results in so many processes, and ends them.

    Args:
        function: of a module, so that other processes find it.
        given: the first argument of each call; each process gets it once.
        processes: 1 is this process.
    """
    if processes <= 1:
        yield lambda tasks: map(partial(function, given), tasks)
        return
    context = get_context("spawn")
    resource_tracker.ensure_running()  # now: its start lifts the block of SIGINT and SIGTERM
    theirs, ours = context.Pipe(duplex=False)
    # Not a `Pool`: it waits for ever for a process that was killed. That one's task is lost, and its locks.
    pool = ProcessPoolExecutor(processes, context, _begin, (partial(function, given), theirs))
    with theirs, pool, ours:  # closed from the last on: `ours` ends the processes, then the pool waits for them

        def results(tasks: Sequence[Task]) -> Iterator[Result]:
            with held():  # also by processes that start: one that is broken off prints a traceback
                futures = [pool.submit(_call, task) for task in tasks]
            for future in as_completed(futures):
                try:
                    yield future.result()
                except BrokenProcessPool:
                    raise DpshmError(
                        "a process of the simulation was killed, perhaps because the memory was full: choose "
                        "fewer --processes, or fewer --requests"
                    ) from None

        yield results


_function: Callable[[Any], Any]


def _begin(function: Callable[[Any], Any], lifeline: Connection) -> None:
    """Prepares a process of the pool, which ends once its parent has closed the other end, or has died."""
    global _function  # noqa: PLW0603 - a pool's way to hand over once what all calls need
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    signal.pthread_sigmask(signal.SIG_UNBLOCK, END_SIGNALS)
    _function = function

    def end() -> None:
        lifeline.poll(None)
        os._exit(0)  # amid a task

    threading.Thread(target=end, daemon=True).start()


def _call(task: Any) -> Any:
    return _function(task)
