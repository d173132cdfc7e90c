"""The farms as a `VecEnv` of Stable-Baselines3: the one module here that imports it (`pip install 'simfarm[sb3]'`).

from farmer.sb3 import FarmVecEnv
envs = FarmVecEnv("Pendulum-v1", 8, farmlist=[("127.0.0.1", 8)])
SAC("MlpPolicy", VecMonitor(envs)).learn(10_000)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from farmer.episodes import Result
from farmer.vector import TIMEOUT, FarmVectorEnv, attribute, batched, unreachable


class FarmVecEnv(VecEnv):
    """Environments of one name, over all farms of a list, that begin anew within the step that ends an episode.

    An episode that is lost ends at its last good observation, with reward 0, "TimeLimit.truncated" and the reason
    under "lost" in its info.
    """

    def __init__(
        self,
        env: str,
        num_envs: int | None = None,
        farmlist: str | os.PathLike[str] | Iterable[Any] = "farmlist.py",
        timeout: float | None = TIMEOUT,
        key_file: str | os.PathLike[str] | None = None,
        ahead: int = 0,
    ):
        """Leases the slots; arguments and errors of `FarmVectorEnv`."""
        mode = AutoresetMode.SAME_STEP
        self.farm = FarmVectorEnv(env, num_envs, farmlist, mode, timeout, key_file=key_file, ahead=ahead)
        super().__init__(self.farm.num_envs, self.farm.single_observation_space, self.farm.single_action_space)

    def reset(self) -> VecEnvObs:
        """Begins an episode everywhere, with the seeds and options that were set for it; a step under way is left."""
        options = [one or None for one in self._options]
        results = self.farm.episodes.reset(range(self.num_envs), self._seeds, options, self.farm.timeout)
        self.reset_infos = [result.info for result in results]
        self._reset_seeds()
        self._reset_options()
        return self._observations(results)

    def step_async(self, actions: np.ndarray) -> None:
        """Gives every environment its action; errors of `FarmVectorEnv.send`."""
        self.farm.send(actions)

    def step_wait(self) -> VecEnvStepReturn:
        """What the actions led to; waits for the slowest. Errors of `FarmVectorEnv.step`."""
        results = self.farm.episodes.results(self.num_envs, self.farm.timeout, whole=True)
        rewards = np.array([result.reward for result in results], np.float32)
        dones = np.array([result.terminated or result.truncated for result in results])
        return self._observations(results), rewards, dones, [self._info(result) for result in results]

    def _info(self, result: Result) -> dict[str, Any]:
        ended = result.final_info is not None
        info = dict(result.final_info if ended else result.info)  # type: ignore[arg-type]
        info["TimeLimit.truncated"] = result.truncated and not result.terminated
        if ended:
            info["terminal_observation"] = result.final_obs
            self.reset_infos[result.slot] = result.info
        return info

    def _observations(self, results: list[Result]) -> Any:
        return batched(self.observation_space, [result.obs for result in results])

    def close(self) -> None:
        """Gives the slots back."""
        self.farm.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute that this side knows: spaces, spec, metadata, render_mode. Others raise NotOfAFarm."""
        return [attribute(self.farm, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Raises NotOfAFarm: a host cannot reach into an environment."""
        raise unreachable(attr_name, "set")

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **kwargs: Any
    ) -> list[Any]:
        """Raises NotOfAFarm: a host cannot reach into an environment."""
        raise unreachable(method_name, "called")

    def env_is_wrapped(self, wrapper_class: type[gymnasium.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """False: what wraps an environment at its farm does not show here."""
        return [False for _ in self._get_indices(indices)]

    def get_images(self) -> Sequence[np.ndarray | None]:
        """A farm sends no pictures."""
        raise NotImplementedError("a farm's environments are not rendered here: render_mode is None")
