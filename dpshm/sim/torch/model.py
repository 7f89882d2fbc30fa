"""A small mixture-of-experts transformer in PyTorch, with random weights, whose experts are spread over ranks.

Attention is each rank's own; the experts are not. In every layer each rank gathers the hidden states of all
ranks, computes the experts that it holds for all of them, and an all-reduce adds up what the ranks found: so
no rank gets through a layer before all have entered it. This is the simplest of the ways in which vLLM runs
data-parallel attention with parallel experts.

The other parts are the usual ones: RMS norm, rotary positions, grouped-query attention over a static KV cache
(one row of `max_context` tokens a running request), gated experts, the `experts_per_token` best by a softmax
router, a greedy choice of the next token. An expert computes all gathered tokens and the router's weight, 0 for
most, scales the result: more arithmetic than needed, and nothing that depends on the data.

Weights are drawn by layer and expert from their own seeds, so the model is the same however many ranks hold it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

_MASKED = -1e30
_ROPE_BASE = 10_000.0
_EPSILON = 1e-6


class ModelShape(NamedTuple):
    """The sizes of a model and of its KV cache."""

    vocabulary: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    experts: int
    experts_per_token: int
    expert_width: int
    max_running: int
    max_context: int  # tokens of one request, prompt and output

    @property
    def kv_tokens(self) -> int:
        """Tokens that fit the KV cache."""
        return self.max_running * self.max_context


SMALL = ModelShape(32_000, 4, 1024, 16, 4, 64, 16, 2, 4096, 64, 10_240)
"""0.9 billion parameters, for a GPU: 1.6 GB of experts in bf16 over all ranks, 2.7 GB of KV cache a rank."""
TINY = ModelShape(256, 2, 64, 4, 2, 16, 4, 2, 128, 16, 10_240)
"""For a CPU: the same code, 0.3 million parameters, 84 MB of KV cache a rank."""


class Exchange(Protocol):
    """The collectives that the model uses. Every rank calls the same ones in the same order."""

    rank: int
    size: int

    def gather(self, mine: Tensor) -> Tensor:
        """All ranks' tensors, this one's among them, one after the other; all have the same shape."""

    def add_up(self, mine: Tensor) -> None:
        """Adds all ranks' tensors up, in place."""


class Decode(NamedTuple):
    """One token, at `position`, of the request in the row `slot`."""

    slot: int
    position: int


class Chunk(NamedTuple):
    """A piece of a prompt: the positions `begin` up to `end` of the request in the row `slot`."""

    slot: int
    begin: int
    end: int


class Plan(NamedTuple):
    """The work of one step.

    Attributes:
        decodes: the requests that get one more token.
        chunks: the pieces of prompts.
        ending: indices of the chunks that end their prompt and so yield a token.
    """

    decodes: Sequence[Decode]
    chunks: Sequence[Chunk]
    ending: Sequence[int]


class _Layer(NamedTuple):
    qkv: Tensor  # (width, (heads + 2 kv_heads) * head_width)
    out: Tensor  # (heads * head_width, width)
    router: Tensor  # (width, experts), float32
    up: Tensor  # (experts here, width, 2 expert_width): gate and value
    down: Tensor  # (experts here, expert_width, width)


