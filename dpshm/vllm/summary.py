"""One line in the launcher's log for all API servers together: requests, tokens, and the load of each rank.

Each API server of vLLM logs what it alone received. The board knows the whole, so a thread of the launcher logs it
every `DPSHM_LOG_S` seconds while there is work:

    dpshm, 10.0 s: 41.2 requests/s, prompts 5130 tokens/s (38 % cached), generated 2204 tokens/s; by rank: running
    12 11 14 12, waiting 0 0 1 0, KV cache 20 21 25 19 %; time to first token p50 0.120 s, p99 0.840 s
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from dpshm.board.board import Board
from dpshm.errors import DpshmError
from dpshm.ops.frame import Frame, Rank
from dpshm.ops.watcher import Watcher
from dpshm.rules.liveness import State
from dpshm.vllm.log import logger

NAMED_RANKS = 16
"""Groups with more ranks have the least, the mean and the most in the line."""
_SAID = State.DEAD, State.STALLED, State.STUCK, State.DRAINED, State.UNKNOWN, State.ABSENT


def line(frame: Frame) -> str | None:
    """The line of a frame with rates; None if nothing happened in their window, and nothing is under way.

    Args:
        frame: the frame.
    """
    ranks = frame.ranks
    finished, prompt, generated = (
        sum(getattr(rank, name) or 0.0 for rank in ranks)
        for name in ("requests_per_s", "prompt_tokens_per_s", "generation_tokens_per_s")
    )
    if frame.rates_over_s is None or not (finished or prompt or generated or any(r.requests for r in ranks)):
        return None
    said = [
        f"{finished:.1f} requests/s",
        f"prompts {prompt:.0f} tokens/s{_cached(ranks)}",
        f"generated {generated:.0f} tokens/s",
    ]
    loads = [
        f"running {_by_rank(ranks, lambda r: r.running)}",
        f"waiting {_by_rank(ranks, lambda r: r.waiting + r.in_flight)}",
        f"KV cache {_by_rank(ranks, lambda r: round(100 * r.kv_cache_usage))} %",
    ]
    parts = [", ".join(said), f"by rank: {', '.join(loads)}"]
    if frame.ttft is not None and frame.ttft.p50_s is not None and frame.ttft.p99_s is not None:
        parts.append(f"time to first token p50 {frame.ttft.p50_s:.3f} s, p99 {frame.ttft.p99_s:.3f} s")
    parts += [f"rank {r.dp_rank} is {r.state}" for r in ranks if r.state in _SAID]
    return f"dpshm, {frame.rates_over_s:.1f} s: {'; '.join(parts)}"


def _cached(ranks: Sequence[Rank]) -> str:
    """The share of the prompts that was cached, weighted by what each rank computed."""
    computed = cached = 0.0
    for rank in ranks:
        if rank.cached_share is not None and rank.cached_share < 1.0:
            computed += rank.prompt_tokens_per_s or 0.0
            cached += (rank.prompt_tokens_per_s or 0.0) * rank.cached_share / (1.0 - rank.cached_share)
    return f" ({100 * cached / (cached + computed):.0f} % cached)" if cached + computed else ""


def _by_rank(ranks: Sequence[Rank], value: Callable[[Rank], int]) -> str:
    values = [value(rank) for rank in ranks]
    if len(values) <= NAMED_RANKS:
        return " ".join(map(str, values))
    return f"{sum(values) / len(values):.1f} ({min(values)} to {max(values)})"


class SummaryLog:
    """Logs a line every so often, in a thread, until it is closed or its group is gone.

    Args:
        group: the group.
        every_s: seconds between two looks.
    """

    def __init__(self, group: str, every_s: float) -> None:
        self._group = group
        self._every_s = every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dpshm-summary", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            with Watcher(Board.attach(self._group), self._every_s, self._every_s) as watcher:
                watcher.read()
                while not self._over.wait(self._every_s) and watcher.board.segment.linked:
                    if said := line(watcher.read()):
                        logger.info("%s", said)
        except DpshmError as e:
            logger.debug("dpshm: no more summaries in the log: %s", e)
        except Exception:
            logger.warning("dpshm: no more summaries in the log", exc_info=True)
