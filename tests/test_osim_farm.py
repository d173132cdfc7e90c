"""OpenSim through a real farm.py: what the learner keeps is exactly what the simulator did.

make osim && .venv/bin/python -m pytest tests/test_osim_farm.py
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from farms import running_farm

from agents import make_ddpg
from farmer import Farmer

ROOT = pathlib.Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".venv-osim" / "bin" / "python"

pytestmark = [pytest.mark.osim, pytest.mark.slow, pytest.mark.timeout(300)]

# Runs in the OpenSim Python: the recipe alone, without worker, pipe or farm.
BARE = """
import importlib.util, sys
import numpy as np
recipe, source, out = sys.argv[1:]
spec = importlib.util.spec_from_file_location("bare_recipe", recipe)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
env = module.L2M2019()
rows = {"first": [], "obs": [], "reward": [], "terminated": [], "truncated": []}
with np.load(source) as played:
    for number, seed in enumerate(played["seeds"]):
        rows["first"].append(env.reset(seed=int(seed))[0])
        for action in played["actions_%d" % number]:
            for name, value in zip(("obs", "reward", "terminated", "truncated"), env.step(action)):
                rows[name].append(value)
np.savez(out, **rows)
"""


@pytest.fixture(scope="module")
def walkers():
    """A farm with two walking bodies; its address."""
    if not PYTHON.exists():
        pytest.fail(f"no OpenSim environment at {PYTHON}: run `make osim` (or leave these out: -m 'not osim')")
    with running_farm("osim:L2M2019", slots=2, python=str(PYTHON)) as farm:
        yield farm.address


class Recorder:
    """Stands before a pool and writes down what is asked of it and what it delivers."""

    def __init__(self, pool: Farmer):
        self._pool = pool
        self.episodes: dict[int, list[dict]] = {}  # slot -> episodes: seed, actions, rows
        self.transitions: list[tuple] = []  # in the order of their delivery: obs, action, reward, next_obs, terminated

    def __getattr__(self, name):
        return getattr(self._pool, name)

    def reset(self, slots, seeds=None):
        assert seeds is not None, "an agent with a seed names each episode's"
        for slot, seed in zip(slots, seeds, strict=True):
            self.episodes.setdefault(slot, []).append({"seed": seed, "actions": [], "rows": []})
        self._pool.reset(slots, seeds)

    def send(self, actions, slots, repeat=1):
        for slot, action in zip(slots, actions, strict=True):
            self.episodes[slot][-1]["actions"].append(np.array(action, np.float32))
        self._pool.send(actions, slots, repeat)

    def recv(self, min_ready=1, timeout=60.0):
        batch = self._pool.recv(min_ready, timeout)
        assert not batch.lost.any()
        for i, slot in enumerate(batch.slot):
            episode = self.episodes[int(slot)][-1]
            row = (batch.obs[i].copy(), batch.reward[i], batch.terminated[i], batch.truncated[i], bool(batch.first[i]))
            if not row[4]:
                before = episode["rows"][-1][0]
                self.transitions.append((before, episode["actions"][len(episode["rows"]) - 1], row[1], row[0], row[2]))
            episode["rows"].append(row)
        return batch


def bare(folder: pathlib.Path, slot: int, episodes: list[dict]) -> dict[str, np.ndarray]:
    """The same seeds and actions on the recipe alone, in the simulator's Python."""
    source, out = folder / f"played-{slot}.npz", folder / f"bare-{slot}.npz"
    actions = {f"actions_{number}": np.array(episode["actions"]) for number, episode in enumerate(episodes)}
    np.savez(source, seeds=[episode["seed"] for episode in episodes], **actions)
    line = [str(PYTHON), "-c", BARE, str(ROOT / "simulators" / "osim.py"), str(source), str(out)]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(out) as arrays:
        return {name: arrays[name] for name in arrays.files}


def test_a_farm_describes_339_observations_and_22_muscles_between_0_and_1(walkers):
    with Farmer("osim:L2M2019", [(walkers, 1)]) as farmer:
        assert farmer.observation_space.shape == (339,)
        assert farmer.observation_space.dtype == np.float32
        assert farmer.action_space.shape == (22,)
        np.testing.assert_array_equal(farmer.action_space.low, np.zeros(22))
        np.testing.assert_array_equal(farmer.action_space.high, np.ones(22))


