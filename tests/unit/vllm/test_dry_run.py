"""Tests of `dpshm.vllm.dry_run`: what the hooks rely on passes, and anything else is named."""

from __future__ import annotations

import asyncio
import sys

import pytest

from dpshm.vllm.dry_run import Blank, DryRunFailed, dry_run
from tests.unit.vllm.fake_core import Request


@pytest.mark.parametrize("tells", [True, False])
def test_a_release_that_does_what_the_hooks_rely_on_passes(vllm, tells):
    """Guards against a check that keeps the plugin off where it works, up to 0.32 and from 0.33 on."""
    vllm.client.DPAsyncMPClient.tells_of_first_requests = tells
    dry_run()


def swapped(self):
    """Counts in the other order."""
    return len(self.waiting), len(self.running)


def past_the_queue(self):
    """Handles requests without the method that is hooked."""
    while not self.input_queue.empty():
        self.add_request(*self.input_queue.get_nowait()[1])


def emptied(self):
    """Steps with requests that the scheduler no longer knows."""
    self.scheduler.requests.clear()
    self.step_fn()
    return True


async def unnoted(self, request):
    """Sends to the first engine, whatever was chosen."""
    self._ensure_stats_update_task()
    await self._send_input(None, request, self.core_engines[0])


async def forgetful(_, outputs):
    """Leaves requests that finished in the record."""


async def waiting(self, request):
    """Waits for an event loop's future."""
    await asyncio.sleep(3600)


@pytest.mark.parametrize(
    ("owner", "name", "other", "cause"),
    [
        ("Scheduler", "get_request_counts", swapped, r"get_request_counts.*is \(1, 2\)"),
        ("EngineCoreProc", "_process_input_queue", past_the_queue, "what was counted of a request"),
        ("EngineCoreProc", "_process_engine_step", lambda _: True, r"number of steps.* is \(0, 0\)"),
        ("EngineCoreProc", "_process_engine_step", emptied, r"number of steps.* is \(1, 0\)"),
        ("DPEngineCoreProc", "add_request", lambda *_: None, "the load after it"),
        ("DPAsyncMPClient", "add_request_async", unnoted, "where a request is sent"),
        ("DPAsyncMPClient", "dp_engines_running", lambda _: True, "what dp_engines_running says"),
        ("DPLBAsyncMPClient", "process_engine_outputs", staticmethod(forgetful), "a request that finished"),
    ],
)
def test_a_release_that_does_something_else_is_named(vllm, monkeypatch, owner, name, other, cause):
    """Guards against a check that cannot fail, and against one that does not say why."""
    modules = (sys.modules["vllm.v1.core.sched.scheduler"], vllm.core, vllm.client)
    kind = next(vars(module)[owner] for module in modules if owner in vars(module))
    monkeypatch.setattr(kind, name, other)
    with pytest.raises(DryRunFailed, match=cause):
        dry_run()


def test_a_client_that_waits_is_named(vllm, monkeypatch):
    """Guards against a server whose start hangs in the check."""
    monkeypatch.setattr(vllm.client.DPAsyncMPClient, "add_request_async", waiting)

    async def in_a_loop():
        dry_run()

    with pytest.raises(DryRunFailed, match="waits for something else"):
        asyncio.run(in_a_loop())


def test_what_the_release_raises_is_not_hidden(vllm, monkeypatch):
    """Guards against a reason that says less than the release did."""
    monkeypatch.setattr(Request, "from_engine_core_request", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dry_run()


def test_blanks_stand_for_anything():
    """Guards against a check that fails at something of the release which no hook touches."""
    blank = Blank()
    with blank.some.thing(1, two=3) as inner:
        assert not inner
    assert [*blank, len(blank)] == [0]
