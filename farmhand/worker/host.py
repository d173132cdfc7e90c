"""One environment and the commands that a worker is given for it, without the pipes.

    host = Host()
    reply, body, flags = host.construct(codec.encode({"env": {...}, "kwargs": {...}, "path": [...]}))
    reply, body, flags = host.reset(codec.encode({"seed": 7, "options": None}))
    reply, body, flags = host.step(codec.encode({"action": action, "repeat": 1}))

Whatever the environment raises comes out of these; `fault` puts it into words.

Between two steps the simulator, and on a full machine the other workers, push this code out of the processor's caches,
so that a call of a Python function costs several times what it does in a loop. `step` therefore does the common case
itself: an action and an observation like the last ones, a float for a reward, an empty info. All else is done by the
functions that know every case.

Runs unchanged on Python 2.7 to 3.13, with nothing but the standard library and numpy.
"""

import os
import platform
import struct
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
    """The text that is sent in place of a value in an info that cannot be sent."""
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
    """The parts of a dict that can be sent; an environment's metadata may hold anything."""
    kept = {}
    for key, value in dict(mapping or {}).items():
        try:
            codec.encode({key: value})
        except codec.CodecError:
            continue
        kept[key] = value
    return kept


_LARGEST = check.LARGEST


def since(began):
    """Seconds since then, at least 0: the time of day may have been set back meanwhile."""
    return max(0.0, clock() - began)


class NoEpisode(RuntimeError):
    """A step came before the first reset, or after the end of an episode."""


#: Bytes of an array from which on a copy of it costs more than asking whether it is needed.
LARGE = 1 << 15

_TWO_DOUBLES = struct.Struct("<dd")
_WRITES_PIECES = hasattr(os, "writev")

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
        self._action_form = None  # of the last one: (form, shape, dtype, repeat)
        self._result_forms = [None] * 4  # by the flags: (form, dtype, shape)

    # ---- the commands: each takes the body as it came, and returns (reply, body, flags). A body is bytes; one with a
    # ---- large array in it may be a tuple of pieces, of which that array's own memory is one.

    def construct(self, body):
        """Makes the environment and tells the farm what it is."""
        body = codec.decode(body)
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
        body = codec.decode(body)
        if self._env is None:
            self._make()
        self._running = False
        began = clock()
        observation, info = self._env.reset(body.get("seed"), body.get("options"))
        seconds = since(began)
        check.observation(self._find_in_observation, observation)
        self._running = True
        return protocol.OBSERVATION, self._encoded((observation,), info, numpy.float64(seconds)), 0

    def step(self, body):
        """Does one action `repeat` times, or until the episode ends; rewards add up."""
        if not self._running:
            raise NoEpisode("step without an episode: it has ended, or was never begun; reset first")
        known = self._action_form
        start = None if known is None else known[0].start_in(body)
        if start is None:
            action, repeat = self._order_of(body)
        else:
            _, shape, dtype, repeat = known
            action = numpy.ndarray(shape, dtype, body, start).copy()
        if self._find_in_action(action) is not None:
            self._running = False  # for the farm and the host a fault ends the episode
            check.action(self._find_in_action, action)  # raises
        total = seconds = 0.0
        env = self._env.env
        while True:
            began = clock()
            answer = env.step(action)
            seconds += clock() - began
            if type(answer) is not tuple or len(answer) != 5:
                answer = adapt.five(answer)
            observation, reward, terminated, truncated, info = answer
            total += reward if type(reward) is float and -_LARGEST <= reward <= _LARGEST else check.reward(reward)
            repeat -= 1
            if terminated or truncated:
                self._running = False
                break
            if repeat <= 0:
                break
        if self._find_in_observation(observation) is not None:
            check.observation(self._find_in_observation, observation)  # raises
        flags = (protocol.TERMINATED if terminated else 0) | (protocol.TRUNCATED if truncated else 0)
        numbers = _TWO_DOUBLES.pack(total, max(0.0, seconds))  # the time of day may have been set back
        known = self._result_forms[flags]
        if (
            known is None
            or type(info) is not dict
            or info
            or type(observation) is not numpy.ndarray
            or observation.dtype != known[1]
            or observation.shape != known[2]
        ):
            return protocol.TRANSITION, self._transition(observation, flags, info, numbers), flags
        if observation.nbytes > LARGE and _WRITES_PIECES and observation.flags.c_contiguous:
            return protocol.TRANSITION, known[0].pieces(observation.reshape(-1).view("u1"), numbers), flags
        return protocol.TRANSITION, known[0].encode(observation.tobytes(), numbers), flags

    def close(self):
        """Closes the environment; it counts as closed also when its `close` fails."""
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

    def _order_of(self, body):
        """(action in the form that its space asks for, how often) of any STEP; remembers what an array looks like."""
        order = codec.decode(body)
        action, repeat = order["action"], max(1, order.get("repeat", 1))
        if type(action) is numpy.ndarray and len(order) == 2 and self._action_for(action) is action:
            self._action_form = (codec.Form(body), action.shape, action.dtype, repeat)
        return self._action_for(action), repeat

    def _transition(self, observation, flags, info, numbers):
        """Any result as bytes; remembers what an array looks like that comes with an empty info."""
        total, seconds = numpy.frombuffer(numbers, "<f8")
        ended = bool(flags & protocol.TERMINATED), bool(flags & protocol.TRUNCATED)
        info = {} if info is None else info
        body = self._encoded((observation, total) + ended, info, seconds)
        if type(observation) is numpy.ndarray and type(info) is dict and not info:
            self._result_forms[flags] = (codec.Form(body), observation.dtype, observation.shape)
        return body

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
