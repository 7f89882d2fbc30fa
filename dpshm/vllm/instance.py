"""Hooks on one object: methods wrapped, attributes replaced until a failure; what was there from then on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class InstanceHooks:
    """Wraps methods of one object and replaces its attributes, and takes all of that back again.

    A wrapper is an attribute of the instance that hides the method of its class; without the attribute the method
    shows again. vLLM resolves its methods at each call, so both take effect at the next call. A view is a property
    of a class that is made for this one object, below its own class: vLLM's classes stay as they are.
    """

    def __init__(self, target: Any) -> None:
        self._target = target
        self._class: type = type(target)
        self._names: list[str] = []
        self._replaced: dict[str, Any] = {}

    def put(self, name: str, wrapped: Callable[..., Any]) -> None:
        """Hides a method behind `wrapped`."""
        setattr(self._target, name, wrapped)
        self._names.append(name)

    def replace(self, name: str, value: Any) -> None:
        """Stores another value in an attribute of the instance; `remove` stores the old one again."""
        self._replaced.setdefault(name, self._target.__dict__[name])
        setattr(self._target, name, value)

    def view(self, name: str, read: Callable[[], Any]) -> None:
        """Makes an attribute of the instance a view: each reader gets `read()`.

        A value that is stored in it meanwhile shows after `remove`.
        """

        def store(target: Any, value: Any) -> None:
            target.__dict__[name] = value

        kind = type(self._target)
        body = {"__module__": kind.__module__, name: property(lambda _: read(), store)}
        self._target.__class__ = type(kind.__name__, (kind,), body)

    def remove(self) -> None:
        """Shows all methods and attributes again."""
        for name in self._names:
            self._target.__dict__.pop(name, None)
        self._names.clear()
        for name, value in self._replaced.items():
            self._target.__dict__[name] = value
        self._replaced.clear()
        if type(self._target) is not self._class:  # None's, for one, cannot be assigned at all
            self._target.__class__ = self._class
