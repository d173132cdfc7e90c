"""One call of `fit` or `test`: over a pool of environments, or over one as keras-rl does it."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from tensorflow.keras.callbacks import History

from agents import nest
from agents.interrupt import deferred_interrupt
from agents.keras_rl.callbacks import CallbackList, Visualizer
from agents.learner import Learner
from agents.losses import LossLog
from agents.pool_api import Batch, Pool

if TYPE_CHECKING:
    from agents.core import Agent

WAIT = 30.0  #: s without any result, after which the loop says what it waits for
GLANCE = 0.5  #: s between two looks at whether Ctrl-C was pressed
SHOWN = 8  #: farms that it names then
PATIENCE = 1.5  #: s after Ctrl-C that a running update is waited for; a longer one ends by itself behind the prompt

log = logging.getLogger("agents")


@dataclass
class Episode:
    """A running episode of one slot."""

    number: int
    slot: int
    farm: str
    obs: Any = None
    action: Any = None  # as it was sent, after the processor
    chosen: Any = None  # as the agent chose it: what the critic must learn about
    policy: int = 0  # updates that the weights had which chose it
    steps: int = 0
    reward: float = 0.0
    start_steps: int = 0  # still to be made by start_step_policy, outside the count
    frames: deque[Any] = field(default_factory=deque)

    def state(self, window: int) -> list[Any]:
        """The last `window` observations, zeros before the episode's start."""
        self.frames.append(self.obs)
        missing = window - len(self.frames)
        return [_blank(self.obs)] * missing + list(self.frames)


def _blank(obs: Any) -> Any:
    return nest.unflatten(nest.template_of(obs), [np.zeros_like(leaf) for leaf in nest.flatten(obs)])


@dataclass(frozen=True)
class Limits:
    """What `fit` and `test` were asked for; one of nb_steps and nb_episodes is None."""

    nb_steps: int | None
    nb_episodes: int | None
    repetition: int = 1
    max_episode_steps: int | None = None
    max_start_steps: int = 0
    start_policy: Callable[[Any], Any] | None = None


