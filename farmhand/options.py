"""How options are read that more than one command line here has: argparse's `type`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from farmhand.limits import parse_size


def size(text: str) -> int:
    """`2G` as bytes."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def json_object(text: str) -> dict[str, Any]:
    """`{"difficulty": 1}` as a dict."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error}): {text}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'a JSON object is wanted, as {{"difficulty": 1}}, not {text}')
    return value
