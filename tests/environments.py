"""Tiny environments for the tests.

Each says what really happened to it, so that a lost, doubled or swapped command shows.

Runs on Python 2.7 to 3.13 with numpy alone: the spaces are look-alikes, known by the names of their classes.
"""

import collections
import ctypes
import os
import signal
import struct
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
        self.observation_space = Box([0.0, 0.0, -1.0], np.full(3, np.inf), dtype="float32")
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
        self.observation_space = Box(np.zeros(2), np.full(2, 2.0**32), dtype="float64")
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


class SeedlessEnv(CountingEnv):
    """Has no way to be given a seed."""

    def reset(self):
        return CountingEnv.reset(self)


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


def hang(how):
    """Never comes back: in a loop of Python, asleep, blocked in C with the interpreter's lock held, or stopped."""
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "in C":
        ctypes.PyDLL(None).pause()  # PyDLL keeps the lock, as an extension that blocks does
    while True:
        if how == "asleep":
            time.sleep(600)


class HangingEnv(CountingEnv):
    """Hangs in the step whose action is over 0.5, in the reset whose options say so, in the constructor if `trap` is
    a file that exists."""

    def __init__(self, length=1000, how="asleep", trap=None, takes=0.0):
        CountingEnv.__init__(self, length)
        self.how = how
        time.sleep(takes)
        if trap and os.path.exists(trap):
            hang(how)

    def reset(self, seed=None, options=None):
        if options and options.get("hang"):
            hang(self.how)
        return CountingEnv.reset(self, seed, options)

    def step(self, action):
        if float(np.asarray(action).reshape(-1)[0]) > 0.5:
            hang(self.how)
        return CountingEnv.step(self, action)


class LeakingEnv(CountingEnv):
    """Keeps `leak` MB more at each step, itself or in a child process."""

    def __init__(self, length=10, leak=1.0, child=False):
        CountingEnv.__init__(self, length)
        self.leak = leak
        self.kept = []
        code = "import time; kept = b'x' * int(%d * 2 ** 20); time.sleep(600)" % leak
        self.command = [sys.executable, "-c", code] if child else None

    def step(self, action):
        if self.command:
            self.kept.append(subprocess.Popen(self.command))
        else:
            self.kept.append(b"x" * int(self.leak * 2**20))
        return CountingEnv.step(self, action)


class SlowingEnv(CountingEnv):
    """Each step takes `first` seconds, and after `fresh` steps three times that."""

    def __init__(self, length=100, first=0.002, fresh=350):
        CountingEnv.__init__(self, length)
        self.first = first
        self.fresh = fresh
        self.made = 0

    def step(self, action):
        self.made += 1
        time.sleep(self.first if self.made <= self.fresh else 3 * self.first)
        return CountingEnv.step(self, action)


class DyingEnv(CountingEnv):
    """Ends its process at the construction (if the file `trap` exists), in a reset, or at the step number `at`."""

    def __init__(self, at=1, trap=None, takes=0.0, length=1000):
        CountingEnv.__init__(self, length)
        self.at = at
        time.sleep(takes)
        if trap and os.path.exists(trap):
            os._exit(7)

    def reset(self, seed=None, options=None):
        if self.at == "reset":
            os._exit(8)
        return CountingEnv.reset(self, seed, options)

    def step(self, action):
        if self.steps + 1 == self.at:
            os._exit(9)
        return CountingEnv.step(self, action)


class ParentEnv(CountingEnv):
    """Has a child in a session of its own, and one that has lost its parent; writes their pids to a file.

    Hangs in the step whose action is over 0.5.
    """

    def __init__(self, pids, length=1000):
        CountingEnv.__init__(self, length)
        code = "import os, time; os.setsid(); time.sleep(600)"
        child = subprocess.Popen([sys.executable, "-c", code])
        code = "import os, subprocess, sys; os.setsid(); print(subprocess.Popen(['sleep', '600'], stdout=2).pid)"
        orphan = subprocess.check_output([sys.executable, "-c", code])
        with open(pids, "a") as file:
            file.write("%d %d\n" % (child.pid, int(orphan)))

    def step(self, action):
        if float(np.asarray(action).reshape(-1)[0]) > 0.5:
            hang("asleep")
        return CountingEnv.step(self, action)


class AnsweringEnv(CountingEnv):
    """Writes a reply into the farm's pipe that nobody has asked for, at the step whose action is over 0.5."""

    def step(self, action):
        if float(np.asarray(action).reshape(-1)[0]) > 0.5:
            for fd in range(3, 20):
                try:
                    os.write(fd, struct.pack("!BBQI", 13, 0, 7, 0) * 2)
                except OSError:
                    pass
            hang("asleep")
        return CountingEnv.step(self, action)


