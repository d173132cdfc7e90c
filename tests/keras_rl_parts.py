"""keras-rl's own loop as an oracle: the same script through it and through ours, with every call on one tape.

    theirs, ours = both("fit", script, nb_steps=12)

The script is deterministic and its numbers are multiples of 1/8, so sums in float32 and in Python's floats agree.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import rl.callbacks
import rl.core

from agents import Agent
from agents.keras_rl.callbacks import CallbackList


def plain(value):
    """The value as something to compare and to print: numbers as floats, arrays as tuples."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(plain(one) for one in value)
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (bool, int, float, np.generic)):
        return round(float(value), 6)
    return value


class Space:
    """A Box for both: sampled by numpy's global generator, which the tests seed."""

    shape = (2,)
    low, high = np.full(2, -4.0, np.float32), np.full(2, 4.0, np.float32)

    def __init__(self, tape):
        self.tape = tape

    def sample(self):
        action = np.random.randint(-8, 9, 2) / 8
        self.tape.append(("sample", plain(action)))
        return action


class Scripted:
    """gym's former API: observes [episode, step]; episode i ends by itself after `lengths[i]` steps."""

    def __init__(self, tape, lengths, info):
        self.tape, self.lengths, self.info = tape, lengths, info
        self.action_space = Space(tape)
        self.observation_space = SimpleNamespace(shape=(2,))
        self.episode, self.made, self.seen = -1, 0, np.zeros(2)

    def reset(self):
        self.episode, self.made = self.episode + 1, 0
        self.tape.append(("env.reset",))
        return self._observe()

    def step(self, action):
        self.made += 1
        self.tape.append(("env.step", plain(action)))
        done = self.made >= self.lengths[self.episode % len(self.lengths)]
        return self._observe(), self.made / 8 + self.episode, done, self.info(self.made, done)

    def render(self, mode="human", close=False):
        self.tape.append(("env.render", mode))

    def close(self):
        pass

    def _observe(self):
        self.seen[:] = self.episode, self.made  # one array for ever: whoever keeps it must copy it
        return self.seen


class Taped(rl.callbacks.Callback):
    """Every callback with what it was told; `at` (event, count) is where Ctrl-C comes."""

    def __init__(self, tape, at=None):
        super().__init__()
        self.tape, self.at, self.counts = tape, at, {}

    def _note(self, name, *told):
        self.tape.append((name, *(plain(one) for one in told)))
        self.counts[name] = self.counts.get(name, 0) + 1
        if self.at == (name, self.counts[name]):
            raise KeyboardInterrupt

    def on_train_begin(self, logs=None):
        self._note("on_train_begin", dict(self.params), self.env is not None, self.model.compiled)

    def on_train_end(self, logs=None):
        self._note("on_train_end", logs or {})

    def on_episode_begin(self, episode, logs=None):
        self._note("on_episode_begin", episode, logs or {})

    def on_episode_end(self, episode, logs=None):
        self._note("on_episode_end", episode, logs or {})

    def on_step_begin(self, step, logs=None):
        self._note("on_step_begin", step, logs or {})

    def on_step_end(self, step, logs=None):
        self._note("on_step_end", step, logs or {})

    def on_action_begin(self, action, logs=None):
        self._note("on_action_begin", action, logs or {})

    def on_action_end(self, action, logs=None):
        self._note("on_action_end", action, logs or {})


class TapedProcessor(rl.core.Processor):
    """Changes all that it is given, and says in which order it was asked."""

    def __init__(self, tape):
        self.tape = tape

    def process_step(self, observation, reward, done, info):
        self.tape.append(("process_step", plain(observation), plain(reward), bool(done), plain(info)))
        return super().process_step(observation, reward, done, info)

    def process_observation(self, observation):
        self.tape.append(("process_observation", plain(observation)))
        return np.append(observation, 0.5)

    def process_reward(self, reward):
        self.tape.append(("process_reward", plain(reward)))
        return reward * 2

    def process_info(self, info):
        self.tape.append(("process_info", plain(info)))
        return dict(info, seen=1)

    def process_action(self, action):
        self.tape.append(("process_action", plain(action)))
        return np.asarray(action) / 2


class _Acting:
    """What both agents do: the n-th action is n eighths, the n-th metric n."""

    metrics_names = ("loss", "mean_q")
    compiled = True

    def __init__(self, tape, processor):
        super().__init__(processor)
        self.tape, self.asked, self.taught = tape, 0, 0

    def _next_action(self, observation):
        self.tape.append(("forward", plain(observation), bool(self.training)))
        self.asked += 1
        return np.array([self.asked % 24 / 8, -1.0])

    def _next_metrics(self):
        if not self.training:
            return [np.nan, np.nan]
        self.taught += 1
        return [float(self.taught), 0.5]


