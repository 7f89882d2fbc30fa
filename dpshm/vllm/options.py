"""The plugin's environment variables, read in each process: children of the launcher inherit them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal

import msgspec

from dpshm.errors import SettingError
from dpshm.policies import by_name

Mode = Literal["on", "off", "shadow"]
_MODES: dict[str, Mode] = {"": "on", "1": "on", "on": "on", "0": "off", "off": "off", "shadow": "shadow"}


class Options(msgspec.Struct, frozen=True):
    """The plugin's settings.

    Attributes:
        mode: ``DPSHM``: on (1, the default), off (0), or shadow: fill the board, let vLLM choose, compare.
        policy: ``DPSHM_POLICY``: how API servers choose, see `dpshm.policies`.
        group: ``DPSHM_GROUP``: the deployment's name on this node; default ``vllm-PID-XXXXXX``, of the launcher
            (`dpshm.linux.processes.tag`).
        stall_timeout_s: ``DPSHM_STALL_TIMEOUT_S``: see `dpshm.coordinator.settings.Settings`.
        shadow_log_s: ``DPSHM_SHADOW_LOG_S``: interval in seconds between the summaries of shadow mode.
        log_s: ``DPSHM_LOG_S``: interval in seconds between the launcher's lines about the whole group; 0: none.
        any_version: ``DPSHM_ANY_VLLM=1``: also run on releases of vLLM on which the plugin was not tested.
        restart: ``DPSHM_RESTART``: a dense rank that dies is started again, and the server stays up (1, the
            default); 0: it ends the server, as without dpshm.
    """

    mode: Mode = "on"
    policy: str = "least_work"
    group: str | None = None
    stall_timeout_s: float = 60.0
    shadow_log_s: float = 60.0
    log_s: float = 10.0
    any_version: bool = False
    restart: bool = True


def from_environment(environ: Mapping[str, str] = os.environ) -> Options:
    """Reads the options from the environment.

    Raises:
        SettingError: a variable has a value that cannot be used; the message names both, and what is allowed.
    """
    word = environ.get("DPSHM", "").strip().lower()
    if word not in _MODES:
        raise SettingError(f"DPSHM is {word!r}, and must be 1, 0 or shadow")
    default = Options()
    policy = environ.get("DPSHM_POLICY") or default.policy
    try:
        by_name(policy)
    except SettingError as e:
        raise SettingError(f"DPSHM_POLICY: {e}") from None
    return Options(
        mode=_MODES[word],
        policy=policy,
        group=environ.get("DPSHM_GROUP") or None,
        stall_timeout_s=_seconds(environ, "DPSHM_STALL_TIMEOUT_S", default.stall_timeout_s),
        shadow_log_s=_seconds(environ, "DPSHM_SHADOW_LOG_S", default.shadow_log_s),
        log_s=_seconds(environ, "DPSHM_LOG_S", default.log_s),
        restart=_switch(environ, "DPSHM_RESTART"),
        any_version=environ.get("DPSHM_ANY_VLLM", "") == "1",
    )


def _switch(environ: Mapping[str, str], name: str) -> bool:
    word = environ.get(name, "").strip().lower()
    mode = _MODES.get(word)
    if mode not in ("on", "off"):
        raise SettingError(f"{name} is {word!r}, and must be 1 or 0")
    return mode == "on"


def _seconds(environ: Mapping[str, str], name: str, default: float) -> float:
    text = environ.get(name) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise SettingError(f"{name} is {text!r}, and must be a number of seconds, 0 or more")
    return value
