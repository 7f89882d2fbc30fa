"""Policies: which engine takes a request, as pure functions (rule 5) of what one decision sees.

A policy is any callable ``(view, request) -> dp_rank``; a user's own function will do. `View` is the board at
one instant, read by the front-end in the right order; ``view.ranks`` are the ranks that may be chosen (not
absent, dead, stalled, stuck, unknown or drained), never empty, in an order that turns with every decision and
starts elsewhere in each front-end: a policy that takes the *first* of several equal ranks therefore breaks ties
fairly and differently from its neighbours. A request that is pinned to a rank is never shown to a policy.

A policy that is marked with `sees_work` may also read ``view.work``: tokens and step times, which cost another
microsecond or two to read::

    @sees_work
    def shortest_backlog(view: View, request: Request) -> int:
        return view.least(view.work.tokens)

The simulator (``dpshm simulate``) runs this same code.
"""

from __future__ import annotations

from typing import Any

import msgspec

from dpshm.errors import SettingError
from dpshm.policies.affinity import Affinity
from dpshm.policies.alike import comparable
from dpshm.policies.counts import PowerOfTwo, least_loaded, round_robin, vllm
from dpshm.policies.view import Policy, Request, View, Work, sees_work
from dpshm.policies.work import LeastWork
from dpshm.rules.hashing import key_of

__all__ = [
    "NAMES",
    "Affinity",
    "LeastWork",
    "Policy",
    "PowerOfTwo",
    "Request",
    "View",
    "Work",
    "by_name",
    "comparable",
    "is_built_in",
    "key_of",
    "least_loaded",
    "round_robin",
    "sees_work",
    "vllm",
]

_FUNCTIONS: dict[str, Policy] = {"least_loaded": least_loaded, "round_robin": round_robin, "vllm": vllm}
_CLASSES: dict[str, Any] = {"affinity": Affinity, "least_work": LeastWork, "power_of_two": PowerOfTwo}
NAMES = tuple(sorted((*_FUNCTIONS, *_CLASSES)))


_WITHOUT_WEIGHTS = {"round_robin": round_robin, "vllm": vllm}


def check_weights_count(policy: Policy) -> None:
    """Refuses weights for a built-in policy that does not look at them.

    Raises:
        SettingError: it is such a policy.
    """
    name = "affinity" if isinstance(policy, Affinity) else None
    name = next((n for n, function in _WITHOUT_WEIGHTS.items() if policy is function), name)
    if name is not None:
        raise SettingError(
            f"policy {name!r} does not look at weights: choose least_loaded, power_of_two or least_work, or a "
            "policy of your own that reads view.weights; or leave out weights"
        )


def is_built_in(policy: Policy) -> bool:
    """Whether it is one of this module's: a pure function of what it is given. One derived from it is not."""
    return type(policy) in _CLASSES.values() or any(policy is function for function in _FUNCTIONS.values())


def by_name(name: str) -> Policy:
    """The policy of that name, with its parameters if there are any: ``affinity:epsilon=0.5``.

    Raises:
        SettingError: there is none of that name, or it has no such parameter.
    """
    kind, _, parameters = name.partition(":")
    given = dict(p.partition("=")[::2] for p in parameters.split(",")) if parameters else {}
    if kind in _CLASSES:
        try:
            # `strict=False` reads numbers from text; an unknown name must not pass in silence.
            if unknown := given.keys() - set(_CLASSES[kind].__struct_fields__):
                known = ", ".join(_CLASSES[kind].__struct_fields__) or "none"
                raise SettingError(f"policy {kind!r} has no parameter {min(unknown)!r}; it has: {known}")
            return msgspec.convert(given, _CLASSES[kind], strict=False)  # type: ignore[no-any-return]
        except msgspec.ValidationError as e:
            raise SettingError(f"policy {name!r}: {e}") from None
    if kind not in _FUNCTIONS:
        raise SettingError(f"no policy {kind!r}: choose one of {', '.join(NAMES)}")
    if given:
        raise SettingError(f"policy {kind!r} has no parameters, and was given {parameters!r}")
    return _FUNCTIONS[kind]
