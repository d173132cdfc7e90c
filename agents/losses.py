"""What the screen says of lost episodes: each reason once in few words, and then how often it came again."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass

AGAIN = 30.0  #: s after which a reason that came again is told again, with how often
LENGTH = 200  #: characters of a reason's first line that are shown

log = logging.getLogger("agents")


@dataclass
class _Reason:
    """A reason that was told, and what came of it since."""

    words: str
    since: float
    more: int = 0
    slot: int = 0  # where it came last


class LossLog:
    """Tells of losses as warnings. The whole text, often a traceback of many lines, goes to the log's DEBUG level."""

    def __init__(self) -> None:
        self._told: dict[tuple[str, str], _Reason] = {}

    def lost(self, slot: int, farm: str, text: str) -> None:
        """An episode of a slot was lost, for the reason in the text."""
        words = _in_short(text)
        log.debug("slot %d on %s: %s", slot, farm, text)
        key = farm, _without_numbers(words)
        reason = self._told.get(key)
        if reason is None:
            self._told[key] = _Reason(words.partition("\n")[0], time.monotonic())
            log.warning("slot %d on %s: %s", slot, farm, words)
        else:
            reason.more, reason.slot = reason.more + 1, slot

    def lost_with_farm(self, slots: Iterable[int], farm: str) -> None:
        """The farm itself is gone, which whoever keeps it has told with the reason: only how many went with it."""
        slots = list(slots)
        log.warning("%s: %d running episode%s ended with it", farm, len(slots), "" if len(slots) == 1 else "s")

    def tell(self, all_of_them: bool = False) -> None:
        """Says what came again since it was last told, once that is long enough ago."""
        now = time.monotonic()
        for key, reason in list(self._told.items()):
            if now - reason.since < AGAIN and not all_of_them:
                continue
            if reason.more:
                told = "%s: the same %d times more in %.0f s, last in slot %d: %s"
                log.warning(told, key[0], reason.more, now - reason.since, reason.slot, reason.words)
                reason.more, reason.since = 0, now
            else:
                del self._told[key]


def _in_short(text: str) -> str:
    """The first line, and the one that names the black box."""
    lines = text.strip().splitlines() or ["lost"]
    first = lines[0] if len(lines[0]) <= LENGTH else lines[0][:LENGTH] + "..."
    return "\n".join([first, *[line for line in lines[1:] if line.lstrip().startswith("black box")][:1]])


def _without_numbers(words: str) -> str:
    """What two losses for one reason have in common: they differ in slot, process, step and file."""
    return re.sub(r"0x[0-9a-f]+|\d+", "#", words.partition("\n")[0])
