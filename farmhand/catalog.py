"""Which environments a farm offers: from the names on its command line to what a worker is told to build.

    Pendulum-v1, module:Env-v0     a gymnasium (or gym) id of the simulator's Python
    osim:L2M2019                   a recipe that ships with this project (`simulators`)
    mymodule:make                  a callable, found from the working directory

A host names one of the names given here; it can never name a module to import.
"""

from __future__ import annotations

import keyword
import os
from pathlib import Path
from typing import Any

import simulators
from wire.errors import StartError
from wire.names import close_names


class Catalog:
    """The environments of one farm by name, with what a worker needs to build each."""

    def __init__(
        self,
        names: list[str],
        kwargs: dict[str, Any] | None = None,
        folder: str | None = None,
        check_bounds: bool = True,
    ):
        """Checks the names; nothing is imported here.

        Args:
            names: the ENV arguments.
            kwargs: keyword arguments for every environment's constructor.
            folder: where `module:factory` is looked for; the working directory by default.
            check_bounds: whether workers refuse observations and actions that are out of their spaces' bounds.

        Raises:
            StartError: a name has none of the three forms, or is a recipe that does not exist.
        """
        if not names:
            raise StartError("a farm needs at least one environment, for example: python farm.py Pendulum-v1")
        self.folder = folder or os.getcwd()
        self._check_bounds = check_bounds
        self.orders = {name: self._order(name, kwargs or {}) for name in names}

    @property
    def names(self) -> list[str]:
        """In the order of the command line."""
        return list(self.orders)

    def order(self, name: str) -> dict[str, Any]:
        """The body of a CONSTRUCT command for this environment."""
        return self.orders[name]

    def _order(self, name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {
            "env": _spec(name),
            "kwargs": kwargs,
            "path": [self.folder],
            "name": name,
            "check_bounds": self._check_bounds,
        }


def _spec(name: str) -> dict[str, Any]:
    if name in simulators.RECIPES:
        recipe = simulators.RECIPES[name]
        file = Path(simulators.__file__).resolve().parent / recipe["file"]
        return {"kind": "file", "file": str(file), "factory": recipe["factory"]}
    module, colon, factory = name.partition(":")
    families = {recipe.partition(":")[0] for recipe in simulators.RECIPES if ":" in recipe}
    recipes = ", ".join(sorted(simulators.RECIPES))
    if colon and module in families:
        close = close_names(name, list(simulators.RECIPES))
        raise StartError(f"no recipe {name!r} ships with this farm\n  there are: {recipes}{close}")
    if colon and _is_identifier(factory) and all(_is_identifier(part) for part in module.split(".")):
        return {"kind": "factory", "module": module, "factory": factory}
    if not name or any(c.isspace() for c in name) or (colon and not (module and factory)):
        raise StartError(
            f"{name!r} names no environment\n"
            f"  wanted: a gymnasium id (Pendulum-v1), a recipe ({recipes}) or module:factory"
        )
    return {"kind": "gym", "id": name}


def _is_identifier(text: str) -> bool:
    return text.isidentifier() and not keyword.iskeyword(text)
