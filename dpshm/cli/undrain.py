"""``dpshm undrain``; see `dpshm.cli.drain`."""

from dpshm.cli.drain import undrain

__all__ = ["undrain"]
