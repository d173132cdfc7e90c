"""An environment that fails on command, to see what a set-up makes of it.

    python farm.py faulty --env-kwargs '{"fault": "segfault", "at_step": 50, "probability": 0.2}'
    python farm.py faulty --env-kwargs '{"fault": ["hang_in_c", "nan", "exit"], "probability": 0.1, "seed": 1}'

Three ways to choose a fault, each with the names of `FAULTS`:

    constructor     FaultyEnv(fault="nan", at="step", at_step=5, probability=1.0, ...): see there
    reset           reset(options={"fault": "segfault", "at_step": 3}): for this episode alone
    action          FaultyEnv(commands=True): the action's second number is the fault's, as `NUMBERS` has it; 0 is none

Where nothing is wrong it is a small honest environment that observes its own counters, so that who reads along can
prove that no transition was lost, doubled, swapped, or from another environment:

    observation   [who, episode, step, tag, action]
        who       a number of this very object, drawn when it was made (or given)
        episode   resets so far, from 1
        step      steps of this episode, from 0
        tag       `tag(seed)` of the seed that this episode was reset with; drawn where there was none
        action    the first number of the last action, as it arrived
    reward        the step's number
    info          the same by name, with "seed" and "pid"

All whole numbers stay below 2**24, so that float32 keeps them exactly. An episode ends by itself, truncated, after
`length` steps.

The worker loads this file in the simulator's Python: it runs on 2.7 to 3.13 with numpy alone, and imports nothing of
this project.
"""

import ctypes
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np

MOST = 2**24  #: float32 holds every whole number up to here
EVER = 3600.0  #: seconds that a hang lasts

#: What an environment can do wrong, and how. "on" means: from `at_step` on, in every step of the episode.
FAULTS = {
    "hang_in_c": "blocks in a C function that a Python signal does not end; other threads go on",
    "hang_with_gil": "blocks in a C function that holds the interpreter's lock: no thread of this process goes on",
    "spin": "computes for ever in Python",
    "stop": "stops its own process (SIGSTOP)",
    "slow": "takes `seconds` longer, from then on",
    "segfault": "reads address 0",
    "abort": "calls C's abort",
    "kill": "sends itself SIGKILL, as the kernel does when memory is out",
    "exit": "leaves by os._exit(7)",
    "raise": "raises a RuntimeError",
    "raise_odd": "raises what is no Exception (on Python 2, an object of an old class)",
    "raise_exit": "raises SystemExit, as sys.exit does",
    "raise_interrupt": "raises KeyboardInterrupt",
    "raise_unpicklable": "raises an error that cannot be pickled and has no text: its __str__ raises as well",
    "recurse": "calls itself without an end",
    "leak": "keeps `megabytes` more of memory, touched, from then on",
    "print": "prints text and bytes that are no text, to stdout and beneath it, from then on",
    "grandchild": "starts a program that outlives it",
    "close_pipes": "closes every file descriptor from 3 on, ours too",
    "nan": "returns NaN in its observation",
    "inf": "returns an infinity in its observation",
    "out_of_bounds": "returns an observation far out of its bounds",
    "wrong_shape": "returns an observation with a number too many",
    "wrong_dtype": "returns an observation of texts",
    "no_array": "returns None for an observation",
    "unsendable": "returns an object for an observation",
    "nan_reward": "returns a reward of NaN",
    "wrong_reward": "returns two rewards",
    "wrong_answer": "returns two values instead of five",
}
NAMES = sorted(FAULTS)
#: The second number of an action with `commands`.
NUMBERS = dict((name, number) for number, name in enumerate(NAMES, 1))


class Box(object):
    """Looks like gym's Box: it is the name and these four that count."""

    def __init__(self, low, high):
        self.dtype = np.dtype("float32")
        self.low = np.asarray(low, self.dtype)
        self.high = np.asarray(high, self.dtype)
        self.shape = self.low.shape


def tag(seed):
    """What an episode with this seed observes as its tag: 24 bits that differ even for neighbouring seeds."""
    return (int(seed) * 2654435761 % 2**32) >> 8


