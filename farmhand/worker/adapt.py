"""Adapts any environment's API to one: `reset(seed, options) -> (obs, info)` and `step(action) -> 5-tuple`.

    env = adapt(SomeEnv())
    observation, info = env.reset(seed=7, options=None)
    observation, reward, terminated, truncated, info = env.step(action)

What is told apart, and by what:

    gymnasium   inherits from gymnasium: its contract is taken at its word
    gym26       inherits from gym, and its own `reset` names both `seed` and `options`, but not `return_info`
    gym21       inherits from gym and does not; or from neither, has a `seed` method, and its `reset` takes no seed
    plain       anything else with `reset` and `step`

The module's name alone would not do: much that inherits from gym 0.26 today was written for gym 0.10, and much old code
inherits from nothing. So the signature of `reset` says how it is called, and what comes back says how it is read.

Runs unchanged on Python 2.7 to 3.13, with nothing but the standard library and numpy.
"""

import inspect
import sys

import numpy


class WrongAnswer(TypeError):
    """The environment's `reset` or `step` returned something that no known API returns."""


def adapt(env):
    """Chooses the adapter for an environment, by the table above.

    Raises:
        TypeError: the object has no `reset` or no `step`.
    """
    for name in ("reset", "step"):
        if not callable(getattr(env, name, None)):
            raise TypeError("a %s is no environment: it has no method %r" % (env.__class__.__name__, name))
    roots = set(cls.__module__.split(".")[0] for cls in inspect.getmro(env.__class__))
    if "gymnasium" in roots:
        return GymnasiumEnv(env)
    if "gym" in roots:
        modern = names(env, "seed") and names(env, "options") and not names(env, "return_info")
        return Gym26Env(env) if modern else Gym21Env(env)
    if callable(getattr(env, "seed", None)) and not takes(env, "seed"):
        return Gym21Env(env)
    return PlainEnv(env)


class GymnasiumEnv(object):
    """gymnasium: both answers have one form only, so another form is the environment's mistake."""

    api = "gymnasium"

    def __init__(self, env):
        self.env = env

    def reset(self, seed, options):
        answer = self.env.reset(seed=seed, options=options)
        if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], dict)):
            raise WrongAnswer("reset returned %s, not (observation, info)" % _form(answer))
        return answer

    def step(self, action):
        return five(self.env.step(action))

    def close(self):
        close = getattr(self.env, "close", None)
        if callable(close):
            close()


class Gym26Env(GymnasiumEnv):
    """gym 0.26: the same contract under the older name."""

    api = "gym26"


class PlainEnv(GymnasiumEnv):
    """Objects of no library: `reset` gets what its signature takes, and may or may not return an info."""

    api = "plain"

    def __init__(self, env):
        GymnasiumEnv.__init__(self, env)
        self._takes_seed = takes(env, "seed")
        self._takes_options = takes(env, "options")
        self._told = False

    def reset(self, seed, options):
        keywords = {}
        if self._takes_options:
            keywords["options"] = options
        elif options:
            raise TypeError("reset of this environment takes no options, got %r" % (options,))
        if self._takes_seed:
            keywords["seed"] = seed
        elif seed is not None:
            self._seed(seed)
        return pair(self.env.reset(**keywords), getattr(self.env, "observation_space", None))

    def _seed(self, seed):
        """Seeds an environment whose `reset` takes no seed; one without any way gets a line in the log, once."""
        if callable(getattr(self.env, "seed", None)):
            self.env.seed(seed)
        elif not self._told:
            self._told = True
            sys.stderr.write("worker: this environment takes no seed; its episodes cannot be repeated\n")


class Gym21Env(PlainEnv):
    """gym before 0.26, and what was written for it.

    `seed(n)` before `reset()`; from 0.22 on `reset` takes the seed itself. Its info is not asked for
    (`return_info`): not every wrapper of those versions passes it on.
    """

    api = "gym21"


def five(answer):
    """The five parts of a step, from five or four.

    With four, `done` alone does not say why: gym's TimeLimit notes a cut in the info, and everything else is the
    task's own end. The info itself is left as it is.
    """
    if isinstance(answer, (tuple, list)):
        if len(answer) == 5:
            observation, reward, terminated, truncated, info = answer
            return observation, reward, bool(terminated), bool(truncated), {} if info is None else info
        if len(answer) == 4:
            observation, reward, done, info = answer
            info = {} if info is None else info
            cut = bool(done) and isinstance(info, dict) and bool(info.get("TimeLimit.truncated", False))
            return observation, reward, bool(done) and not cut, cut, info
    raise WrongAnswer(
        "step returned %s, not (observation, reward, terminated, truncated, info)"
        " or (observation, reward, done, info)" % _form(answer)
    )


def pair(answer, space):
    """The two parts of a reset, from (observation, info) or the observation alone.

    A pair whose second part is a dict is taken for (observation, info), unless it is itself an observation of a
    Tuple space.
    """
    if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], dict):
        is_tuple = space is not None and any(cls.__name__ == "Tuple" for cls in inspect.getmro(space.__class__))
        if not is_tuple or isinstance(answer[0], tuple):
            return answer
    return answer, {}


def _form(answer):
    if isinstance(answer, (tuple, list)):
        return "a %s of %d (%s)" % (
            type(answer).__name__,
            len(answer),
            ", ".join(type(part).__name__ for part in answer[:6]),
        )
    return "a %s" % type(answer).__name__


def takes(env, keyword):
    """Whether `env.reset` takes this keyword.

    A wrapper whose `reset` is (self, **kwargs) hands everything on, so the environment inside it decides.
    """
    named, rest = _keywords(env.reset)
    inner = getattr(env, "env", None)
    if keyword in named or not rest:
        return keyword in named
    return takes(inner, keyword) if callable(getattr(inner, "reset", None)) else True


def names(env, keyword):
    """Like `takes`, but an innermost `reset(self, **kwargs)` does not count: it may do nothing with them."""
    named, rest = _keywords(env.reset)
    inner = getattr(env, "env", None)
    if keyword in named or not rest or not callable(getattr(inner, "reset", None)):
        return keyword in named
    return names(inner, keyword)


def takes_keyword(function, keyword):
    """Whether a function names this keyword itself."""
    return keyword in _keywords(function)[0]


def _keywords(function):
    """The names a function can be given by keyword, and whether it takes any others too."""
    if sys.version_info[0] == 2:
        try:
            spec = inspect.getargspec(function)
        except TypeError:
            return [], False
        return spec.args, spec.keywords is not None
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C: it tells nothing, so it is called with nothing
        return [], False
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = [parameter.name for parameter in parameters if parameter.kind in by_name]
    return named, any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def action_for(kind, dtype):
    """A function that gives an action the form its space asks for.

    A list becomes an array for a Box; an array without dimensions becomes a numpy int for a Discrete, which old
    environments use as an index. Everything else is passed on as it came.

    Args:
        kind: the action space's kind, as `describe.kind_of` names it.
        dtype: the dtype of a Box.
    """
    if kind == "box":
        return lambda action: numpy.asarray(action, dtype) if isinstance(action, (list, tuple)) else action
    if kind == "discrete":
        return lambda action: action[()] if isinstance(action, numpy.ndarray) and action.ndim == 0 else action
    return lambda action: action
