"""Hooks on one object: its methods wrapped until a failure, and the stock methods from then on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class InstanceHooks:
    """Wraps methods of one object, and removes the wrappers again.

    A wrapper is an attribute of the instance that hides the method of its class; without the attribute the method
    shows again. vLLM resolves its methods at each call, so both take effect at the next call.
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
