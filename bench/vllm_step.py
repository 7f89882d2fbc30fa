"""``python -m bench vllm-step``: what the plugin adds to each step of a real vLLM engine core.

The engine core, its scheduler and its cache manager are vLLM's own, in this process, without sockets; the model
sleeps (`bench.sleeping_executor`). An arm is so many steps with the plugin's hooks on, or with vLLM's own reports;
arms take turns. Counted is the CPU time of the thread that owns the scheduler. What vLLM's output thread needs to
encode and send its reports is left out, in vLLM's favour. The caches are as cold as a sleep leaves them.

Needs the environment of ``tests/e2e/vllm/environment.py``, in whose interpreter it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.e2e.vllm import environment
from tests.e2e.vllm.server import MODELS, SIZES

EXECUTOR = "bench.sleeping_executor.SleepingExecutor"
PROMPT_TOKENS = 200
SETTLE_STEPS = 10
_IN_VLLM = "DPSHM_BENCH_IN_VLLM"


def main(argv: list[str]) -> int:
    """Runs what the command line says; gives the exit status."""
    parser = argparse.ArgumentParser("python -m bench vllm-step", description=str(__doc__).split("\n\n", 1)[0])
    parser.add_argument("--running", type=int, default=64, help="requests in the batch")
    parser.add_argument("--lifetime", type=int, default=64, help="tokens of each request")
    parser.add_argument("--step-ms", type=float, default=2.0, help="how long the model sleeps in a step")
    parser.add_argument("--steps", type=int, default=40, help="of an arm")
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args(argv)
    if os.environ.get(_IN_VLLM) != "1":
        if reason := environment.why_not():
            print(reason, file=sys.stderr)
            return 2
        variables = {"PYTHONPATH": str(environment.ROOT), "VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR"}
        command = [str(environment.folder() / "bin" / "python"), "-m", "bench", "vllm-step", *argv]
        steps = {"SLEEPER_STEP_MS": f"{options.step_ms},0,0", _IN_VLLM: "1", "DPSHM": "0"}
        return subprocess.run(command, env=os.environ | variables | steps, check=False).returncode
    show(options, compare(options))
    sys.stdout.flush()
    os._exit(0)  # the libraries under vLLM print pages about what they leak


def compare(options: argparse.Namespace) -> dict[str, list[float]]:
    """Microseconds a step, by arm, a figure for each round."""
    from dpshm import Coordinator
    from dpshm.engine.row import EngineRow

    link_of: Any = import_module("dpshm.vllm.engine_core").EngineLink
    load = Load(options.running, options.lifetime)
    figures: dict[str, list[float]] = {"vLLM": [], "dpshm": []}
    with Coordinator(group=f"bench-step-{os.getpid()}", dp_size=1, waves=False) as coordinator:
        for number in range(options.rounds):
            for arm in list(figures) if number % 2 == 0 else list(reversed(figures)):
                link = (
                    link_of(load.core, EngineRow.attach(coordinator.settings.group, 0)) if arm == "dpshm" else None
                )
                load.run(SETTLE_STEPS)
                figures[arm].append(load.run(options.steps))
                if link is not None:
                    assert "_process_engine_step" in vars(load.core), "the link gave up"
                    link.close()
    return figures


def show(options: argparse.Namespace, figures: dict[str, list[float]]) -> None:
    """Prints the figures."""
    added = sorted(ours - theirs for theirs, ours in zip(*figures.values(), strict=True))
    low, high = added[len(added) // 4], added[3 * len(added) // 4]
    print(
        f"{options.running} running, {options.rounds} rounds of {options.steps} steps: "
        f"vLLM {statistics.median(figures['vLLM']):.0f} us a step, dpshm "
        f"{statistics.median(figures['dpshm']):.0f} us; it adds {statistics.median(added):.0f} us "
        f"(quartiles {low:.0f} to {high:.0f}), load average {os.getloadavg()[0]:.1f}"
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

    def _step(self) -> int:
        core = self.core
        began = time.thread_time_ns()
        core.turn()
        took = time.thread_time_ns() - began
        while not core.output_queue.empty():
            client, outputs = core.output_queue.get()
            for output in outputs.outputs if client >= 0 else ():
                if output.finish_reason is not None:
                    self._send(self._lifetime)
        return took

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
            self.engines_running = False
            self.shutdown_state = engine_core.EngineShutdownState.RUNNING
            self.has_coordinator = self.publish_dp_lb_stats = self.process_input_queue_block = True
            self.last_counts = (0, 0)
            self.addresses = SimpleNamespace(inputs=[])
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
