"""Two muscle-driven bodies of osim-rl, for a farm's worker: `L2M2019` walks, `Arm2D` reaches.

    make osim
    python farm.py osim:L2M2019 --slots 2 --python .venv-osim/bin/python

The worker loads this file by its path in the simulator's own Python, so it imports numpy and the simulator and
nothing of this project. Written for osim-rl 3.0.11 on opensim 4.6, whose installed files stay as they are.
What has to differ from osim-rl is overridden here, and each place says why:

- `_Model`: a muscle's controller is named; osim-rl numbers it, which opensim 4.6 no longer takes.
- `_Quiet`: opensim logs errors only (it says about ten lines a step), and osim-rl's prints are held back.
- `_Episode.reset`: a seed of 0 is a seed, and the arm's first observation shows the target it is to reach.
- `_Episode.step`: the time limit truncates; osim-rl says "done" for it as it does for a fall.
"""

from __future__ import annotations

import contextlib
import io
import random

import gym
import numpy as np
import opensim

# The folder of this file must not come before site-packages on sys.path, or `osim` would be this file.
from osim.env import Arm2DVecEnv, L2M2019Env
from osim.env.osim import OsimEnv, OsimModel, Spec

opensim.Logger.setLevelString("error")

# osim-rl's own limit pays a bonus that reads a variable it has not set (UnboundLocalError at difficulty 0, 1
# and 2, when the body still stands), so its limit is put where no episode gets to.
_NEVER = 10**9


def L2M2019(
    difficulty: int = 3,
    model: str = "3D",
    max_episode_steps: int | None = None,
    integrator_accuracy: float = 5e-5,
    visualize: bool = False,
) -> _Episode:
    """A body of 75 kg with 22 leg muscles that is to follow a map of target velocities (NeurIPS 2019, Learn to Move).

    Observation, float32 (339,): 242 values of the target velocity around the body, 2 x 11 x 11, in m/s; then the
    pelvis (height in m, pitch and roll in rad, velocity in m/s, angular velocity in rad/s); then for the right and
    the left leg the ground's push in body weights, 4 joint angles in rad, 4 joint velocities in rad/s, and for each
    of 11 muscles force, length and speed as parts of its own greatest force and optimal length.
    Without bounds: osim-rl gives some, but a body whose muscles rest leaves them (two speeds), and clips nothing.

    Action, float32 (22,) in [0, 1]: the muscles' excitations, right leg first, each HAB HAD HFL GLU HAM RF VAS BFSH
    GAS SOL TA. osim-rl clips what lies outside. One step is 0.01 s of simulated time.

    Reward: 0.1 for each step on its feet; at each new footstep 10 times the time since the last one, less the
    distance from the target velocity and less the effort (squared activations) that it took; at difficulty 3 also
    500 when the body has stayed at a target. osim-rl's bonus for reaching the time limit is not paid:
    a time limit is where we stop looking, and a learner bootstraps there.

    An episode ends (terminated) when the pelvis is lower than 0.6 m, and is cut off (truncated) at the limit.

    Args:
        difficulty: 0 walk ahead at 1.4 m/s; 1 targets ahead; 2 targets within 90 degrees; 3 two targets anywhere.
        model: "3D", or "2D" where the body cannot tip sideways.
        max_episode_steps: None for osim-rl's own: 1000, and 2500 at difficulty 3.
        integrator_accuracy: opensim's error limit; larger is faster and rougher.
        visualize: open the windows of opensim and matplotlib; needs a screen.

    Raises:
        ValueError: an unknown difficulty or model, or a limit under 1 step.
    """
    if model not in ("2D", "3D"):
        raise ValueError(f"model must be '2D' or '3D', got {model!r}")
    if difficulty not in (0, 1, 2, 3):
        raise ValueError(f"difficulty must be 0, 1, 2 or 3, got {difficulty!r}")
    with _Quiet():
        env = _Walker(model, visualize=visualize, integrator_accuracy=integrator_accuracy, difficulty=difficulty)
    return _Episode(env, max_episode_steps)


def Arm2D(
    max_episode_steps: int | None = None,
    integrator_accuracy: float = 5e-5,
    visualize: bool = False,
) -> _Episode:
    """An arm in the vertical plane with 6 muscles, whose wrist is to reach a point.

    Observation, float32 (16,), without bounds: the target (x, y) in m; angle, velocity and acceleration of the
    shoulder and of the elbow, in rad, rad/s and rad/s^2; six activations in [0, 1]; the wrist (x, y) in m.
    Accelerations reach thousands, where all else stays near 1: normalise them.

    Action, float32 (6,) in [0, 1]: the muscles' excitations. One step is 0.01 s of simulated time.

    Reward: 1 less the squared distance (m^2) from the wrist to the target, so at most 1 a step.

    An episode has 200 steps and is then cut off (truncated). It ends (terminated) only where opensim gives a NaN,
    which osim-rl replaces by 0 in the observation.

    Args:
        max_episode_steps: None for osim-rl's own: 200.
        integrator_accuracy: opensim's error limit; larger is faster and rougher.
        visualize: open opensim's window; needs a screen.

    Raises:
        ValueError: a limit under 1 step.
    """
    with _Quiet():
        env = _Arm(visualize=visualize, integrator_accuracy=integrator_accuracy)
    return _Episode(env, max_episode_steps)


