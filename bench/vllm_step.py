"""``python -m bench vllm-step``: what the plugin adds to each step of a real vLLM engine core.

The engine core, its scheduler and its cache manager are vLLM's own, in this process, without sockets; the model
sleeps (`bench.sleeping_executor`). An arm is so many steps with the plugin's hooks on, or with vLLM's own reports;
arms take turns. Counted is the CPU time of the thread that owns the scheduler. What vLLM's output thread needs to
encode and send its reports is left out, in vLLM's favour. The caches are as cold as a sleep leaves them.

``--calls`` counts calls of Python's and C's functions instead: the same number on each machine, busy or not.

Needs the environment of ``tests/e2e/vllm/environment.py``, in whose interpreter it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench.in_vllm import run_in_vllm
from dpshm.policies.step_model import SOLVED_EACH
from tests.e2e.vllm.server import MODELS, SIZES

EXECUTOR = "bench.sleeping_executor.SleepingExecutor"
PROMPT_TOKENS = 200
SETTLE_STEPS = SOLVED_EACH
"""Steps of an arm before it counts: an engine's first ones each solve its step model, the others every eighth."""
INPUT = "ipc:///bench-vllm-step"
"""Where the one API server is said to send its requests."""


def main(argv: list[str]) -> int:
    """Runs what the command line says; gives the exit status."""
    parser = argparse.ArgumentParser("python -m bench vllm-step", description=str(__doc__).split("\n\n", 1)[0])
    parser.add_argument("--running", type=int, default=64, help="requests in the batch")
    parser.add_argument("--lifetime", type=int, default=64, help="tokens of each request")
    parser.add_argument("--step-ms", type=float, default=2.0, help="how long the model sleeps in a step")
    parser.add_argument("--steps", type=int, default=40, help="of an arm")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--calls", action="store_true", help="count calls, and not time")
    options = parser.parse_args(argv)
    status = run_in_vllm("vllm-step", argv, SLEEPER_STEP_MS=f"{options.step_ms},0,0", DPSHM="0")
    if status is not None:
        return status
    if options.calls:
        options.rounds = 2
    show_calls(options, compare(options)) if options.calls else show(options, compare(options))
    sys.stdout.flush()
    os._exit(0)  # the libraries under vLLM print pages about what they leak


def compare(options: argparse.Namespace) -> dict[str, list[float]]:
    """By arm, a figure for each round: microseconds a step, or calls a step."""
    from dpshm import Coordinator, Frontend
    from dpshm.engine.row import EngineRow
    from dpshm.vllm.booked import BookedWriter
    from dpshm.vllm.find import owner_name

    link_of: Any = import_module("dpshm.vllm.engine_link").EngineLink
    load = Load(options.running, options.lifetime)
    figures: dict[str, list[float]] = {"vLLM": [], "dpshm": []}
    group = f"bench-step-{os.getpid()}"
    with Coordinator(group=group, dp_size=1, waves=False) as coordinator, ExitStack() as stack:
        # The API server that sends the requests has a row, and tells what it expects to be cached: nothing.
        frontend = Frontend.attach(group, owner=owner_name(0, INPUT))
        stack.callback(frontend.close)
        stack.callback(BookedWriter(frontend.board, frontend.index).close)
        for number in range(options.rounds):
            for arm in list(figures) if number % 2 == 0 else list(reversed(figures)):
                link = (
                    link_of(load.core, EngineRow.attach(coordinator.settings.group, 0)) if arm == "dpshm" else None
                )
                load.run(SETTLE_STEPS)
                figures[arm].append(load.calls(options.lifetime) if options.calls else load.run(options.steps))
                if link is not None:
                    assert "_process_engine_step" in vars(load.core), "the link gave up"
                    link.close()
    return figures


