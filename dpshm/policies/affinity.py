"""`Affinity`: requests with one key meet on one rank, unless it is loaded more than its share.

Each key has an order of preference over the ranks: by a hash of the key and the rank, highest first (rendezvous
hashing). A request goes to the first rank in its key's order that stays within the bound. So a rank that leaves
or comes moves only the keys that were or will be its own.

Formula: the first rank in the key's order with ``load <= (1 + epsilon) * mean load``. The load is what a request
feels, the expected time to its first token there (`dpshm.policies.work`); it includes the work of the request
itself, as in the paper a bin's load counts the ball that is placed. It is read from the live board, and the mean
is over the ranks that may be chosen. (Counting requests instead is worse in hits and in waiting where prompts are
long and unlike: the ranks that count as full are then not those that are.)

Sources: Mirrokni, Thorup, Zadimoghaddam, "Consistent Hashing with Bounded Loads", SODA 2018, for the bound;
Thaler, Ravishankar, "Using name-based mappings to increase hit rates", IEEE/ACM ToN 6(1), 1998, for the order.
"""

from __future__ import annotations

from math import isfinite
from typing import ClassVar

import msgspec
import numpy as np

from dpshm.errors import SettingError
from dpshm.policies.columns import ListColumns
from dpshm.policies.view import Request, View
from dpshm.policies.work import LeastWork, expected_of_few, expected_of_many
from dpshm.rules.hashing import mix, mix_array, mixed, mixed_array

_least_work = LeastWork()


class Affinity(msgspec.Struct, frozen=True):
    """Consistent hashing with bounded load; the formula stands at the top of this module.

    A request without a key goes where `LeastWork` sends it.

    Attributes:
        epsilon: how far above the mean a rank may be loaded, as a fraction of the mean.

    Raises:
        SettingError: epsilon is not a number above 0.
    """

    epsilon: float = 1.25
    sees_work: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (isfinite(self.epsilon) and self.epsilon > 0):
            raise SettingError(f"epsilon is {self.epsilon}: choose a number above 0, such as 1")

    def __call__(self, view: View, request: Request) -> int:
        """See `dpshm.policies.Policy`."""
        key = request.key
        if key is None:
            return _least_work(view, request)
        columns = view.columns
        # The least loaded is never above the mean, so `within` is empty only where the board was scribbled upon.
        if isinstance(columns, ListColumns):
            few, load = columns.free(), expected_of_few(columns, request)
            bound = (1 + self.epsilon) * sum(load[r] for r in few) / len(few)
            order = mixed(len(load))
            within = [r for r in few if load[r] <= bound]
            return max(within or few, key=lambda r: mix(key ^ order[r]))
        many, loads = columns.free(), expected_of_many(columns, request)
        order_of_all = mixed_array(len(loads))
        loads = loads[many]
        light = many[loads <= (1 + self.epsilon) * int(loads.sum()) / len(many)]
        if len(light):
            many = light
        return int(many[mix_array(order_of_all[many] ^ np.uint64(key)).argmax()])