class _Episode:
    """One osim-rl environment behind the five-value interface: `reset`, `step`, `close` and two spaces."""

    def __init__(self, env: OsimEnv, max_episode_steps: int | None) -> None:
        limit = env.time_limit if max_episode_steps is None else max_episode_steps
        if limit < 1:
            raise ValueError(f"max_episode_steps must be at least 1, got {max_episode_steps!r}")
        env.spec.timestep_limit = _NEVER
        self.max_episode_steps = limit
        self.observation_space = _box(-np.inf, np.inf, env.get_observation_space_size())
        self.action_space = _box(0.0, 1.0, env.get_action_space_size())
        self._env = env
        self._steps = 0

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Stand the body up and draw its targets; the same seed draws the same targets.

        osim-rl draws from numpy's and Python's global generators, so two environments in one process share them.
        Its own `seed=` takes 0 for "none", and the arm has no seed at all.
        """
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)
        with _Quiet():
            self._env.reset(obs_as_dict=False)
        self._steps = 0
        # Asked again, because the arm's own reset builds this before it draws the target: what it gives back
        # shows the target of the episode before.
        return self._row(self._env.get_observation()), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Hold the excitations `action` for 0.01 s of simulated time."""
        obs, reward, done, info = self._env.step(np.asarray(action), obs_as_dict=False)
        self._steps += 1
        terminated = bool(done)
        truncated = not terminated and self._steps >= self.max_episode_steps
        return self._row(obs), float(reward), terminated, truncated, info

    def close(self) -> None:
        """Let go of the model; opensim frees its memory with it."""
        self._env = None

    @staticmethod
    def _row(values: list[float]) -> np.ndarray:
        return np.array(values, dtype=np.float32)


class _Model(OsimModel):
    """osim-rl's model, with each muscle's controller named and the lists of forces its own."""

    def __init__(self, model_path: str, visualize: bool, integrator_accuracy: float = 5e-5) -> None:
        self.integrator_accuracy = integrator_accuracy
        self.model = opensim.Model(model_path)
        self.model_state = self.model.initSystem()
        self.model.setUseVisualizer(visualize)
        self.muscleSet = self.model.getMuscles()
        self.forceSet = self.model.getForceSet()
        self.bodySet = self.model.getBodySet()
        self.jointSet = self.model.getJointSet()
        self.markerSet = self.model.getMarkerSet()
        self.contactGeometrySet = self.model.getContactGeometrySet()
        self.noutput = self.muscleSet.getSize()
        # Class attributes in osim-rl, where every further model in a process makes them longer.
        self.maxforces, self.curforces = [], []
        self.brain = opensim.PrescribedController()
        for muscle in (self.muscleSet.get(i) for i in range(self.noutput)):
            self.brain.addActuator(muscle)
            # By its name; osim-rl gives its index, which opensim 4.6 refuses.
            self.brain.prescribeControlForActuator(muscle.getName(), opensim.Constant(1.0))
            self.maxforces.append(muscle.getMaxIsometricForce())
            self.curforces.append(1.0)
        self.model.addController(self.brain)
        self.model_state = self.model.initSystem()


class _OnOurModel(OsimEnv):
    """Stands behind osim-rl's classes in the order of bases, so that their `load_model` finds ours."""

    def load_model(self, model_path: str | None = None) -> None:
        self.model_path = model_path or self.model_path
        self.osim_model = _Model(self.model_path, self.visualize, self.integrator_accuracy)
        self.spec = Spec()


class _Walker(L2M2019Env, _OnOurModel):
    """The walking body, on our model, in 2D or 3D, with feet of its own."""

    def __init__(self, model: str, **kwargs: object) -> None:
        self.model = model
        # A class attribute in osim-rl: all bodies in a process would share one pair of feet.
        self.footstep = dict(L2M2019Env.footstep)
        super().__init__(**kwargs)


class _Arm(Arm2DVecEnv, _OnOurModel):
    """The arm, on our model."""


class _Quiet(contextlib.redirect_stdout):
    """osim-rl prints its difficulty at the start and every target of the arm; a slot's log is for what matters."""

    def __init__(self) -> None:
        super().__init__(io.StringIO())


def _box(low: float, high: float, size: int) -> gym.spaces.Box:
    return gym.spaces.Box(low, high, (size,), np.float32)