class MoeTransformer:
    """One rank's part of the model, and its KV cache.

    Attributes:
        shape: its sizes.
        tokens: shape (max_running, max_context), int64: by row, prompt and output of its request.
    """

    def __init__(self, shape: ModelShape, exchange: Exchange, device: torch.device, dtype: torch.dtype) -> None:
        self.shape = shape
        self._exchange = exchange
        self._device = device
        self._dtype = dtype
        rank, size = exchange.rank, exchange.size
        held = range(rank * shape.experts // size, (rank + 1) * shape.experts // size)
        self._held = slice(held.start, held.stop)
        self._layers = [self._draw_layer(number, held) for number in range(shape.layers)]
        self._embedding = self._draw(0, shape.vocabulary, shape.width, scale=1.0)
        self._head = self._draw(1, shape.width, shape.vocabulary)
        rows = (shape.layers, shape.max_running, shape.max_context)
        cache = (*rows, shape.kv_heads, shape.head_width)
        self._keys = torch.zeros(cache, device=device, dtype=dtype)
        self._values = torch.zeros(cache, device=device, dtype=dtype)
        self.tokens = torch.zeros(rows[1:], device=device, dtype=torch.int64)
        half = shape.head_width // 2
        frequencies = _ROPE_BASE ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
        angles = torch.arange(shape.max_context, device=device)[:, None] * frequencies
        self._cosines, self._sines = angles.cos(), angles.sin()

    def _draw(self, seed: int, rows: int, columns: int, scale: float | None = None) -> Tensor:
        generator = torch.Generator(self._device).manual_seed(seed)
        drawn = torch.randn(rows, columns, generator=generator, device=self._device)
        return (drawn * (rows**-0.5 if scale is None else scale)).to(self._dtype)

    def _draw_layer(self, number: int, held: range) -> _Layer:
        s = self.shape
        seed = 1000 * (number + 1)
        heads = s.heads * s.head_width
        ups = [self._draw(seed + 10 + 2 * e, s.width, 2 * s.expert_width) for e in held]
        downs = [self._draw(seed + 11 + 2 * e, s.expert_width, s.width) for e in held]
        empty = torch.empty(0, device=self._device, dtype=self._dtype)
        return _Layer(
            self._draw(seed, s.width, heads + 2 * s.kv_heads * s.head_width),
            self._draw(seed + 1, heads, s.width),
            self._draw(seed + 2, s.width, s.experts).float(),
            torch.stack(ups) if ups else empty.reshape(0, s.width, 2 * s.expert_width),
            torch.stack(downs) if downs else empty.reshape(0, s.expert_width, s.width),
        )

    def step(self, plan: Plan, padded: int) -> Tensor:
        """Computes one step, chooses the next tokens, and stores them in `tokens`.

        Args:
            plan: the work of this rank; may be empty.
            padded: the most tokens that any rank has in this step; at least 1.

        Returns:
            The chosen tokens, int64: those of the plan's `decodes`, then those of the chunks in `ending`.
        """
        slots = [d.slot for d in plan.decodes]
        positions = [d.position for d in plan.decodes]
        last = list(range(len(plan.decodes)))
        for number, (slot, begin, end) in enumerate(plan.chunks):
            slots += [slot] * (end - begin)
            positions += range(begin, end)
            if number in plan.ending:
                last.append(len(slots) - 1)
        at = torch.tensor([slots, positions], dtype=torch.int64).to(self._device)
        x = functional.embedding(self.tokens[at[0], at[1]], self._embedding)
        for number, layer in enumerate(self._layers):
            if slots:  # a rank without work has nothing to attend to
                x = x + self._attend(number, layer, _norm(x), at, plan)
            x = x + self._ask_experts(layer, _norm(x), padded)
        rows = torch.tensor(last, dtype=torch.int64).to(self._device)
        chosen = (_norm(x[rows]) @ self._head).argmax(-1)
        self.tokens[at[0, rows], at[1, rows] + 1] = chosen
        return chosen

    def _attend(self, number: int, layer: _Layer, x: Tensor, at: Tensor, plan: Plan) -> Tensor:
        s = self.shape
        qkv = (x @ layer.qkv).unflatten(-1, (s.heads + 2 * s.kv_heads, s.head_width))
        q, k, v = qkv.split((s.heads, s.kv_heads, s.kv_heads), dim=1)
        keys, values = self._keys[number], self._values[number]
        keys[at[0], at[1]] = self._rotate(k, at[1])
        values[at[0], at[1]] = v
        q = self._rotate(q, at[1]).unflatten(1, (s.kv_heads, -1))
        found = []
        done = len(plan.decodes)
        if done:
            longest = max(d.position for d in plan.decodes) + 1
            k, v = keys[at[0, :done], :longest], values[at[0, :done], :longest]
            found.append(_attention(q[:done, None], k, v, at[1, :done, None]).squeeze(1))
        for slot, begin, end in plan.chunks:
            here = slice(done, done + end - begin)
            k, v = keys[slot, None, :end], values[slot, None, :end]
            found.append(_attention(q[None, here], k, v, at[1, None, here]).squeeze(0))
            done = here.stop
        return torch.cat(found).flatten(1) @ layer.out

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        cosines, sines = self._cosines[positions, None], self._sines[positions, None]
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat((a * cosines - b * sines, a * sines + b * cosines), dim=-1).to(x.dtype)

    def _ask_experts(self, layer: _Layer, x: Tensor, padded: int) -> Tensor:
        s, exchange, count = self.shape, self._exchange, len(x)
        every = exchange.gather(functional.pad(x, (0, 0, 0, padded - count)))
        scores = (every.float() @ layer.router).softmax(-1)
        best, who = scores.topk(s.experts_per_token)
        weights = torch.zeros_like(scores).scatter(1, who, best / best.sum(-1, keepdim=True))[:, self._held]
        gate, value = (every @ layer.up).chunk(2, dim=-1)  # (experts here, tokens, expert_width)
        inner = functional.silu(gate) * value * weights.T[:, :, None].to(self._dtype)
        total = (inner @ layer.down).sum(0)
        exchange.add_up(total)
        begin = exchange.rank * padded
        return total[begin : begin + count]


def _norm(x: Tensor) -> Tensor:
    return functional.rms_norm(x, x.shape[-1:], eps=_EPSILON)


def _attention(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """Grouped-query attention, each query to the positions up to its own.

    Args:
        q: shape (requests, queries, kv_heads, heads a kv_head, head_width).
        keys: shape (requests, context, kv_heads, head_width).
        values: likewise.
        positions: shape (requests, queries).
    """
    scores = torch.einsum("bnghd,blgd->bghnl", q, keys).float() * q.shape[-1] ** -0.5
    hidden = torch.arange(keys.shape[1], device=q.device) > positions[..., None]  # (requests, queries, context)
    shares = scores.masked_fill(hidden[:, None, None], _MASKED).softmax(-1)
    return torch.einsum("bghnl,blgd->bnghd", shares.to(q.dtype), values)