def test_the_replay_of_a_training_holds_exactly_what_the_simulator_reports(walkers, tmp_path):
    with Farmer("osim:L2M2019", [(walkers, 2)]) as farmer:
        recorder = Recorder(farmer)
        agent = make_ddpg(
            farmer.observation_space,
            farmer.action_space,
            seed=1,
            batch_size=16,
            nb_steps_warmup_critic=50,
            nb_steps_warmup_actor=50,
        )
        history = agent.fit(recorder, nb_steps=None, nb_episodes=4, verbose=0)

    assert len(history.history["episode_reward"]) == 4
    assert agent.nb_updates > 50
    assert len(recorder.episodes) == 2, "both slots must have played"

    # The replay against what the pool delivered, transition by transition.
    count = len(agent.memory)
    assert count == len(recorder.transitions) == sum(history.history["nb_episode_steps"]) == agent.step
    kept = agent.memory.gather(agent.memory.transitions())
    obs, action, reward, next_obs, terminated = (np.array(column) for column in zip(*recorder.transitions, strict=True))
    ours, theirs = np.lexsort(kept.state[0][:, 0].T), np.lexsort(obs.T)  # both slots' in one order
    np.testing.assert_array_equal(kept.state[0][ours, 0], obs[theirs])
    np.testing.assert_array_equal(agent.to_env(kept.action[ours]), action[theirs])
    np.testing.assert_array_equal(kept.reward[ours], reward[theirs])
    np.testing.assert_array_equal(kept.next_state[0][ours, 0], next_obs[theirs])
    np.testing.assert_array_equal(kept.terminated[ours], terminated[theirs])
    assert kept.terminated.sum() + kept.truncated.sum() == 4
    assert ((action >= 0) & (action <= 1)).all()
    assert len(np.unique(action, axis=0)) == count, "the noise must differ from step to step"

    # What the pool delivered against the recipe alone, with the same seeds and actions.
    for slot, episodes in recorder.episodes.items():
        alone = bare(tmp_path, slot, episodes)
        rows = [row for episode in episodes for row in episode["rows"]]
        steps = [row for row in rows if not row[4]]
        np.testing.assert_array_equal(alone["first"], [row[0] for row in rows if row[4]])
        np.testing.assert_array_equal(alone["obs"], [row[0] for row in steps])
        np.testing.assert_array_equal(alone["reward"].astype(np.float32), [row[1] for row in steps])
        np.testing.assert_array_equal(alone["terminated"], [row[2] for row in steps])
        np.testing.assert_array_equal(alone["truncated"], [row[3] for row in steps])


def test_train_py_learns_from_opensim_through_a_farmlist(walkers, tmp_path):
    (tmp_path / "farmlist.py").write_text(f"farmlist_base = [({walkers!r}, 2)]\n")
    line = [sys.executable, str(ROOT / "train.py"), "--env", "osim:L2M2019", "--episodes", "2", "--seed", "1"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "mean return of the last 2 episodes" in done.stdout
    checkpoint = tmp_path / "runs" / "osim_L2M2019" / "checkpoint"
    manifest = json.loads((max(checkpoint.glob("save-*")) / "manifest.json").read_text())
    episodes = manifest["extra"]["episodes"]
    assert [row[3] for row in episodes] == [walkers] * 2
    (segment,) = manifest["replay"]["segments"]
    with np.load(checkpoint / "replay" / segment["name"]) as columns:
        assert columns["obs/0"].shape == (sum(row[1] + 1 for row in episodes), 339)
        assert columns["step"].sum() == sum(row[1] for row in episodes)


def test_the_arm_steps_through_a_farm(tmp_path):
    with (
        running_farm("osim:Arm2D", slots=1, python=str(PYTHON), kwargs={"max_episode_steps": 3}) as farm,
        Farmer("osim:Arm2D", [(farm.address, 1)]) as farmer,
    ):
        assert farmer.observation_space.shape == (16,)
        assert farmer.action_space.shape == (6,)
        farmer.reset([0], [1])
        first = farmer.recv()
        rewards, over = [], []
        for _ in range(3):
            farmer.send(np.full((1, 6), 0.1, np.float32), [0])
            batch = farmer.recv()
            assert not batch.lost[0]
            rewards.append(float(batch.reward[0]))
            over.append(bool(batch.truncated[0]))
        np.testing.assert_array_equal(batch.obs[0, :2], first.obs[0, :2])  # the target stays
        assert over == [False, False, True]
        assert max(rewards) <= 1
