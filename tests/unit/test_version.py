"""The package's version as a word."""

from __future__ import annotations

import pytest

import dpshm
from dpshm.version import __version__, version_text, version_word


@pytest.mark.parametrize(
    ("version", "text"),
    [("1.2.3", "1.2.3"), ("0.1.0", "0.1.0"), ("2.0", "2.0.0"), ("1.2.3rc4", "1.2.3"), ("1.2.3.dev5+gabc", "1.2.3")]
)  # fmt: skip
def test_a_version_fits_a_word(version: str, text: str):
    """Guards against versions that cannot be told apart on the board."""
    word = version_word(version)
    assert 0 < word < 1 << 48
    assert version_text(word) == text


def test_stock_processes_have_none():
    """Guards against a row of zeros that looks like version 0.0.0."""
    assert version_text(0) == "?"


def test_the_package_says_the_same():
    """Guards against two versions in one package."""
    assert dpshm.__version__ == __version__
    assert version_text(version_word()) == __version__