class Run:
    """What both kinds share: the callbacks around the loop, and its end."""

    goes_on = False  #: whether an environment that is done may be stepped on, where a processor says so

    def __init__(self, agent: Agent, env: Any, pool: Pool, training: bool, limits: Limits):
        self.agent, self.env, self.pool = agent, env, pool
        self.training, self.limits = training, limits
        self.nb_episodes = limits.nb_episodes
        self.running: dict[int, Episode] = {}
        self.done_steps = self.begun = self.ended = 0
        self.info_names: dict[str, None] = {}  # all that came so far, in their order

    def run(self, callbacks: list[Any], visualize: bool) -> History:
        """The loop with its callbacks around it."""
        agent = self.agent
        agent.settle()
        agent.prepare(self.pool)
        history = History()
        self.callbacks = CallbackList(callbacks + ([Visualizer()] if visualize else []) + [history])
        self.callbacks.set_model(agent)
        self.callbacks._set_env(self.env)
        asked = {"nb_steps": self.limits.nb_steps} if self.training else {"nb_episodes": self.limits.nb_episodes}
        self.callbacks.set_params(asked)
        agent.training = self.training
        agent.reset_states()
        self.pool.abandon()
        agent._on_train_begin() if self.training else agent._on_test_begin()
        self.callbacks.on_train_begin()
        aborted = True
        try:
            aborted = self._loop()
        except KeyboardInterrupt:
            pass
        finally:
            for slot in self.running:
                if self.training:
                    agent.interrupted(slot)
            self.running.clear()
            self.pool.abandon()
            self.callbacks.on_train_end(logs={"did_abort": aborted})
            agent._on_train_end() if self.training else agent._on_test_end()
            agent.training = False
        return history

    def _loop(self) -> bool:
        """Turns until enough was made; True when Ctrl-C ended it."""
        with deferred_interrupt() as self.interrupt:
            while not self._finished() and not self.interrupt.wanted:
                self._turn()
        return self.interrupt.wanted

    def _finished(self) -> bool:
        if self.limits.nb_steps is not None:
            return self.done_steps >= self.limits.nb_steps
        assert self.nb_episodes is not None
        return self.ended >= self.nb_episodes

    def _turn(self) -> None:
        raise NotImplementedError

    def _begin(self, slot: int) -> Episode:
        """A new episode in a slot; its first observation is yet to come."""
        episode = Episode(self.begun, slot, self.pool.name_of(slot))
        episode.frames = deque(maxlen=self.agent.window_length)
        self.begun += 1
        self.running[slot] = episode
        return episode

    def _receive(self, min_ready: int = 1) -> Batch | None:
        """Whoever is ready; None when Ctrl-C came first. Long waits say what they wait for."""
        began = time.perf_counter()
        said = began
        while not self.interrupt.wanted:
            try:
                batch = self.pool.recv(min_ready=min_ready, timeout=GLANCE)
                self.agent.meters.waited(time.perf_counter() - began)
                return batch
            except TimeoutError:
                self._nothing_came()
                if time.perf_counter() - said >= WAIT:
                    said = time.perf_counter()
                    log.warning("nothing came for %.0f s; %s", said - began, _in_words(self.pool.status()))
        return None

    def _nothing_came(self) -> None:
        """Called again and again while `_receive` waits."""

    def _process(self, batch: Batch, i: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """A row's observation, reward, terminated, truncated and info as the processor leaves them.

        Raises:
            ValueError: the observation is none that the agent can take.
        """
        obs, reward, info = batch.obs[i], float(batch.reward[i]), batch.info[i]
        terminated, truncated = bool(batch.terminated[i]), bool(batch.truncated[i])
        processor = self.agent.processor
        if processor is not None and batch.first[i]:
            obs = processor.process_observation(obs)
        if processor is None or batch.first[i]:
            self.agent.check_observation(obs)
            return obs, reward, terminated, truncated, info
        obs, reward, done, info = processor.process_step(obs, reward, terminated or truncated, info)
        self.agent.check_observation(obs)
        if done and not (terminated or truncated):
            terminated = True
            self.pool.abandon([int(batch.slot[i])])
        elif not done and self.goes_on:
            terminated = truncated = False
        return obs, reward, terminated, truncated, info

    def _counted(self, episode: Episode, reward: float) -> None:
        """One more transition."""
        episode.steps += 1
        episode.reward += reward
        self.done_steps += 1
        self.agent.step += self.training

    def _too_long(self, episode: Episode) -> bool:
        limit = self.limits.max_episode_steps
        return limit is not None and 0 < limit <= episode.steps

    def _measured(self, batch: Batch, made: list[tuple[int, int]]) -> None:
        """Counts (row, updates of the weights that chose its action)."""
        if made:
            rows = [i for i, _ in made]
            ages = [self.agent.nb_updates - policy for _, policy in made]
            self.agent.meters.stepped(np.asarray(batch.env_s)[rows], np.asarray(batch.trip_s)[rows], ages)

    def _over(self, episode: Episode) -> None:
        """Tells the callbacks that an episode has ended."""
        self.ended += 1
        logs = {"episode_reward": episode.reward, "nb_episode_steps": episode.steps, "nb_steps": self.agent.step}
        if not self.training:
            logs["nb_steps"] = episode.steps
        self.callbacks.on_episode_end(episode.number, logs=dict(logs, slot=episode.slot, farm=episode.farm))

    def _action_for(self, episode: Episode, chosen: Any) -> Any:
        """The environment's action for the agent's choice, after the processor."""
        episode.chosen, episode.policy = chosen, self.agent.policy_updates
        action = self.agent.to_env(chosen)
        if self.agent.processor is not None:
            action = self.agent.processor.process_action(action)
        episode.action = action
        return action

    def _start_action(self, episode: Episode) -> Any:
        """An action before the agent's first."""
        policy = self.limits.start_policy
        action = self.pool.action_space.sample() if policy is None else policy(episode.obs)
        if self.agent.processor is not None:
            action = self.agent.processor.process_action(action)
        return action

    def _shaped(self, action: Any) -> Any:
        """In the form of the environment's space, and within its bounds."""
        space = self.pool.action_space
        shape = getattr(space, "shape", None)
        if not shape or np.size(action) != np.prod(shape):
            return action
        action = np.reshape(action, shape)
        return np.clip(action, space.low, space.high) if hasattr(space, "low") else action

    def _numbers(self, infos: dict[str, Any]) -> dict[str, Any]:
        """The infos that keras-rl's loggers can average; NaN for one that came before and is missing now."""
        real = {name: value for name, value in infos.items() if is_real(value)}
        self.info_names.update(dict.fromkeys(real))
        return {name: real.get(name, np.nan) for name in self.info_names}


def _in_words(status: dict[str, Any]) -> str:
    """A pool's `status()` in a line, and one more for each farm up to SHOWN, those with a trouble first."""
    farms = sorted(status.get("farms", []), key=lambda farm: farm.get("trouble") is None)
    lines = ["waiting for %s of %s slots" % (status.get("busy", "?"), status.get("slots", "?"))]
    for farm in farms[:SHOWN]:
        trouble = (farm.get("trouble") or "").partition("\n")[0]
        said = "  %s: %d slots, %d busy" % (farm["farm"], farm["slots"], farm["busy"])
        lines.append(said + ("; " + trouble if trouble else ""))
    if len(farms) > SHOWN:
        lines.append("  and %d more farms" % (len(farms) - SHOWN))
    return "\n".join(lines)


def is_real(value: Any) -> bool:
    """Whether a value of an info is one number."""
    if isinstance(value, np.ndarray):
        return value.ndim == 0 and value.dtype.kind in "biuf"
    return isinstance(value, (bool, int, float, np.bool_, np.integer, np.floating))


class PoolRun(Run):
    """Many environments: whoever is ready gets an action, and learning goes on while the others step."""

    def __init__(self, agent: Agent, env: Any, pool: Pool, training: bool, limits: Limits):
        super().__init__(agent, env, pool, training, limits)
        self.under_way = 0  # steps that were sent and count towards nb_steps
        self.parked: list[Episode] = []  # want an action, and the steps under way already fill the budget
        self.in_step = agent.schedule == "sync"  # every turn waits for all slots, so that nothing depends on time
        self.learner: Learner | None = None
        self.losses = LossLog()

    def _loop(self) -> bool:
        try:
            return super()._loop() if not self.training or self.in_step else self._loop_beside_learner()
        finally:
            self.losses.tell(all_of_them=True)

    def _loop_beside_learner(self) -> bool:
        self.learner = Learner(self.agent, self.pool.nb_slots)
        self.agent.overlap(True)
        self.learner.start()
        aborted = True
        try:
            aborted = super()._loop()
            while not aborted and not self.learner.settle(GLANCE):
                pass
        finally:
            if self.learner.stop(PATIENCE if aborted else None):
                self.agent.overlap(False)
            else:
                self.agent.settles_later(self.learner)
        return aborted

    def _turn(self) -> None:
        """Start episodes, take who is ready, act for them, and learn while the environments step and are reset."""
        self._start_episodes()
        running = len(self.running)
        made: list[tuple[Episode, dict[str, Any]]] = []
        ready: list[Episode] = []
        batches = self._batches()
        rows: list[list[tuple[int, int]]] = [[] for _ in batches]
        # By slot over all of them: under `sync` replay must not tell who came first.
        arrived = sorted((int(slot), b, i) for b, batch in enumerate(batches) for i, slot in enumerate(batch.slot))
        self._tell_losses(batches)
        for _, b, i in arrived:
            episode = self._row(batches[b], i, made, rows[b])
            if episode is not None:
                ready.append(episode)
        for batch, taken in zip(batches, rows, strict=True):
            self._measured(batch, taken)
        ready = [episode for episode in ready if self.running.get(episode.slot) is episode]  # not lost right afterwards
        self._observe(ready, made)
        self._send(ready)
        if len(self.running) < running:  # some have just ended: the next ones do not wait for the learner
            self._start_episodes()
        metrics = self._learn(len(made))
        for episode, logs in made:
            self._tell(episode, logs, metrics)

    def _batches(self) -> list[Any]:
        """What came: whoever is ready, or under `sync` all that are under way."""
        batch = self._receive()
        if batch is None:
            return []
        batches = [batch]
        if self.in_step:
            missing = set(self.running) - {episode.slot for episode in self.parked} - set(batch.slot.tolist())
            while missing and len(batch.slot) and (batch := self._receive(len(missing))) is not None:
                batches.append(batch)
                missing -= set(batch.slot.tolist())
        return batches

    def _start_episodes(self) -> None:
        left = None if self.nb_episodes is None else self.nb_episodes - self.begun
        # Under `sync` nothing may depend on time, so not on speed either: the first slots get them.
        vacant = self.pool.vacant() if left is None or self.in_step else self.pool.vacant(left)
        slots = [slot for slot in vacant if slot not in self.running][:left]
        if left is None and self.limits.nb_steps is not None:
            slots = slots[: max(0, self.limits.nb_steps - self.done_steps - self.under_way)]
        if slots:
            self.pool.reset(slots, self.agent.seeds(self.begun, len(slots)))
        for slot in slots:
            episode = self._begin(slot)
            if self.limits.max_start_steps:
                episode.start_steps = int(np.random.randint(self.limits.max_start_steps))
            self.agent.began(slot)

    def _nothing_came(self) -> None:
        if not self.in_step:  # a slot that was left out because others are faster gets its turn when those hang
            self._start_episodes()

    def _row(self, batch: Any, i: int, made: list[Any], rows: list[tuple[int, int]]) -> Episode | None:
        """Takes one row in; returns the episode if it wants an action now."""
        episode = self.running.get(int(batch.slot[i]))
        if episode is None:
            return None
        counted = episode.action is not None and episode.start_steps == 0 and not batch.first[i]
        if counted:
            self.under_way -= 1
        if batch.lost[i]:
            self._lost(episode)
            return None
        obs, reward, terminated, truncated, info = self._process(batch, i)
        if batch.first[i]:
            episode.obs = obs
            self.callbacks.on_episode_begin(episode.number, logs={"slot": episode.slot, "farm": episode.farm})
            return episode
        if not counted:
            return self._started(episode, obs, terminated or truncated)
        rows.append((i, episode.policy))
        action, episode.action = episode.action, None  # nothing of this slot is under way now
        self._counted(episode, reward)
        if self._too_long(episode) and not terminated and not truncated:
            truncated = True
            self.pool.abandon([episode.slot])
        if self.training:
            self.agent.remember(episode, reward, obs, terminated, truncated)
        logs = {"action": action, "observation": obs, "reward": reward, "episode": episode.number}
        logs.update(info=self._numbers(info), slot=episode.slot, farm=episode.farm, over=terminated or truncated)
        made.append((episode, logs))
        episode.obs = obs
        if terminated or truncated:
            del self.running[episode.slot]
            return None
        return episode

    def _tell_losses(self, batches: list[Any]) -> None:
        """Says which episodes are lost, of those that went with their farm only how many."""
        found = [(batch, int(i)) for batch in batches for i in np.flatnonzero(batch.lost)]
        rows = [(self.running.get(int(batch.slot[i])), batch.info[i].get("lost", "lost")) for batch, i in found]
        gone: dict[str, list[int]] = {}
        troubles = {farm["trouble"] for farm in self.pool.status().get("farms", [])} if rows else set()
        for episode, why in rows:
            if episode is None:
                continue
            if why in troubles:
                gone.setdefault(episode.farm, []).append(episode.slot)
            else:
                self.losses.lost(episode.slot, episode.farm, why)
        for name, slots in gone.items():
            self.losses.lost_with_farm(slots, name)
        self.losses.tell()

    def _started(self, episode: Episode, obs: Any, over: bool) -> Episode | None:
        """One of the steps before the agent's first."""
        episode.start_steps -= 1
        episode.action, episode.obs = None, obs
        if over:  # over before it began: another one
            self._forget(episode)
            return None
        return episode

    def _observe(self, ready: list[Episode], made: list[tuple[Episode, dict[str, Any]]]) -> None:
        if not self.training:
            return
        ended = [logs["observation"] for _, logs in made if logs["over"]]
        observations = [episode.obs for episode in ready] + ended
        if observations:
            self.agent.observe(observations)

    def _send(self, ready: list[Episode]) -> None:
        if self.limits.nb_steps is not None:  # what is left of the budget; the rest stays where it is
            ready = [episode for episode in self.parked if self.running.get(episode.slot) is episode] + ready
            left = max(0, self.limits.nb_steps - self.done_steps - self.under_way)
            ready, self.parked = ready[:left], ready[left:]
        if not ready:
            return
        free = [episode for episode in ready if episode.start_steps == 0]
        if free:
            states = [episode.state(self.agent.window_length) for episode in free]
            for episode, chosen in zip(free, self.agent.act(states, [e.slot for e in free]), strict=True):
                self._action_for(episode, chosen)
            self.under_way += len(free)
        for episode in ready:
            if episode.start_steps:
                episode.action = self._start_action(episode)
        actions = [self._shaped(episode.action) for episode in ready]
        self.pool.send(actions, [episode.slot for episode in ready], repeat=self.limits.repetition)

    def _learn(self, steps: int) -> list[Any]:
        """Learns for so many new steps, or lets the learner; the newest metrics, NaN when there are none."""
        nothing = [np.nan for _ in self.agent.metrics_names]
        if not self.training or not steps:
            return nothing
        if self.learner is None:
            return list(self.agent.learn(steps, self.pool.nb_slots))
        news = self.learner.earn(steps if self.agent.is_warm() else 0)
        began = time.perf_counter()
        while not self.learner.wait(GLANCE) and not self.interrupt.wanted:
            pass
        self.agent.meters.throttled(time.perf_counter() - began)
        return nothing if news is None else self.agent.with_processor(news)

    def _tell(self, episode: Episode, logs: dict[str, Any], metrics: list[Any]) -> None:
        over = logs.pop("over")
        steps = episode.steps - 1
        self.callbacks.on_step_begin(steps)
        self.callbacks.on_action_begin(logs["action"])
        self.callbacks.on_action_end(logs["action"])
        self.callbacks.on_step_end(steps, logs=dict(logs, metrics=metrics))
        if over:
            self._over(episode)

    def _lost(self, episode: Episode) -> None:
        """The episode ends as truncated at its last good observation; the step that was lost is none.

        In a test another one is played instead: half an episode's return would count as a whole one's.
        """
        if episode.steps == 0 or not self.training:
            self._forget(episode)
            return
        self.agent.lost(episode.slot)
        self.running.pop(episode.slot, None)
        self._over(episode)

    def _forget(self, episode: Episode) -> None:
        """An episode without a step was none."""
        self.running.pop(episode.slot, None)
        if self.nb_episodes is not None:
            self.nb_episodes += 1  # its number is used up
            self.ended += 1
