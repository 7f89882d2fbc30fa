"""Tests of `dpshm.vllm.options`."""

from __future__ import annotations

import pytest

from dpshm import SettingError
from dpshm.vllm.options import Options, from_environment


@pytest.mark.parametrize(
    ("word", "mode"),
    [("", "on"), ("1", "on"), ("on", "on"), ("0", "off"), ("OFF", "off"), (" shadow ", "shadow")],
)
def test_the_switch(word, mode):
    """Guards against a switch whose words mean something else."""
    assert from_environment({"DPSHM": word}).mode == mode


def test_without_variables_the_defaults_hold():
    """Guards against a default that differs from the documented one."""
    assert from_environment({}) == Options()
    assert from_environment({"DPSHM_POLICY": "", "DPSHM_GROUP": "", "DPSHM_STALL_TIMEOUT_S": ""}) == Options()


def test_every_variable_is_heard():
    """Guards against a variable that is documented and ignored."""
    environ = {
        "DPSHM": "shadow",
        "DPSHM_POLICY": "vllm",
        "DPSHM_GROUP": "prod",
        "DPSHM_STALL_TIMEOUT_S": "1.5",
        "DPSHM_SHADOW_LOG_S": "2",
        "DPSHM_LOG_S": "3",
        "DPSHM_ANY_VLLM": "1",
    }
    assert from_environment(environ) == Options("shadow", "vllm", "prod", 1.5, 2.0, 3.0, True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DPSHM", "yes"),
        ("DPSHM_POLICY", "guess"),
        ("DPSHM_STALL_TIMEOUT_S", "-1"),
        ("DPSHM_STALL_TIMEOUT_S", "x"),
        ("DPSHM_SHADOW_LOG_S", "nan"),
    ],
)
def test_a_wrong_value_is_named(name, value):
    """Guards against an error that leaves the user to search for the variable."""
    with pytest.raises(SettingError, match=f"{name}.*{value}"):
        from_environment({name: value})
