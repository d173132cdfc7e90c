"""All slots of the farms as one `gymnasium.vector.VectorEnv`.

envs = farmer.make_vec("Pendulum-v1", 8, farmlist=[("127.0.0.1", 8)])
observations, infos = envs.reset(seed=1)
observations, rewards, terminations, truncations, infos = envs.step(actions)

On the same object, without a barrier:

envs.send(actions, slots)
ready = envs.recv(min_ready=1)  # whoever is ready: ready.slots, ready.observations, ...
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
from gymnasium import Space
from gymnasium.error import ClosedEnvironmentError
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate

from farmer.arguments import check_seeds, check_whole, refuse_unknown
from farmer.episodes import Episodes, Result
from farmer.pool import Farmer
from farmer.registry import spec_of
from wire.errors import BadAction, FarmError, NoFreeSlot, NotOfAFarm

TIMEOUT = 600.0  #: s that one reset or step may take, and a farm be away


class Ready(NamedTuple):
    """What `recv` gives: the slots that are ready, and as first axis of everything else these, n."""

    slots: np.ndarray  # int64 (n,)
    observations: Any
    rewards: np.ndarray  # float64 (n,)
    terminations: np.ndarray  # bool (n,)
    truncations: np.ndarray  # bool (n,)
    infos: dict[str, Any]


def make_vec(
    env: str,
    num_envs: int | None = None,
    farmlist: str | os.PathLike[str] | Iterable[Any] = "farmlist.py",
    autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
    timeout: float | None = TIMEOUT,
    max_episode_steps: int | None = None,
    key_file: str | os.PathLike[str] | None = None,
    ahead: int = 0,
    **unknown: NoReturn,
) -> FarmVectorEnv:
    """Leases slots of the farms as one vector environment; arguments and errors of `FarmVectorEnv`."""
    refuse_unknown("make_vec", unknown)
    return FarmVectorEnv(env, num_envs, farmlist, autoreset_mode, timeout, max_episode_steps, key_file, ahead)


class FarmVectorEnv(VectorEnv[Any, Any, np.ndarray]):
    """Environments of one name, over all farms of a list.

    `reset` and `step` are those of gymnasium's AsyncVectorEnv, in all three autoreset modes. An episode that is lost
    (its worker crashed, its farm is gone) ends as truncated at its last good observation, with reward 0 and the reason
    in `infos["lost"]`; such a step is no transition. docs/vector.md says the rest.

    Attributes:
        autoreset_mode: as in `metadata["autoreset_mode"]`.
        timeout: seconds that one reset or step may take; may be set.
        episodes: the same without batches, for an interface of another kind.
    """

    def __init__(
        self,
        env: str,
        num_envs: int | None = None,
        farmlist: str | os.PathLike[str] | Iterable[Any] = "farmlist.py",
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        timeout: float | None = TIMEOUT,
        max_episode_steps: int | None = None,
        key_file: str | os.PathLike[str] | None = None,
        ahead: int = 0,
    ):
        """Leases the slots.

        Args:
            env: a name from the farms' catalogs.
            num_envs: how many, on the fastest farms as far as they have told, and on equally fast ones in proportion to
                their slots; None takes all of the list that are free.
            farmlist: path of a farmlist.py, or pairs of (address, slots).
            autoreset_mode: when an episode begins that follows another one; also "NextStep", "SameStep", "Disabled".
            timeout: seconds that one reset or step may take, and a farm be away; None is for ever.
            max_episode_steps: a time limit of this side's, beside the environment's own.
            key_file: the farms' key, as for `Farmer`.
            ahead: slots more, in which next episodes wait already reset, so that an end costs no reset; with the price
                that which environment a row goes on in depends on time. 0 under DISABLED.

        Raises:
            FarmlistError, FarmUnreachable, FarmRefused: as `Farmer`.
            NoFreeSlot: fewer slots are free than were asked for.
            ValueError, TypeError: a number of environments, steps or slots that makes no sense.
        """
        self.closed = True  # until there is something to close: gymnasium before 1.3 closes what failed in here, too
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        if num_envs is not None:
            check_whole("num_envs", num_envs, 1, "or None for all that are free")
        if max_episode_steps is not None:
            check_whole("max_episode_steps", max_episode_steps, 1, "or None for no limit of this side's")
        check_whole("ahead", ahead, 0)
        if ahead and self.autoreset_mode is AutoresetMode.DISABLED:
            raise ValueError("ahead=%d: under DISABLED no episode begins by itself, so none can wait" % ahead)
        source = farmlist if isinstance(farmlist, (str, os.PathLike)) else list(farmlist)
        slots = None if num_envs is None else num_envs + ahead
        self._pool = Farmer(env, source, slots=slots, key_file=key_file)
        try:
            self._describe(slots, ahead)
        except BaseException:
            self._pool.close()
            raise
        self._env = env
        self.timeout = timeout
        self.spec = spec_of(env, farmlist=source, num_envs=self.num_envs, autoreset_mode=self.autoreset_mode.value)
        self.spec.max_episode_steps = max_episode_steps
        if ahead:
            self.spec.kwargs["ahead"] = ahead
        self.episodes = Episodes(self._pool, self.num_envs, self.autoreset_mode, max_episode_steps, ahead)
        # As gymnasium promises: also who forgets `close` gives the slots back, at the latest when Python ends.
        self._closing = weakref.finalize(self, self._pool.close)
        self.closed = False

    def _describe(self, slots: int | None, ahead: int) -> None:
        there = self._pool.nb_slots
        if there < (ahead + 1 if slots is None else slots):
            asked = "%d slots ahead" % ahead if slots is None else "%d slots" % slots
            raise NoFreeSlot(
                "%s were asked for, and %d are free on the farms that answered\n"
                "  now: want fewer, or wait until other hosts leave: %s" % (asked, there, self._pool.status())
            )
        there -= ahead
        observation, action = self._pool.observation_space, self._pool.action_space
        if observation is None or action is None:
            raise FarmError("%s has no observation_space or no action_space; a VectorEnv needs both" % self._pool.env)
        self.num_envs = there
        self.single_observation_space, self.single_action_space = observation, action
        self.observation_space, self.action_space = batch_space(observation, there), batch_space(action, there)
        self.metadata = dict(self._pool.metadata, autoreset_mode=self.autoreset_mode)
        self.render_mode = None

    # The verbs of a VectorEnv.

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Begins an episode in every slot, or in those of `options["reset_mask"]`, whatever they were doing.

        Args:
            seed: an int for seed, seed + 1, ...; or one for each slot.
            options: for the environments; `reset_mask`, bool (num_envs,), is not passed on.

        Returns:
            Observations of all slots, infos of those that were reset.

        Raises:
            TypeError: a seed that is no whole number.
            EnvironmentFault: an environment's reset failed three times in a row.
            FarmTimeout: a farm was away for longer than `timeout`, or a reset took longer.
        """
        self._check_open()
        if isinstance(seed, (int, np.integer)):
            super().reset(seed=int(seed))
        seeds = self._seeds(seed)
        mask, options = self._mask(options)
        slots = np.flatnonzero(mask).tolist()
        results = self.episodes.reset(slots, [seeds[slot] for slot in slots], [options] * len(slots), self.timeout)
        infos: dict[str, Any] = {}
        for result in results:
            self._add_info(infos, result.info, result.slot)
        observations = [self.episodes.obs(slot) for slot in range(self.num_envs)]
        return batched(self.single_observation_space, observations), infos

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One action for every slot, and what they led to; waits for the slowest.

        Raises:
            BadAction: a wrong number, shape or dtype, or NaN; nothing was sent.
            ResetNeeded, BadSlot: a slot has no episode, or an action under way; nothing was sent.
            FarmTimeout: a slot gave no result within `timeout`. `recv` goes on waiting, `reset` begins anew.
        """
        self._check_open()
        self._act(actions, range(self.num_envs), soon=True)
        return self._columns(self.episodes.results(self.num_envs, self.timeout, whole=True), self)

    def send(self, actions: Any, slots: Sequence[int] | np.ndarray | None = None) -> None:
        """Gives some slots their next action, and does not wait.

        Args:
            actions: a batch as for `step`, one for each of the slots.
            slots: where to; None is all.

        Raises:
            BadAction, BadSlot, ResetNeeded: nothing was sent.
        """
        self._check_open()
        self._act(actions, range(self.num_envs) if slots is None else [int(slot) for slot in slots])

    def recv(self, min_ready: int = 1, timeout: float | None = None) -> Ready:
        """What sent actions led to, of whoever is ready: 1 never waits for a straggler.

        Under NEXT_STEP the action after an episode's end gives the first observation of the next one, as `step` does.

        Args:
            min_ready: slots to wait for; no more than there are actions to answer.
            timeout: seconds to wait for a first one; None takes that of the environment.

        Raises:
            NothingSent: there is no action to answer.
            FarmTimeout: nothing came in time; late results stay addressed to their own step.
        """
        self._check_open()
        check_whole("min_ready", min_ready, 0)
        results = self.episodes.results(min_ready, self.timeout if timeout is None else timeout)
        slots = np.array([result.slot for result in results], np.int64)
        return Ready(slots, *self._columns(results, _Infos(len(results))))

    def close_extras(self, **kwargs: Any) -> None:
        """Gives the slots back; `close` calls it."""
        self._closing()

    def render(self) -> None:
        """A farm sends no pictures."""
        raise NotImplementedError("a farm's environments are not rendered here: render_mode is None")

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """An attribute that this side knows, once for each slot.

        Raises:
            NotOfAFarm: only the environment knows it, and a farm does not hand it out.
        """
        return (attribute(self, name),) * self.num_envs

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """As `get_attr`: methods of an environment cannot be called."""
        return self.get_attr(name)

    def set_attr(self, name: str, values: Any) -> None:
        """Raises NotOfAFarm: a host cannot reach into an environment."""
        raise unreachable(name, "set")

    def status(self) -> dict[str, Any]:
        """Farms with their slots, troubles and ledgers, as `Farmer.status`."""
        return self._pool.status()

    def __enter__(self) -> FarmVectorEnv:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    # Values.

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedEnvironmentError("the environments of %s are closed: make new ones" % self._env)

    def _seeds(self, seed: int | Sequence[int | None] | None) -> list[int | None]:
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, (int, np.integer)):
            return [int(seed) + slot for slot in range(self.num_envs)]
        if isinstance(seed, (str, bytes)) or not isinstance(seed, (Sequence, np.ndarray)):
            raise TypeError("seed must be a whole number, one for each environment, or None, not %r" % (seed,))
        check_seeds(seed)
        if len(seed) != self.num_envs:
            raise ValueError("%d seeds for %d environments: one for each, or a single int" % (len(seed), self.num_envs))
        return [None if one is None else int(one) for one in seed]

    def _mask(self, options: dict[str, Any] | None) -> tuple[np.ndarray, dict[str, Any] | None]:
        if options is None or "reset_mask" not in options:
            return np.ones(self.num_envs, bool), options
        mask = options["reset_mask"]
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
            raise TypeError("options['reset_mask'] must be a numpy array of bool, not %r" % (mask,))
        if mask.shape != (self.num_envs,) or not mask.any():
            raise ValueError(
                "options['reset_mask'] must have shape (%d,) with at least one True, not %r" % (self.num_envs, mask)
            )
        return mask, {key: value for key, value in options.items() if key != "reset_mask"}

    def _act(self, actions: Any, slots: Sequence[int], soon: bool = False) -> None:
        try:
            each = list(iterate(self.action_space, actions))
        except (TypeError, ValueError, KeyError, IndexError) as error:
            raise BadAction("no batch of actions for %s: %r (%s)" % (self.action_space, actions, error)) from None
        if len(each) != len(slots):
            raise BadAction("%d actions for %d environments" % (len(each), len(slots)))
        self.episodes.act(each, slots, soon)

    def _columns(
        self, results: list[Result], rows: VectorEnv[Any, Any, Any]
    ) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """The results as arrays, infos as gymnasium batches them; `rows` is a VectorEnv with as many."""
        infos: dict[str, Any] = {}
        for row, result in enumerate(results):
            if result.final_info is not None:
                rows._add_info(infos, {"final_obs": result.final_obs, "final_info": result.final_info}, row)
            if result.info:
                rows._add_info(infos, result.info, row)
        return (
            batched(self.single_observation_space, [result.obs for result in results]),
            np.array([result.reward for result in results], np.float64),
            np.array([result.terminated for result in results], np.bool_),
            np.array([result.truncated for result in results], np.bool_),
            infos,
        )


def batched(space: Space[Any], observations: list[Any]) -> Any:
    """Observations of one space as one of the batched space, which nobody else holds."""
    out = create_empty_array(space, len(observations), np.empty)
    return concatenate(space, observations, out)  # type: ignore[arg-type]  # None is for spaces that do not travel


class _Infos(VectorEnv[Any, Any, Any]):
    """Batches infos of any number of rows in gymnasium's own way."""

    def __init__(self, rows: int):
        self.num_envs = rows


#: What this side knows of each environment.
_KNOWN = {"render_mode", "metadata", "spec", "single_observation_space", "single_action_space"}
_SINGLE = {"observation_space": "single_observation_space", "action_space": "single_action_space"}


def attribute(envs: FarmVectorEnv, name: str) -> Any:
    """An attribute of one environment, as far as this side knows it; NotOfAFarm otherwise."""
    name = _SINGLE.get(name, name)
    if name not in _KNOWN:
        raise unreachable(name, "read")
    return getattr(envs, name)


def unreachable(name: str, what: str) -> NotOfAFarm:
    """The error for a reach into an environment's process."""
    known = sorted((_KNOWN | _SINGLE.keys()) - set(_SINGLE.values()))
    return NotOfAFarm(
        "%r cannot be %s: the environment runs on a farm, which takes resets and steps only\n"
        "  known here: %s\n"
        "  now: put what you need into its info, take it by the options of reset, or by farm.py --env-kwargs"
        % (name, what, ", ".join(known))
    )