def show(options: argparse.Namespace, figures: dict[str, list[float]]) -> None:
    """Prints the figures."""
    added = sorted(ours - theirs for theirs, ours in zip(*figures.values(), strict=True))
    low, high = added[len(added) // 4], added[3 * len(added) // 4]
    theirs, ours = figures["vLLM"], figures["dpshm"]
    print(
        f"{options.running} running, {options.rounds} rounds of {options.steps} steps: "
        f"vLLM {statistics.median(theirs):.0f} us a step (least {min(theirs):.0f}), dpshm "
        f"{statistics.median(ours):.0f} us (least {min(ours):.0f}); it adds {statistics.median(added):.0f} us "
        f"(quartiles {low:.0f} to {high:.0f}; of the least ones {min(ours) - min(theirs):.0f}), "
        f"load average {os.getloadavg()[0]:.1f}"
    )


def show_calls(options: argparse.Namespace, figures: dict[str, list[float]]) -> None:
    """Prints the calls."""
    theirs, ours = (min(of_arm) for of_arm in figures.values())
    print(
        f"{options.running} running: vLLM makes {theirs:.0f} calls a step, with dpshm {ours - theirs:.0f} more "
        f"({100 * (ours / theirs - 1):.1f} %)"
    )


class Load:
    """A real engine core that always has so many requests; one that ends is followed by the next."""

    def __init__(self, running: int, lifetime: int) -> None:
        self._lifetime = lifetime
        self._sent = 0
        self.core = _core()
        for i in range(running):
            self._send(1 + i * lifetime // running)
        self.run(2 * SETTLE_STEPS)

    def run(self, steps: int) -> float:
        """CPU time a step, in microseconds, of so many steps: the median, since other processes disturb some."""
        return statistics.median(self._step() for _ in range(steps)) / 1e3

    def calls(self, steps: int) -> float:
        """Calls of functions a step, the mean of so many steps."""
        made = 0

        def count(_frame: Any, event: str, _what: Any) -> None:
            nonlocal made
            made += event in ("call", "c_call")

        for _ in range(steps):
            sys.setprofile(count)
            self.core.turn()
            sys.setprofile(None)
            self._follow_up()
        return made / steps

    def _step(self) -> int:
        began = time.thread_time_ns()
        self.core.turn()
        took = time.thread_time_ns() - began
        self._follow_up()
        return took

    def _follow_up(self) -> None:
        core = self.core
        while not core.output_queue.empty():
            client, outputs = core.output_queue.get()
            for output in outputs.outputs if client >= 0 else ():
                if output.finish_reason is not None:
                    self._send(self._lifetime)

    def _send(self, max_tokens: int) -> None:
        engine = import_module("vllm.v1.engine")
        self._sent += 1
        request = engine.EngineCoreRequest(
            request_id=f"request-{self._sent:026d}",
            prompt_token_ids=[5 + (self._sent + i * i) % 900 for i in range(PROMPT_TOKENS)],
            mm_features=None,
            sampling_params=import_module("vllm").SamplingParams(max_tokens=max_tokens, ignore_eos=True),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        self.core.input_queue.put((engine.EngineCoreRequestType.ADD, self.core.preprocess_add_request(request)))


def _core() -> Any:
    """An engine core as the one of a rank on its own, without its sockets and their threads."""
    engine_core: Any = import_module("vllm.v1.engine.core")

    class Core(engine_core.EngineCoreProc):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            self.input_queue: queue.Queue[Any] = queue.Queue()
            self.output_queue: queue.Queue[Any] = queue.Queue()
            self.engine_index = 0
            self.engines_running = self.reject_new_requests = False
            self.shutdown_state = engine_core.EngineShutdownState.RUNNING
            self.has_coordinator = self.publish_dp_lb_stats = self.process_input_queue_block = True
            self.last_counts = (0, 0)
            self.addresses = SimpleNamespace(inputs=[INPUT])
            executor = import_module("bench.sleeping_executor").SleepingExecutor
            engine_core.EngineCore.__init__(self, config, executor, True, None, True)

        def turn(self) -> None:
            """Once round the busy loop."""
            self._process_input_queue()
            self._maybe_publish_request_counts()
            self._process_engine_step()
            self._maybe_publish_request_counts()

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SIZES | MODELS["dense"]))
        arguments = import_module("vllm.engine.arg_utils").EngineArgs(
            model=folder,
            load_format="dummy",
            dtype="float32",
            skip_tokenizer_init=True,
            max_model_len=4096,
            max_num_seqs=256,
            distributed_executor_backend=EXECUTOR,
            async_scheduling=False,
            enforce_eager=True,
        )
        return Core(arguments.create_engine_config())
