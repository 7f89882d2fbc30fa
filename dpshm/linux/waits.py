"""How long a caller lets a call wait, as a number that every wait of the system takes."""

from __future__ import annotations

import math
import time
from typing import Any

from dpshm.errors import SettingError

LONGEST_S = 1e6
"""About 12 days. poll(2) takes at most 24 days; what waits longer is asked to wait for ever."""


def seconds(timeout_s: float, name: str = "timeout_s") -> float:
    """A time of a caller as a float: numpy's numbers, decimals and fractions too; infinite for ever.

    Args:
        timeout_s: below 0 is 0.
        name: of the argument.

    Raises:
        SettingError: it is no number.
    """
    given: Any = timeout_s
    try:
        found = math.nan if isinstance(given, str | bytes | bytearray) else float(given)
    except OverflowError:  # an int of hundreds of digits
        found = math.inf if timeout_s > 0 else 0.0
    except (TypeError, ValueError):
        found = math.nan
    if math.isnan(found):
        raise SettingError(f"{name} is {timeout_s!r}: give a number of seconds")
    return math.inf if found > LONGEST_S else max(0.0, found)


def bounded(timeout_s: float, name: str = "timeout_s") -> float:
    """The same for a call of the system that takes no infinite time."""
    return min(LONGEST_S, seconds(timeout_s, name))


def deadline(timeout_s: float | None, name: str = "timeout_s") -> float:
    """When a wait that begins now ends, in seconds of CLOCK_MONOTONIC; infinite if it has no limit (None).

    Raises:
        SettingError: it is no number.
    """
    return math.inf if timeout_s is None else time.monotonic() + seconds(timeout_s, name)
