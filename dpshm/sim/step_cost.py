"""How long a step of a simulated engine takes, and the limits of the engine.

    seconds = base + per request * batch + per prompt token * prompt tokens + per held token * held tokens

The figures are those of an 8-billion-parameter model in bf16 (32 layers, 8 KV heads of 128; the
shape of Llama 3.1 8B) on one H100 SXM (3.35 TB/s, 989 TFLOP/s dense in bf16, from its data sheet):

- 8 ms for reading 16 GB of weights at 60 % of the memory bandwidth. A dummy step, which an idle rank runs
  beside busy ones, costs that too;
- 65 ns a held token for reading its keys and values: 131,072 B (32 layers x 8 heads x 128 x 2 tensors x 2 B, by
  the config.json of the model), again at 60 % of the bandwidth. So a context of 3,000 tokens costs 0.2 ms, and one
  of 60,000 costs 3.9 ms;
- 20 us a request, for scheduling and sampling. This one is our estimate, without a source;
- 40 us a prompt token: 16 GFLOP (2 a parameter) at 40 % of the peak. The attention of a prompt over itself, which
  grows with the square of its length, is left out.

400,000 tokens of KV cache are 52 GB: the part of 80 GB that weights and activations leave free.
`FLAT_COST` is the model before held tokens counted: 0.2 ms a request, whatever its context.
"""

from __future__ import annotations

from typing import NamedTuple, Self

from dpshm.errors import SettingError


class StepCost(NamedTuple):
    """The limits of a rank, and the duration of its steps."""

    base_s: float = 8e-3
    per_request_s: float = 20e-6
    per_prompt_token_s: float = 40e-6
    per_held_token_s: float = 65e-9
    max_running: int = 64
    max_step_tokens: int = 4096  # a token of each decoding request, then of prompts
    kv_tokens: int = 400_000
    max_context: int | None = None  # of one request, prompt and output; None: what the KV cache holds

    @classmethod
    def parse(cls, text: str) -> Self:
        """The cost that a text such as ``8,0.04,0.02,0.000065`` names, in ms.

        Args:
            text: the base, a prompt token, a request, and a held token; the last is 0 if it is left out.

        Raises:
            SettingError: it is not three or four numbers, none of them negative and the first above 0.
        """
        try:
            numbers = [float(part) / 1e3 for part in text.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) not in (3, 4) or not all(0 <= n < 1e6 for n in numbers) or not numbers[0]:
            raise SettingError(
                f"a step's duration is {text!r}: give it in ms as base,prompt token,request[,held token], such as "
                "8,0.04,0.02,0.000065"
            )
        base, token, request, held = [*numbers, 0.0][:4]
        return cls(base, request, token, held)

    def seconds(self, prompt_tokens: int, batch: int, held_tokens: int = 0) -> float:
        """The duration of a step with that content; without content, of a dummy step."""
        return (
            self.base_s
            + self.per_request_s * batch
            + self.per_prompt_token_s * prompt_tokens
            + self.per_held_token_s * held_tokens
        )

    def slower(self, factor: float) -> StepCost:
        """The cost of a rank whose steps take so many times as long."""
        return self._replace(
            base_s=self.base_s * factor,
            per_request_s=self.per_request_s * factor,
            per_prompt_token_s=self.per_prompt_token_s * factor,
            per_held_token_s=self.per_held_token_s * factor,
        )


FLAT_COST = StepCost(per_request_s=0.2e-3, per_held_token_s=0.0)
"""A request costs the same, whatever its context: the model of the study's older tables."""
