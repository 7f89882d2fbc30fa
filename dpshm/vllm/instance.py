"""Hooks on one object: its methods wrapped for as long as all goes well, the stock ones back when it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class InstanceHooks:
    """Wraps methods of one object, and takes the wrappings off again.

    A wrapping is an attribute of the instance that hides the method of its class; taking it off shows the
    method again. vLLM looks its methods up at each call, so both take effect with the next one.
    """

    def __init__(self, target: Any) -> None:
        self._target = target
        self._names: list[str] = []

    def put(self, name: str, wrapped: Callable[..., Any]) -> None:
        """Hides a method behind `wrapped`."""
        setattr(self._target, name, wrapped)
        self._names.append(name)

    def remove(self) -> None:
        """Shows all methods again."""
        for name in self._names:
            self._target.__dict__.pop(name, None)
        self._names.clear()
