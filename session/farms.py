"""The farms of a session: those of the farmlist, or one on this machine. Nothing here waits for TensorFlow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from farmer import Farmer
from session.local_farm import LocalFarm
from session.options import Options
from session.screen import say


class Farms:
    """The farmer of a session, and the local farm where there is no farmlist.

    Attributes:
        farmer: with its slots leased.
        local: None where a farmlist names the farms.
    """

    def __init__(self, options: Options, folder: Path):
        """Finds or starts them.

        Args:
            options: as typed, and checked.
            folder: for the logs of a local farm.

        Raises:
            FarmError: no farm, or none that offers the environment.
        """
        path = options.farmlist or Path("farmlist.py")
        self.local: LocalFarm | None = None
        farms: Any = path
        if options.farmlist is None and not path.exists():
            say("no farmlist.py here: starting a local farm (copy farmlist.example.py to use other machines)")
            self.local = LocalFarm(options, folder)
            farms = [self.local.address]
        try:
            self.farmer = Farmer(options.env, farms, slots=options.slots, seed=options.seed, key_file=options.key_file)
        except BaseException:
            if self.local is not None:
                self.local.stop()
            raise

    def close(self) -> None:
        """Frees all slots, and ends a local farm."""
        self.farmer.close()
        if self.local is not None:
            self.local.stop()
            self.local = None
