"""What a run of the laboratory is made of: engines, front-ends, and how long what they do takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

from dpshm.errors import SettingError
from dpshm.sim.lab.rank import Coefficients
from dpshm.sim.step_cost import StepCost

COST = StepCost(kv_tokens=1_000_000)
"""The engine of the study: as in the demo, with room for a million tokens."""
MOST = 1_000_000_000


class RequestTime(NamedTuple):
    """What a front-end takes to read a request, one after another: for any, and for each token of its prompt."""

    any_s: float = 0.0
    token_s: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """The times that a text such as ``3.6,0.00033`` names, in ms.

        Raises:
            SettingError: it is not two numbers, none of them negative.
        """
        try:
            numbers = [float(part) / 1e3 for part in text.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) != 2 or not all(0 <= n < 1e3 for n in numbers):
            raise SettingError(
                f"the time of a request in a front-end is {text!r}: give it in ms as any request,prompt token, "
                "such as 3.6,0.00033"
            )
        return cls(*numbers)


NO_TIME = RequestTime()


@dataclass(frozen=True)
class Plant:
    """The engines and front-ends of a run.

    Attributes:
        cost: the step times and limits of an engine.
        slow: by rank, the factor by which its steps are longer.
        spells: the same for a while: a rank, the factor, from when and for how many seconds.
        noise: the coefficient of variation of the time of equal steps.
        lockstep: whether all ranks step together, as with mixture-of-experts models.
        restart: a rank, the time when it loses all its requests, and how many seconds it is away.
        coefficients: the step times that policies get: learnt by engines, the true ones, or none.
        clients: closed loop: the number of clients. Each sends a request when its last one is complete. 0 is open
            loop: requests come at their own times.
        block_tokens: prompt tokens in a block of the prefix caches.
        request_time: what a request takes in a front-end.
    """

    engines: int = 8
    frontends: int = 8
    cost: StepCost = COST
    slow: tuple[tuple[int, float], ...] = ()
    spells: tuple[tuple[int, float, float, float], ...] = ()
    noise: float = 0.0
    lockstep: bool = False
    restart: tuple[int, float, float] | None = None
    coefficients: Coefficients = "learnt"
    clients: int = 0
    block_tokens: int = 512
    request_time: RequestTime = NO_TIME

    def __post_init__(self) -> None:
        ranks = [rank for rank, *_ in (*self.slow, *self.spells)] + ([self.restart[0]] if self.restart else [])
        for rank in ranks:
            if not 0 <= rank < self.engines:
                raise SettingError(f"there is no rank {rank}: choose 0 to {self.engines - 1}")
        for name, number, least in (("clients", self.clients, 0), ("kv_tokens", self.cost.kv_tokens, 1)):
            if not least <= number <= MOST:
                raise SettingError(f"{name} is {number}: choose {least} to {MOST}")
        if not 0 <= self.noise < 100:
            raise SettingError(f"noise is {self.noise:g}: choose 0 (none) or more; 0.3 is a noisy machine")
        for rank, factor, *_ in (*self.slow, *self.spells):
            if not 0 < factor < 1e6:
                raise SettingError(f"rank {rank} cannot be {factor:g} times as slow: choose a number above 0")
        if self.restart and self.engines < 2:
            raise SettingError("with one engine, no engine takes requests while it restarts: use two or more")

    def cost_of(self, rank: int) -> StepCost:
        """The step cost of one rank."""
        return self.cost.slower(dict(self.slow).get(rank, 1.0))
