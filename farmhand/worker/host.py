"""One environment and the commands that a worker is given for it, without the pipes.

    host = Host()
    reply, body, flags = host.construct({"env": {...}, "kwargs": {...}, "path": [...]})
    reply, body, flags = host.reset({"seed": 7, "options": None})
    reply, body, flags = host.step({"action": action, "repeat": 1})

Whatever the environment raises comes out of these; `fault` puts it into words.

Runs unchanged on Python 2.7 to 3.13, with nothing but the standard library and numpy.
"""

import os
import platform
import sys
import time
import traceback

import numpy

import adapt
import build
import check
import codec
import describe
import protocol

#: Seconds that never go back; Python 2.7 has none of those on every machine, so there it is the time of day.
clock = getattr(time, "perf_counter", time.time)


def as_text(value):
    """Any value as text that can be sent, whatever its own `__str__` or `__repr__` does."""
    try:
        text = value if isinstance(value, bytes) else "%s" % (value,)
    except UnicodeError:  # Python 2, and a message that is not ASCII
        text = repr(value)
    except Exception:
        text = "<%s without a text>" % type(value).__name__
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else text


def placeholder(value):
    """What is sent in the place of a value in an info that cannot be: a text that says so."""
    try:
        text = repr(value)
    except Exception:
        text = "<its repr raises>"
    return "<not sent: %s: %s>" % (type(value).__name__, as_text(text)[:200])


def fault(where):
    """The body of a FAULT for the exception being handled."""
    kind, error = sys.exc_info()[:2]
    return {
        "type": as_text(getattr(kind, "__name__", kind)),
        "text": as_text(error),
        # What the checks refuse has no trace in the environment's code.
        "traceback": "" if isinstance(error, check.Invalid) else as_text(traceback.format_exc()),
        "where": where,
    }


def plain_parts(mapping):
    """Those parts of a dict that can be sent; an environment's metadata may hold anything."""
    kept = {}
    for key, value in dict(mapping or {}).items():
        try:
            codec.encode({key: value})
        except codec.CodecError:
            continue
        kept[key] = value
    return kept


def since(began):
    """Seconds since then; the time of day may have been set back meanwhile."""
    return max(0.0, clock() - began)


class NoEpisode(RuntimeError):
    """A step came before the first reset, or after the end of an episode."""


#: The caller's mistakes: the environment never saw the command, and is as good as before.
MISUSE = (NoEpisode, check.InvalidAction)


class Host(object):
    """One environment and the commands it is given."""

    def __init__(self):
        self._construction = None
        self._env = None
        self._running = False
        self._action_for = None
        self._find_in_observation = None
        self._find_in_action = None

    # ---- the commands: each takes the decoded body, and returns (reply, body as bytes, flags) ----

    def construct(self, body):
        """Makes the environment and tells the farm what it is."""
        sys.path[:0] = [folder for folder in body.get("path") or [] if folder not in sys.path]
        self._construction = body
        self._make()
        env = self._env.env
        ready = {
            "observation_space": describe.describe(getattr(env, "observation_space", None)),
            "action_space": describe.describe(getattr(env, "action_space", None)),
            "metadata": plain_parts(getattr(env, "metadata", None)),
            "python": platform.python_version(),
            "numpy": numpy.__version__,
            "api": self._env.api,
            "spec": self._spec(env),
            "pid": os.getpid(),
        }
        return protocol.READY, codec.encode(ready, default=placeholder), 0

    def reset(self, body):
        """Begins an episode, on a new environment if the last one failed."""
        if self._env is None:
            self._make()
        self._running = False
        began = clock()
        observation, info = self._env.reset(body.get("seed"), body.get("options"))
        seconds = since(began)
        check.observation(self._find_in_observation, observation)
        self._running = True
        return protocol.OBSERVATION, self._encoded((observation,), info, seconds), 0

    def step(self, body):
        """Does one action `repeat` times: rewards add up, and the episode's end ends it."""
        if not self._running:
            raise NoEpisode("step without an episode: it has ended, or was never begun; reset first")
        action = self._action_for(body["action"])
        try:
            check.action(self._find_in_action, action)
        except check.InvalidAction:
            self._running = False  # for the farm and the host a fault ends the episode
            raise
        total = seconds = 0.0
        for _ in range(max(1, body.get("repeat", 1))):
            began = clock()
            observation, reward, terminated, truncated, info = self._env.step(action)
            seconds += since(began)
            total += check.reward(reward)
            if terminated or truncated:
                self._running = False
                break
        check.observation(self._find_in_observation, observation)
        flags = (protocol.TERMINATED if terminated else 0) | (protocol.TRUNCATED if truncated else 0)
        result = (observation, total, terminated, truncated)
        return protocol.TRANSITION, self._encoded(result, info, seconds), flags

    def close(self):
        """Closes the environment; one that fails at it is closed all the same."""
        env, self._env, self._running = self._env, None, False
        if env is not None:
            try:
                env.close()
            except:  # noqa: E722  (Python 2 raises objects that are no Exception)
                sys.stderr.write("worker: the environment failed to close: %s\n" % traceback.format_exc())

    # ---- inside ----

    def _make(self):
        wanted = self._construction
        env = build.build(wanted["env"], wanted.get("kwargs") or {}, list(wanted.get("path") or []))
        self._env = adapt.adapt(env)
        space = describe.describe(getattr(env, "action_space", None))
        kind = None if space is None else space["kind"]
        self._action_for = adapt.action_for(kind, space["dtype"] if kind == "box" else None)
        bounds = wanted.get("check_bounds", True)
        self._find_in_action = check.finder(space, bounds, check.ROUNDING)
        space = describe.describe(getattr(env, "observation_space", None))
        self._find_in_observation = check.finder(space, bounds)

    def _spec(self, env):
        """The parts of a gym spec that a host asks about; a simulator's own `spec` may be anything."""
        spec = getattr(env, "spec", None)
        if spec is None:
            return None
        parts = {}
        for name in ("id", "max_episode_steps", "reward_threshold"):
            parts.update(plain_parts({name: getattr(spec, name, None)}) or {name: None})
        return parts

    def _encoded(self, result, info, seconds):
        """A result as bytes. What cannot be sent is replaced in the info, and an error in the observation."""
        parts = result + (info, seconds)
        try:
            return codec.encode(parts)
        except codec.CodecError as error:
            if not error.path.startswith("[%d]" % len(result)):
                codec.encode(result[0])  # raises with the path inside the observation
        codec.encode(result)
        return codec.encode(parts, default=placeholder)
