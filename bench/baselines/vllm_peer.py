"""A program for an interpreter that has vLLM: starts vLLM's own coordinator and times vLLM's own code.

Orders come as lines of JSON on stdin, answers go as lines of JSON on stdout; `bench.baselines.vllm` is the other
side. All measured code is vLLM's: the coordinator is its `DPCoordinator`, the choice is its
`DPLBAsyncMPClient.get_core_engine_for_request`, an engine's report goes through its
`EngineCoreProc.process_output_sockets`.

This file imports nothing but the standard library at its top: vLLM starts the coordinator with
multiprocessing's spawn, which imports the main module again, and that must add nothing to the start-up time.
"""

import json
import os
import sys
import threading
import time
from typing import Any

SNAPSHOT_DECISIONS = 20  # between two broadcasts: 800 requests/s over 4 API servers and 100 ms


def coordinator(order: dict[str, Any]) -> dict[str, Any]:
    """Starts a coordinator: {"dp_size", "waves"} -> its pid, its addresses, how long the constructor took."""
    from vllm.config import ParallelConfig
    from vllm.v1.engine.coordinator import DPCoordinator

    config = ParallelConfig(data_parallel_size=order["dp_size"], data_parallel_size_local=order["dp_size"])
    started = time.monotonic()
    running = DPCoordinator(config, enable_wave_coordination=order["waves"])
    seconds = time.monotonic() - started
    _running[running.proc.pid] = running
    engine_input, engine_output = running.get_engine_socket_addresses()
    return {
        "pid": running.proc.pid,
        "frontends": running.get_stats_publish_address(),
        "engine_input": engine_input,
        "engine_output": engine_output,
        "seconds": seconds,
    }


def shutdown(order: dict[str, Any]) -> dict[str, Any]:
    """Ends a coordinator: {"pid"}."""
    _running.pop(order["pid"]).shutdown()
    return {}


def decide(order: dict[str, Any]) -> dict[str, Any]:
    """Times the choice: {"engines", "frontends", "batches"} -> ns per decision, one figure a batch."""
    from collections import Counter

    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.core_client import DPLBAsyncMPClient

    n = order["engines"]
    client = object.__new__(DPLBAsyncMPClient)  # its constructor starts engines; the choice needs only these
    client.core_engines = [rank.to_bytes(2, "little") for rank in range(n)]
    client.client_count = order["frontends"]
    client.eng_start_index = 0
    client.reqs_in_flight = {}
    client.engine_inflight = Counter()
    requests = [_request(EngineCoreRequest, SamplingParams, i) for i in range(SNAPSHOT_DECISIONS)]
    choose = client.get_core_engine_for_request
    for engine in client.core_engines:
        client.engine_inflight[engine] = 4
    ns = []
    for _ in range(order["batches"]):
        # A broadcast has just come in. No request waits, so the score takes its shorter path.
        client.lb_engines = [[0, 16 + rank % 5, 0.4] for rank in range(n)]
        began = time.perf_counter_ns()
        for request in requests:
            choose(request)
        ns.append((time.perf_counter_ns() - began) / len(requests))
        for request in requests:  # they finish, as process_engine_outputs would have it
            client.engine_inflight[client.reqs_in_flight.pop(request.request_id)] -= 1
    return {"ns": ns}


def _request(kind: Any, sampling: Any, i: int) -> Any:
    import inspect

    given = {
        "request_id": f"request-{i}",
        "prompt_token_ids": [1, 2, 3],
        "sampling_params": sampling(),
        "arrival_time": 0.0,
    }
    fields = inspect.signature(kind).parameters
    required = {name for name, field in fields.items() if field.default is inspect.Parameter.empty}
    return kind(**{name: given.get(name) for name in fields if name in given or name in required})


def publish(order: dict[str, Any]) -> dict[str, Any]:
    """Times an engine's report: {"calls", "batches"} -> ns the step loop pays a call, and CPU ns of all threads.

    The step loop builds the message and queues it; vLLM's output thread encodes and sends it.
    """
    import queue

    import zmq
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.metrics.stats import SchedulerStats

    address = f"ipc:///tmp/bench-vllm-{os.getpid()}"
    context = zmq.Context()
    sink = context.socket(zmq.PULL)
    sink.rcvhwm = 0
    sink.bind(address)
    engine = object.__new__(EngineCoreProc)
    engine.output_queue = queue.Queue()
    sender = threading.Thread(target=engine.process_output_sockets, args=([], address, 0), daemon=True)
    sender.start()
    ns, cpu_ns = [], []
    for _ in range(order["batches"]):
        cpu = time.process_time_ns()
        spent = 0
        for i in range(order["calls"]):
            began = time.perf_counter_ns()
            stats = SchedulerStats(16, i, kv_cache_usage=0.4, step_counter=i, current_wave=1)
            engine.output_queue.put_nowait((-1, EngineCoreOutputs(scheduler_stats=stats)))
            spent += time.perf_counter_ns() - began
            sink.recv()  # as in an engine, whose next report comes after the thread has sent this one
        ns.append(spent / order["calls"])
        cpu_ns.append((time.process_time_ns() - cpu) / order["calls"])
    engine.output_queue.put_nowait(EngineCoreProc.ENGINE_CORE_DEAD)
    sender.join()
    context.destroy(linger=0)
    os.unlink(address.removeprefix("ipc://"))
    return {"ns": ns, "cpu_ns": cpu_ns}


def version(_: dict[str, Any]) -> dict[str, Any]:
    """Reports the installed vLLM: {} -> its version."""
    import vllm

    return {"version": vllm.__version__}


_running: dict[str, Any] = {}


def main() -> None:
    """Serves orders until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM's prints go to stderr
    try:
        for line in sys.stdin:
            order = json.loads(line)
            try:
                answer = globals()[order["do"]](order)
            except Exception as e:
                answer = {"error": f"{type(e).__name__}: {e}"}
            answers.write(json.dumps(answer) + "\n")
    finally:
        for running in _running.values():
            running.shutdown()


if __name__ == "__main__":
    main()
