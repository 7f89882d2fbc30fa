"""What the tests of processes share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dpshm import Coordinator


@pytest.fixture
def pair(group: str, using: Callable[[Any], Any]) -> str:
    """The name of a group of two ranks that has a coordinator."""
    using(Coordinator(group=group, dp_size=2))
    return group
