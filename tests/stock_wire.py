"""Messages that only stock vLLM processes send: dpshm decodes them, and tests and benchmarks make them."""

from __future__ import annotations

import msgspec

from dpshm.net.wire import SchedulerStats

_encoder = msgspec.msgpack.Encoder()
_PREFIX_CACHE_STATS = {
    "reset": False,
    "requests": 0,
    "queries": 0,
    "hits": 0,
    "preempted_requests": 0,
    "preempted_queries": 0,
    "preempted_hits": 0,
    "hits_by_source": {},
}


def encode_stats(engine_index: int, stats: SchedulerStats, *, timestamp: float) -> bytes:
    """A stock engine's report of its queues, with every key that vLLM 0.32 sends, at rest."""
    full = {
        "num_running_reqs": stats.num_running_reqs,
        "num_waiting_reqs": stats.num_waiting_reqs,
        "num_skipped_waiting_reqs": 0,
        "num_kv_fetch_reqs_by_stage": {},
        "step_counter": stats.step_counter,
        "current_wave": stats.current_wave,
        "kv_cache_usage": stats.kv_cache_usage,
        "iteration_details": None,
        "prefix_cache_stats": _PREFIX_CACHE_STATS,
        "connector_prefix_cache_stats": None,
        "kv_cache_eviction_events": (),
        "spec_decoding_stats": None,
        "kv_connector_stats": None,
        "ec_connector_stats": None,
        "waiting_lora_adapters": {},
        "running_lora_adapters": {},
        "cudagraph_stats": None,
        "perf_stats": None,
    }
    return _encoder.encode((engine_index, (), full, timestamp, None, None, None, None, None))
