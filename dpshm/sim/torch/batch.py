"""Maps the scheduler's requests to rows of the model's KV cache, and keeps each request's progress.

The scheduler (`dpshm.sim.batching`) knows requests and counts; the model knows rows and tokens. A request gets a
row when its first chunk is computed, and keeps it until it completes or is preempted. A preempted request keeps
its tokens, and loses its keys and values. It computes them again, as the scheduler assumes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpshm.sim.batching import Batcher, SimRequest, Work
from dpshm.sim.torch.model import Chunk, Decode, MoeTransformer, Plan


class _Seat:
    """A request's row, the number of its tokens with keys and values, and the number of its tokens so far."""

    __slots__ = ("computed", "row", "written")

    def __init__(self, row: int, written: int) -> None:
        self.row = row
        self.computed = 0
        self.written = written


class TorchBatch:
    """The rows of one rank."""

    def __init__(self, model: MoeTransformer) -> None:
        self._model = model
        self._free = list(range(model.shape.max_running))[::-1]
        self._seats: dict[SimRequest, _Seat] = {}
        self._preempted: dict[SimRequest, Tensor] = {}

    def compute(self, batcher: Batcher, work: Work, most_tokens: int) -> list[tuple[SimRequest, int]]:
        """Computes a step that the scheduler has planned.

        Args:
            batcher: the scheduler that planned the step.
            work: the step's work, by request.
            most_tokens: the most tokens that any rank computes in the step.

        Returns:
            The new tokens, by request.
        """
        self._give_back(batcher)
        decodes = []
        getting = list(work.decoding)
        for request in work.decoding:
            seat = self._seats[request]
            decodes.append(Decode(seat.row, seat.computed))
            seat.computed += 1
        chunks, ending = [], []
        for number, (request, count) in enumerate(work.chunks):
            seat = self._seats.get(request) or self._sit_down(request)
            chunks.append(Chunk(seat.row, seat.computed, seat.computed + count))
            seat.computed += count
            if count == request.prompt_left:
                ending.append(number)
                getting.append(request)
        with torch.inference_mode():
            chosen = self._model.step(Plan(decodes, chunks, ending), max(1, most_tokens)).tolist()
        if not chosen and self._model.tokens.is_cuda:
            torch.cuda.current_stream().synchronize()  # tolist() of an empty list does not wait
        for request in getting:
            self._seats[request].written += 1
        return list(zip(getting, chosen, strict=True))

    def _sit_down(self, request: SimRequest) -> _Seat:
        """Gives a request a row with its prompt (drawn from its key) and the tokens that it generated before."""
        tokens = self._preempted.pop(request, None)
        if tokens is None:
            tokens = draw_prompt(request.key, request.prompt_tokens, self._model.shape.vocabulary)
        seat = self._seats[request] = _Seat(self._free.pop(), len(tokens))
        self._model.tokens[seat.row, : len(tokens)] = tokens.to(self._model.tokens.device)
        return seat

    def _give_back(self, batcher: Batcher) -> None:
        """Frees the rows of requests that no longer run."""
        for request in [r for r in self._seats if not batcher.is_running(r)]:
            seat = self._seats.pop(request)
            self._free.append(seat.row)
            if seat.written < request.prompt_tokens + request.output_tokens:
                self._preempted[request] = self._model.tokens[seat.row, : seat.written].clone()


def draw_prompt(key: tuple[int, int], prompt_tokens: int, vocabulary: int) -> Tensor:
    """A prompt of that length; the same key gives the same prompt."""
    generator = torch.Generator().manual_seed(key[0] << 32 | key[1])
    return torch.randint(vocabulary, (prompt_tokens,), generator=generator)
