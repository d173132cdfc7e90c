"""What a reply says: a value that a replay can bear, or the reason why there is none."""

from __future__ import annotations

import math
from typing import Any

import gymnasium

from farmer.ledger import LOST_BUCKETS
from farmer.spaces import why_unsound
from farmer.values import Values
from wire import codec, protocol


class ReplyReader:
    """Reads and checks the replies of one environment. For one thread at a time."""

    def __init__(self, values: Values, observation_space: gymnasium.Space[Any] | None):
        self._values, self._space = values, observation_space

    def read(self, sent: int, kind: int, body: bytes, crc: int | None = None) -> tuple[Any, str | None, str]:
        """What a reply says: its value, why there is none, and the ledger's bucket."""
        if kind == protocol.TRANSITION and sent == protocol.STEP:
            known = self._values.transition(body, crc)
            if known is not None:
                return known, None, "done"
        try:
            value = codec.decode(body, crc)
            if kind == protocol.LOST:
                bucket = value.get("bucket", "crashed")
                return None, str(value["text"]), bucket if bucket in LOST_BUCKETS else "invalid"
            if kind == protocol.FAULT:
                return None, _words(value), "invalid"
            self._check_sound(sent, kind, value)
        except (ValueError, TypeError, KeyError, AttributeError) as error:  # a damaged body is a ValueError
            return None, "an invalid result: %s" % error, "invalid"
        if kind == protocol.TRANSITION:
            self._values.remember(body, value)
        return value, None, "done"

    def _check_sound(self, sent: int, kind: int, value: Any) -> None:
        """Nothing that a replay could not bear gets further than this, whatever a worker says.

        Raises:
            ValueError, TypeError: what is wrong with it.
        """
        if kind != (protocol.OBSERVATION if sent == protocol.RESET else protocol.TRANSITION):
            raise ValueError("%s in answer to %s" % (protocol.NAMES.get(kind, kind), protocol.NAMES[sent]))
        if kind == protocol.OBSERVATION:
            obs, info, env_s = value
        else:
            obs, reward, _, _, info, env_s = value
            if not math.isfinite(reward):
                raise ValueError("the reward is %r" % reward)
        if not isinstance(info, dict) or not math.isfinite(env_s):
            raise ValueError("info %r and seconds %r" % (info, env_s))
        why = why_unsound(self._space, obs)
        if why is not None:
            raise ValueError("the observation " + why)


def _words(value: dict[str, Any]) -> str:
    text = "%s: %s" % (value["type"], value["text"]) if "type" in value else value["text"]
    return text + ("\n" + value["traceback"] if value.get("traceback") else "")