class TheirAgent(_Acting, rl.core.Agent):
    """In keras-rl's loop. Its forward and backward after an episode's end, which only fill its memory, are left out."""

    _closing = False

    def forward(self, observation):
        return None if self._closing else self._next_action(observation)

    def backward(self, reward, terminal):
        if self._closing:
            self._closing = False
            return [np.nan, np.nan]
        if self.training:
            self.tape.append(("backward", plain(reward), bool(terminal)))
        self._closing = bool(terminal)
        return self._next_metrics()

    def reset_states(self):
        self._closing = False


class OurAgent(_Acting, Agent):
    """In our loop."""

    def act(self, states, slots):
        return np.stack([self._next_action(state[-1]) for state in states])

    def remember(self, episode, reward, next_obs, terminated, truncated):
        self.tape.append(("backward", plain(reward), bool(terminated or truncated)))

    def learn(self, steps, nb_slots):
        return self._next_metrics()


@dataclass
class Script:
    """What happens: how the environment goes, who takes part, where Ctrl-C comes."""

    lengths: tuple[int, ...] = (5, 3)
    info: object = staticmethod(lambda step, done: {"x": step / 8, "n": 1})
    processor: bool = False
    policy: bool = False
    interrupt: tuple[str, int] | None = None
    processor_type: type = TapedProcessor
    also: tuple = field(default_factory=tuple)  #: further callbacks, made anew for each run


@dataclass
class Run:
    tape: list
    history: dict
    epochs: list
    text: str
    agent: object
    env: object
    warned: list


def both(method, script=None, **keywords):
    """The script through keras-rl's loop and through ours."""
    script = script or Script()
    kept, rl.core.CallbackList = rl.core.CallbackList, CallbackList  # theirs asks Keras 3's callbacks for old methods
    try:
        theirs = _run(TheirAgent, method, script, keywords)
    finally:
        rl.core.CallbackList = kept
    return theirs, _run(OurAgent, method, script, keywords)


def _run(kind, method, script, keywords):
    np.random.seed(5)
    tape = []
    env = Scripted(tape, script.lengths, script.info)
    agent = kind(tape, script.processor_type(tape) if script.processor else None)

    def policy(observation):
        tape.append(("start_step_policy", plain(observation)))
        return np.array([-0.25, 0.25])

    if script.policy:
        keywords = dict(keywords, start_step_policy=policy)
    callbacks = [Taped(tape, script.interrupt), *(make() for make in script.also)]
    text = io.StringIO()
    with contextlib.redirect_stdout(text), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        history = getattr(agent, method)(env, callbacks=callbacks, **keywords)
    assert len(callbacks) == 1 + len(script.also), "the caller's list was changed"
    words = [str(one.message) for one in warned]
    return Run(tape, plain(history.history), list(history.epoch), _timeless(text.getvalue()), agent, env, words)


def _timeless(text):
    """Without what a clock said, and with one redraw of keras's progress bar."""
    text = re.sub(r"took [\d.]+ seconds", "took T seconds", text)
    text = re.sub(r"duration: [\d.]+s", "duration: Ts", text)
    text = re.sub(r"steps per second: +\d+", "steps per second: N", text)
    return re.sub(r"- (ETA: [\d:]+s?|\d+m?s( \d+[mu]?s/step)?)", "- T", re.sub(r"[^\n]*[\r\b]", "", text))


def common(theirs, ours):
    """Our event with no more in its logs than theirs has: `slot` and `farm` come on top."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return {key: common(theirs[key], ours[key]) for key in theirs if key in ours}
    if isinstance(theirs, tuple) and isinstance(ours, tuple) and len(theirs) == len(ours):
        return tuple(common(one, other) for one, other in zip(theirs, ours, strict=True))
    return ours


def same(theirs, ours, only=None):
    """Fails at the first event that differs, with what came before it."""
    tapes = [[event for event in run.tape if only is None or event[0] in only] for run in (theirs, ours)]
    for number in range(max(map(len, tapes))):
        one, other = (tape[number] if number < len(tape) else ("nothing more",) for tape in tapes)
        if repr(one) != repr(common(one, other)):  # NaN is equal to itself in words only
            before = "\n  ".join(map(repr, tapes[0][max(0, number - 5) : number]))
            raise AssertionError(f"after\n  {before}\nkeras-rl: {one}\nours:     {other}")