class FaultyEnv(object):
    """The environment; the module's text has the rest."""

    metadata = {"faults": NAMES}

    def __init__(
        self,
        fault=None,
        at="step",
        at_step=1,
        at_episode=None,
        probability=1.0,
        only_if=None,
        seed=None,
        length=100,
        takes=0.0,
        seconds=0.5,
        megabytes=1.0,
        commands=False,
        who=None,
    ):
        """Makes it; fails here if that is what is asked for.

        Args:
            fault: a name of FAULTS, or a list of them: each time one is drawn. None: an honest environment.
            at: "step", "reset" or "construct".
            at_step: the step of an episode at which it happens, from 1.
            at_episode: the episode of this object in which it happens; None is each.
            probability: of the fault in each of those places; below 1, of a step means each one from `at_step` on.
            only_if: the path of a file: nothing happens while it is not there, so a farm can start well and fail later.
            seed: of the draws, together with the seed of each reset: the same two draw the same, so a black box comes
                again, and no two episodes or slots are alike. None, a reset without a seed, and the constructor's own
                fault draw anew each time: a seed alone would begin with the same draws in every environment built.
            length: steps of an episode.
            takes: seconds of an honest step.
            seconds, megabytes: how much a slow one slows down and a leaking one leaks.
            commands: whether actions have a second number, that of a fault.
            who: instead of the number drawn for this object.
        """
        for name in _names(fault):
            if name not in FAULTS:
                raise ValueError("no fault %r; there are: %s" % (name, ", ".join(NAMES)))
        if at not in ("step", "reset", "construct"):
            raise ValueError("at=%r; a fault is at a step, reset or construct" % (at,))
        self._plan = {"fault": fault, "at_step": at_step, "probability": probability}
        self._at, self._at_episode, self._only_if = at, at_episode, only_if
        self._length, self._takes, self._seconds, self._megabytes = length, takes, seconds, megabytes
        self._commands = commands
        self._seed = None if seed is None else int(seed)
        self._random = random.Random()
        self._kept = []  # what a leak keeps
        self._on = None  # the fault that is on for the rest of the episode
        self._now = self._plan
        self.who = random.SystemRandom().randrange(1, MOST) if who is None else who
        self.episode = self.steps = 0
        self.seed_given = self._tag = None
        self.observation_space = Box([0, 0, 0, 0, -1], [MOST] * 4 + [1])
        self.action_space = Box([-1, 0], [1, len(NAMES)]) if commands else Box([-1], [1])
        if at == "construct":
            self._maybe(self._plan, probability)

    def reset(self, seed=None, options=None):
        self.episode += 1
        self.steps = 0
        self._on = None
        self.seed_given = seed
        self._tag = random.SystemRandom().randrange(MOST) if seed is None else tag(seed)
        is_drawn_anew = seed is None or self._seed is None
        self._random = random.Random() if is_drawn_anew else random.Random((self._seed << 32) ^ int(seed))
        options = options or {}
        self._now = dict(self._plan, **dict((key, options[key]) for key in self._plan if key in options))
        is_told = "fault" in options
        happened = None
        if self._at == "reset" and self._is_meant() or is_told and options.get("at") == "reset":
            happened = self._maybe(self._now, self._now["probability"])
        self._may_fail_later = is_told and options.get("at") != "reset" or self._at == "step" and self._is_meant()
        return self._answer(happened, 0.0, (self._info(),))

    def step(self, action):
        self.steps += 1
        numbers = np.asarray(action).reshape(-1)
        time.sleep(self._takes)
        happened = None
        if self._commands and numbers[1] >= 0.5:
            happened = self._do(NAMES[int(round(float(numbers[1]))) - 1])
        elif self._on is not None:
            happened = self._do(self._on)
        elif self._is_due():
            happened = self._maybe(self._now, self._now["probability"])
        rest = (float(self.steps), False, self.steps >= self._length, self._info())
        return self._answer(happened, float(numbers[0]), rest)

    def close(self):
        del self._kept[:]

    # ---- when ----

    def _is_meant(self):
        return self._at_episode in (None, self.episode)

    def _is_due(self):
        at_step, always = self._now["at_step"], self._now["probability"] >= 1.0
        return self._may_fail_later and (self.steps == at_step if always else self.steps >= at_step)

    def _maybe(self, plan, probability):
        names = _names(plan["fault"])
        if not names or (self._only_if is not None and not os.path.exists(self._only_if)):
            return None
        if self._random.random() >= probability:
            return None
        return self._do(self._random.choice(names))

    # ---- what ----

    def _do(self, name):
        """Does it. What only shows in the answer is left to `_answer`; returns its name."""
        if name in ("slow", "leak", "print"):
            self._on = name
        does = getattr(self, "_" + name, None)
        if does is not None:
            does()
        return name

    def _answer(self, happened, action, rest):
        observation = np.array([self.who, self.episode, self.steps, self._tag, action], "float32")
        if happened == "nan":
            observation[2] = np.nan
        elif happened == "inf":
            observation[4] = np.inf
        elif happened == "out_of_bounds":
            observation[4] = 1000.0
        elif happened == "wrong_shape":
            observation = np.append(observation, observation[:1])
        elif happened == "wrong_dtype":
            observation = observation.astype("U20")
        elif happened == "no_array":
            observation = None
        elif happened == "unsendable":
            observation = self
        elif happened == "nan_reward" and len(rest) == 4:
            rest = (float("nan"),) + rest[1:]
        elif happened == "wrong_reward" and len(rest) == 4:
            rest = ([1.0, 2.0],) + rest[1:]
        elif happened == "wrong_answer":
            return observation, 0.0
        return (observation,) + rest

    def _info(self):
        return {
            "who": self.who,
            "episode": self.episode,
            "step": self.steps,
            "tag": self._tag,
            "seed": self.seed_given,
            "pid": os.getpid(),
        }

    def _hang_in_c(self):
        _hang(ctypes.CDLL(None))

    def _hang_with_gil(self):
        _hang(ctypes.PyDLL(None))

    def _spin(self):
        end = time.time() + EVER
        while time.time() < end:
            pass

    def _stop(self):
        os.kill(os.getpid(), signal.SIGSTOP)

    def _slow(self):
        time.sleep(self._seconds)

    def _segfault(self):
        ctypes.string_at(0)

    def _abort(self):
        ctypes.CDLL(None).abort()

    def _kill(self):
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(EVER)  # it comes at once, but not within this very instruction

    def _exit(self):
        os._exit(7)

    def _raise(self):
        raise RuntimeError("asked to raise in step %d of episode %d" % (self.steps, self.episode))

    def _raise_odd(self):
        raise _Odd("asked to raise what is no Exception")

    def _raise_exit(self):
        sys.exit("asked to leave")

    def _raise_interrupt(self):
        raise KeyboardInterrupt("asked to interrupt")

    def _raise_unpicklable(self):
        raise _Unpicklable(lambda: None)

    def _recurse(self):
        self._recurse()

    def _leak(self):
        self._kept.append(bytearray(os.urandom(4096) * int(self._megabytes * 256)))

    def _print(self):
        print("rubbish of the simulator's, step %d" % self.steps)
        sys.stdout.flush()
        os.write(1, bytes(bytearray(range(256))) * 4 + b"\n")
        os.write(2, b"\xff\xfe and on stderr, without an end")

    def _grandchild(self):
        # With its own ears shut to everything but SIGKILL.
        code = "import signal, time; [signal.signal(s, signal.SIG_IGN) for s in (1, 2, 15)]; time.sleep(%r)" % EVER
        subprocess.Popen([sys.executable, "-c", code])

    def _close_pipes(self):
        os.closerange(3, 1024)


def _names(fault):
    if fault is None:
        return []
    return list(fault) if isinstance(fault, (list, tuple)) else [fault]


def _hang(library):
    end = time.time() + EVER
    while time.time() < end:  # a signal ends the call, and not the hang
        library.sleep(ctypes.c_uint(int(EVER)))


class _Unpicklable(Exception):
    def __str__(self):
        raise ValueError("an error without a text")

    def __reduce__(self):
        raise TypeError("an error that cannot be pickled")


if sys.version_info[0] == 2:

    class _Odd:  # of the old kind: it inherits from nothing
        def __init__(self, text):
            self.text = text

        def __str__(self):
            return self.text

else:

    class _Odd(BaseException):
        pass
