"""Tests of `dpshm.vllm.instance`."""

from __future__ import annotations

from dpshm.vllm.instance import InstanceHooks


class Target:
    """Something with a method."""

    def method(self):
        """What the class does."""
        return "stock"


def test_hooks_come_off_again():
    """Guards against a hook that stays when ours has failed, and against one that reaches other objects."""
    target, other = Target(), Target()
    hooks = InstanceHooks(target)
    stock = target.method
    hooks.put("method", lambda: f"hooked {stock()}")
    assert target.method() == "hooked stock"
    assert other.method() == "stock"
    hooks.remove()
    hooks.remove()
    assert target.method() == "stock"