class BusyEnv(CountingEnv):
    """Each step computes for some milliseconds, without a sleep."""

    def __init__(self, length=50, work=100000):
        CountingEnv.__init__(self, length)
        self.work = work

    def step(self, action):
        sum(range(self.work))
        return CountingEnv.step(self, action)


class HungryEnv(SlowEnv):
    """Holds `megabytes` from its first reset on."""

    def __init__(self, megabytes=100, length=1000, limit=0.02):
        SlowEnv.__init__(self, length, limit)
        self.megabytes = megabytes
        self.held = b""

    def reset(self, seed=None, options=None):
        self.held = self.held or b"x" * (self.megabytes * 2**20)
        return SlowEnv.reset(self, seed, options)


class LicenceEnv(SlowEnv):
    """Writes a line into a file when it is built, and refuses to be when there are `licences` of them."""

    def __init__(self, file, licences=2):
        SlowEnv.__init__(self, 1000, 0.01)
        with open(file, "a+") as lines:
            lines.seek(0)
            if len(lines.readlines()) >= licences:
                raise ValueError("no licence is left")
            lines.write("taken\n")


class EndingEnv(CountingEnv):
    """Terminates where others are truncated."""

    def step(self, action):
        observation, reward, _, over, info = CountingEnv.step(self, action)
        return observation, reward, over, False, info


class GatedEnv(CountingEnv):
    """Its first reset is free; each later one waits for the file `gate`, or for `gate` with its process id behind."""

    def __init__(self, gate, length=3):
        CountingEnv.__init__(self, length)
        self.gates = [gate, "%s-%d" % (gate, os.getpid())]

    def reset(self, seed=None, options=None):
        while self.episode and not any(os.path.exists(gate) for gate in self.gates):
            time.sleep(0.01)
        return CountingEnv.reset(self, seed, options)


class ChangingEnv(object):
    """Its step returns the sort of thing that the action names, with the number of the step in it."""

    observation_space = Box(-np.inf, np.inf, (4,))
    action_space = Box(0.0, 100.0, (1,))
    SORTS = (
        "plain",
        "info",
        "float64",
        "terminated",
        "truncated",
        "list",
        "float32 reward",
        "int reward",
        "strided",
        "no info",
        "flags of numpy",
        "NaN",
        "infinite reward",
        "huge",
    )

    def reset(self):
        self.count = 0
        return np.zeros(4, "float32")

    def step(self, action):
        self.count += 1
        sort = self.SORTS[int(action[0])]
        observation, reward, info = np.full(4, self.count, "float32"), 0.5 * self.count, {}
        ended = [sort == "terminated", sort == "truncated"]
        if sort == "info":
            info = {"count": self.count}
        elif sort == "float64":
            observation = observation.astype("float64")
        elif sort == "list":
            observation = observation.tolist()
        elif sort == "float32 reward":
            reward = np.float32(reward)
        elif sort == "int reward":
            reward = self.count
        elif sort == "strided":
            observation = np.full(8, self.count, "float32")[::2]
        elif sort == "no info":
            info = None
        elif sort == "flags of numpy":
            ended = [np.bool_(False), np.bool_(False)]
        elif sort == "NaN":
            observation[3] = np.nan
        elif sort == "infinite reward":
            reward = float("inf")
        elif sort == "huge":
            observation[3] = -3e38
        return observation, reward, ended[0], ended[1], info


class LargeEnv(object):
    """Observes an array in which every number says which seed, step and place it is of.

    Terminates after `length` steps. With `echo` the observation is the action, whose space is the same.
    """

    def __init__(self, shape=(84, 84, 4), dtype="uint8", length=3, echo=False):
        self.shape = tuple(shape)
        self.dtype = dtype
        self.length = length
        self.echo = echo
        low, high = (0, 255) if dtype == "uint8" else (-np.inf, np.inf)
        self.observation_space = Box(low, high, self.shape, dtype)
        self.action_space = self.observation_space if echo else Box([-1.0], [1.0])

    def look(self):
        size = int(np.prod(self.shape))
        first = 1000003 * self.seed + 1009 * self.steps
        numbers = np.arange(first, first + size) % 999983
        if self.dtype != "uint8":
            numbers = numbers / 7.0
        return numbers.astype(self.dtype).reshape(self.shape)

    def reset(self, seed=None, options=None):
        self.seed = seed or 0
        self.steps = 0
        return self.look(), {}

    def step(self, action):
        self.steps += 1
        observation = np.array(action) if self.echo else self.look()
        return observation, 0.5 * self.steps, self.steps >= self.length, False, {}
