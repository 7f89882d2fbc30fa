"""Tests of `dpshm.service.serve`: the file of settings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dpshm import SettingError
from dpshm.service.serve import read_config


@pytest.mark.parametrize("mode", ['"0640"', '"0o640"', '"640"', "0o640"])
def test_permissions_are_written_as_for_chmod(tmp_path, mode):
    """Guards against permissions that a user copies from chmod and that are refused, or read as decimal."""
    config = tmp_path / "dpshm.toml"
    config.write_text(f'group = "prod"\nfile_mode = {mode}\n')
    assert read_config(config) == {"group": "prod", "file_mode": 0o640}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('file_mode = "rw-r-----"', "file_mode 'rw-r-----' is not octal: 0600"),
        ("file_mode = 0640", 'file_mode = "0640"'),
        ('gruop = "prod"', "unknown setting 'gruop': is group meant?"),
        ("stall_timeout = 5", "unknown setting 'stall_timeout': is stall_timeout_s meant?"),
        ("[coordinator]\ndp_size = 8", "unknown setting 'coordinator'"),
        ("own_process = true", "unknown setting 'own_process'"),
    ],
)
def test_a_mistake_names_the_file_and_the_line(tmp_path, line, says):
    """Guards against a misspelt name that is told as "group is needed", or taken for another argument."""
    config = tmp_path / "dpshm.toml"
    config.write_text(line)
    with pytest.raises(SettingError, match=re.escape(says)):
        read_config(config)


def test_a_file_that_an_editor_has_touched(tmp_path):
    """A byte order mark at the start, and Windows' line ends, are no part of the settings."""
    config = tmp_path / "dpshm.toml"
    config.write_bytes(b'\xef\xbb\xbfgroup = "prod"\r\ndp_size = 2\r\n')
    assert read_config(config) == {"group": "prod", "dp_size": 2}


def test_a_device_holds_no_settings():
    """Guards against a read that has no end, and takes all memory."""
    with pytest.raises(SettingError, match="/dev/zero has more than"):
        read_config(Path("/dev/zero"))
