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


def test_what_was_never_hooked_comes_off():
    """Guards against an engine that fails as it ends: without room for a prefix index there is nothing to hook."""
    InstanceHooks(None).remove()


class Flagged:
    """Something with a flag, which a method reads."""

    def __init__(self):
        self.flag = False

    def read(self):
        """What the class does with it."""
        return self.flag


def test_a_view_is_read_by_all_and_comes_off_again():
    """Guards against a flag that is right for readers of the attribute and not for the object's own methods."""
    target, other = Flagged(), Flagged()
    hooks, values = InstanceHooks(target), [True]
    hooks.view("flag", lambda: values[0])
    assert (target.flag, target.read(), other.flag) == (True, True, False)
    values[0] = 0
    target.flag = "stored"
    assert (target.flag, target.read()) == (0, 0)
    assert isinstance(target, Flagged)
    hooks.remove()
    assert target.read() == "stored"
    assert type(target) is Flagged


def test_a_replaced_attribute_comes_back():
    """Guards against a socket of vLLM's that is lost with the link."""
    target = Flagged()
    hooks = InstanceHooks(target)
    hooks.replace("flag", 1)
    hooks.replace("flag", 2)
    assert target.flag == 2
    hooks.remove()
    assert target.flag is False
