"""Tiny environments for the tests.

Each says what really happened to it, so that a lost, doubled or swapped command shows.

Runs on Python 2.7 to 3.13 with numpy alone: the spaces are look-alikes, known by the names of their classes.
"""

import collections
import os
import subprocess
import sys
import time

import numpy as np


class Box(object):
    """Looks like gym's Box."""

    def __init__(self, low, high, shape=None, dtype="float32"):
        self.dtype = np.dtype(dtype)
        self.shape = np.shape(low) if shape is None else shape
        self.low = np.broadcast_to(np.asarray(low, self.dtype), self.shape)
        self.high = np.broadcast_to(np.asarray(high, self.dtype), self.shape)


class Discrete(object):
    """Looks like gym's Discrete before it had a start."""

    def __init__(self, n):
        self.n = n


class Dict(object):
    """Looks like gym's Dict."""

    def __init__(self, spaces):
        self.spaces = spaces


class Tuple(object):
    """Looks like gym's Tuple."""

    def __init__(self, spaces):
        self.spaces = spaces


class Spec(object):
    """Looks like gym's EnvSpec."""

    def __init__(self, name, length):
        self.id = name
        self.max_episode_steps = length
        self.reward_threshold = None


class CountingEnv(object):
    """Observes [episode, step, last action]; the reward is the step's number; truncates after `length` steps.

    It asserts nothing: the numbers are for the reader to compare.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30, "no_way_to_send": object()}

    def __init__(self, length=5, log=None, close_takes=0.0):
        self.length = length
        self.log = log
        self.close_takes = close_takes
        self.spec = Spec("Counting", length)
        self.observation_space = Box(np.zeros(3), np.full(3, np.inf), dtype="float32")
        self.action_space = Box([-1.0], [1.0], dtype="float32")
        self.episode = 0
        self.steps = 0
        self.seed_given = None
        self.options = None

    def _observation(self, action):
        return np.array([self.episode, self.steps, action], "float32")

    def _info(self):
        return {"step": self.steps, "episode": self.episode, "seed": self.seed_given, "options": self.options}

    def reset(self, seed=None, options=None):
        self.episode += 1
        self.steps = 0
        self.seed_given = seed
        self.options = options
        return self._observation(0.0), self._info()

    def step(self, action):
        self.steps += 1
        info = self._info()
        info["action_type"] = type(action).__name__
        action = float(np.asarray(action).reshape(-1)[0])
        return self._observation(action), np.float32(self.steps), False, self.steps >= self.length, info

    def close(self):
        time.sleep(self.close_takes)
        if self.log:
            with open(self.log, "a") as log:
                log.write("closed\n")


class SlowEnv(CountingEnv):
    """The action is the seconds to sleep."""

    def __init__(self, length=1000, limit=60.0, reset_takes=0.0):
        CountingEnv.__init__(self, length)
        self.reset_takes = reset_takes
        self.action_space = Box([0.0], [limit], dtype="float32")

    def reset(self, seed=None, options=None):
        time.sleep(self.reset_takes)
        return CountingEnv.reset(self, seed, options)

    def step(self, action):
        time.sleep(float(np.asarray(action).reshape(-1)[0]))
        return CountingEnv.step(self, action)


class NestedEnv(object):
    """Observes a dict with an image, a tuple of integers and doubles, and a nested dict; the action is Discrete."""

    def __init__(self, length=3):
        self.length = length
        self.steps = 0
        self.action_space = Discrete(4)
        self.observation_space = Dict(
            collections.OrderedDict(
                [
                    ("image", Box(np.zeros((4, 5, 3)), np.full((4, 5, 3), 255), dtype="uint8")),
                    ("pair", Tuple([Box([-9], [9], dtype="int64"), Box([-1.0, -1.0], [1.0, 1.0], dtype="float64")])),
                    ("deep", Dict({"mode": Discrete(3)})),
                ]
            )
        )

    def observation(self, action=0):
        # Python 2 keeps the order of an OrderedDict only.
        return collections.OrderedDict(
            [
                ("image", np.arange(60, dtype="uint8").reshape(4, 5, 3) + np.uint8(self.steps)),
                ("pair", (np.array([-self.steps], "int64"), np.array([0.1, action / 4.0]))),
                ("deep", {"mode": np.int64(self.steps % 3)}),
            ]
        )

    def reset(self, seed=None, options=None):
        self.steps = 0
        return self.observation(), {}

    def step(self, action):
        self.steps += 1
        return self.observation(action), 0.5, self.steps >= self.length, False, {"action": action}


class OldGymEnv(object):
    """The API of gym before 0.26: `reset` returns the observation alone, `step` four values, `seed` is a method.

    Ends by its time limit after `length` steps, as gym's TimeLimit says it; by itself at action 1.
    """

    def __init__(self, length=5):
        self.length = length
        self.observation_space = Box(np.zeros(2), np.full(2, 1e6), dtype="float64")
        self.action_space = Discrete(2)
        self.steps = 0
        self.seeds = []

    def seed(self, seed=None):
        self.seeds.append(seed)
        return [seed]

    def reset(self):
        self.steps = 0
        return np.array([self.steps, (self.seeds or [0])[-1] or 0], "float64")

    def step(self, action):
        self.steps += 1
        done = action == 1
        info = {"seeds": self.seeds}
        if self.steps >= self.length:
            info["TimeLimit.truncated"] = not done
            done = True
        return np.array([self.steps, (self.seeds or [0])[-1] or 0], "float64"), 1, done, info


class PrintingEnv(CountingEnv):
    """Prints to standard output on every reset and step, by every way there is, and reads standard input."""

    def _noise(self):
        print("a line of the simulator's")
        sys.stdout.write("without an end ")
        sys.__stdout__.write("to the first stdout\n")
        os.write(1, b"bytes from below\n")
        subprocess.call([sys.executable, "-c", "import sys; sys.stdout.write('a child')"])
        if os.read(0, 1) != b"":
            raise RuntimeError("standard input is not empty")

    def __init__(self, length=5):
        CountingEnv.__init__(self, length)
        self._noise()

    def reset(self, seed=None, options=None):
        self._noise()
        return CountingEnv.reset(self, seed, options)

    def step(self, action):
        self._noise()
        return CountingEnv.step(self, action)


class RaisingEnv(CountingEnv):
    """Fails on command, at the construction, the reset or the step named by `at`.

    A step fails when its action is over 0.5; a reset when its options say so.
    """

    def __init__(self, length=5, at="step", log=None):
        CountingEnv.__init__(self, length, log)
        self.at = at
        if at == "construct":
            raise ValueError("asked to raise in the constructor")

    def reset(self, seed=None, options=None):
        if self.at == "reset" and options and options.get("raise"):
            raise ValueError("asked to raise in reset")
        return CountingEnv.reset(self, seed, options)

    def step(self, action):
        asked = float(np.asarray(action).reshape(-1)[0])
        if asked > 0.9:
            os._exit(9)
        if self.at == "step" and asked > 0.5:
            raise ValueError("asked to raise in step")
        if self.at == "exit" and asked > 0.5:
            sys.exit("asked to leave in step")
        if self.at == "observation" and asked > 0.5:
            return {"fine": 1, "handle": object()}, 0.0, False, False, {}
        return CountingEnv.step(self, action)


class Handle(object):
    """Something that cannot be sent."""

    def __repr__(self):
        return "<a handle of the simulator>"


class OddInfoEnv(CountingEnv):
    """Puts into its info what cannot be sent."""

    def step(self, action):
        observation, reward, terminated, truncated, info = CountingEnv.step(self, action)
        info["handle"] = {"deep": [1, Handle()]}
        return observation, reward, terminated, truncated, info


class UnsoundEnv(CountingEnv):
    """What no replay could bear: over 0.2 the observation is too short, over 0.4 it is NaN, over 0.6 the reward is."""

    def step(self, action):
        asked = float(np.asarray(action).reshape(-1)[0])
        observation, reward, terminated, truncated, info = CountingEnv.step(self, action)
        if asked > 0.6:
            return observation, float("nan"), terminated, truncated, info
        if asked > 0.4:
            return observation * np.float32("nan"), reward, terminated, truncated, info
        if asked > 0.2:
            return observation[:2], reward, terminated, truncated, info
        return observation, reward, terminated, truncated, info
