"""Breaks everything on purpose and counts what is lost."""
