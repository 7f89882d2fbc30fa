"""Checks of what `dpshm.Frontend.attach` is given."""

from __future__ import annotations

import inspect
import math
import operator
import os
import socket
from collections.abc import Iterable, Mapping
from typing import TypeVar

from dpshm.board import layout
from dpshm.errors import SettingError

F = TypeVar("F")


def name_of(owner: str | None) -> tuple[str, bytes]:
    """The name of a front-end, as text and as the board holds it; without one, host and pid.

    Raises:
        SettingError: it is no text, is too long, or has a zero.
    """
    name = f"{socket.gethostname()[:32]}:{os.getpid()}" if owner is None else owner
    if not isinstance(name, str):
        raise SettingError(f"owner {name!r} must be a string")
    encoded = name.encode(errors="backslashreplace")  # of a file's name, say, that is no UTF-8
    if len(encoded) > layout.OWNER_BYTES or "\0" in name:
        raise SettingError(f"owner {name!r} must be at most {layout.OWNER_BYTES} bytes, none of them zero")
    return name, encoded


def check_callable(name: str, function: F) -> F:
    """What a user gave to be called.

    Raises:
        SettingError: it cannot be called, or is a class: of a policy, that would be made anew for each request. Or
            it is a coroutine function, whose body would never run.
    """
    if any(map(inspect.iscoroutinefunction, (function, getattr(function, "__call__", None)))):  # noqa: B004
        raise SettingError(f"{name} is {function!r}, which nobody would await: give a function without async")
    if not callable(function) or isinstance(function, type):
        raise SettingError(f"{name} is {function!r}, which cannot be called with what it is for: give a function")
    return function


def check_ranks(ranks: Iterable[int] | None, engines: int) -> list[int] | None:
    """The ranks that a front-end may choose, sorted; None: all.

    Raises:
        SettingError: there are none, or one is outside the board.
    """
    if ranks is None:
        return None
    only = sorted(set(map(operator.index, ranks)))
    if not (only and only[0] >= 0 and only[-1] < engines):
        raise SettingError(f"ranks {only} must be some of 0 to {engines - 1}")
    return only


def check_max_requests(max_requests: int | None) -> int | None:
    """How many outstanding requests a rank may have; None: any number.

    Raises:
        SettingError: it is no whole number from 1 on.
    """
    if max_requests is None:
        return None
    try:
        checked = operator.index(max_requests)
    except TypeError:
        checked = 0
    if checked < 1:
        raise SettingError(f"max_requests is {max_requests!r}, and must be a whole number, at least 1")
    return checked


def check_weights(weights: Mapping[int, float] | None, engines: int) -> dict[int, float] | None:
    """The speeds by rank.

    Raises:
        SettingError: one is not above 0, or its rank is outside the board.
    """
    if weights is None:
        return None
    if not isinstance(weights, Mapping):
        raise SettingError(f"weights is {weights!r}: give a number above 0 by rank, such as {{0: 1.0, 1: 0.5}}")
    checked = {operator.index(rank): float(weight) for rank, weight in weights.items()}
    for rank, weight in checked.items():
        if not (0 <= rank < engines and 0 < weight < math.inf):
            raise SettingError(
                f"weights has {weight} for rank {rank}: give numbers above 0, for ranks 0 to {engines - 1}"
            )
    return checked
