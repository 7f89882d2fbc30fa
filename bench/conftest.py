"""Fixtures of the benchmarks: other processes keep off the timed core, and end with the benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest


@pytest.fixture
def using() -> Iterator[Callable[[Any], Any]]:
    """`using(x)` gives `x` back and closes it when the benchmark ends, the newest first."""
    with ExitStack() as stack:
        yield lambda x: stack.enter_context(closing(x))
