"""Measurements with ranks that compute (extra: torch)."""
