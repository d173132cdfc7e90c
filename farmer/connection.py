"""Kept for scripts that import `open_object` from here; new ones write `from farmer import open_object`."""

from farmer.pyro.proxy import open_object

__all__ = ["open_object"]
