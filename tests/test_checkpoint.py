"""Saves: what comes back goes on as before, and a kill at any instant leaves a whole one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
from agent_parts import Counter, linear_agent
from helpers import poll_until
from rl.memory import SequentialMemory
from rl.random import OrnsteinUhlenbeckProcess

from agents import LocalPool, ReplayMemory
from agents.checkpoint import load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parents[1]


def new_agent(**settings):
    noise = OrnsteinUhlenbeckProcess(theta=0.15, sigma=0.5, sigma_min=0.1, n_steps_annealing=500)
    chosen = {"batch_size": 8, "nb_steps_warmup_critic": 20, "nb_steps_warmup_actor": 20, "random_process": noise}
    return linear_agent(optimizer=keras.optimizers.Adam(0.01), **dict(chosen, **settings))


def trained_agent(steps=103, **settings):
    """After 103 steps of three environments some updates are owed: not a whole block of them is full."""
    agent = new_agent(**settings)
    agent.fit(LocalPool([Counter(5, slot) for slot in range(3)]), nb_steps=steps, verbose=0)
    return agent


def everything(agent):
    parts = (agent.actor, agent.critic, agent.target_actor, agent.target_critic)
    weights = [v.numpy() for part in (*parts, agent.actor_optimizer, agent.critic_optimizer) for v in part.variables]
    counters = [agent.step, agent.nb_updates, agent._owed, agent._noise.n_steps, len(agent.memory)]
    return [*weights, np.array(counters), *agent.memory.state_dict().values()]


def assert_same(first, second):
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_loaded_agent_has_all_of_the_saved_one_and_goes_on_equally(tmp_path):
    first, second = trained_agent(), new_agent()
    assert first._owed > 0
    extra = {"episodes": [1.5, 2.0], "env": "Counter"}
    save_checkpoint(first, tmp_path, extra)
    assert load_checkpoint(second, tmp_path) == extra
    assert_same(everything(first), everything(second))
    for agent in (first, second):  # the same noise from here on: keras-rl draws it from numpy's global generator
        np.random.seed(11)
        agent.fit(LocalPool([Counter(5, slot) for slot in range(3)]), nb_steps=100, verbose=0)
    assert first.step == 203
    assert_same(everything(first), everything(second))


def test_only_the_newest_save_stays(tmp_path):
    agent = trained_agent(30)
    save_checkpoint(agent, tmp_path)
    agent.step = 77
    path = save_checkpoint(agent, tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["LATEST", path.name]
    other = new_agent()
    load_checkpoint(other, tmp_path)
    assert other.step == 77


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: new_agent(obs_dim=4), r"other networks or another environment"),
        (lambda: new_agent(nb_actions=2), r"other networks or another environment"),
        (lambda: new_agent(memory=ReplayMemory(50)), r"holds 10000 transitions, this agent's 50"),
        (None, r"is of another agent"),  # another optimizer has other variables
    ],
)
def test_a_save_of_an_agent_of_another_form_is_refused_and_changes_nothing(tmp_path, other, words):
    save_checkpoint(trained_agent(), tmp_path)
    noise = OrnsteinUhlenbeckProcess(theta=0.1)
    agent = other() if other else linear_agent(random_process=noise, optimizer=keras.optimizers.SGD(0.1))
    before = everything(agent)
    with pytest.raises(ValueError, match=words):
        load_checkpoint(agent, tmp_path)
    assert_same(before, everything(agent))


def test_a_save_of_another_format_is_refused(tmp_path):
    path = save_checkpoint(trained_agent(30), tmp_path)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(dict(manifest, format=99)))
    with pytest.raises(ValueError, match=r"another agent"):
        load_checkpoint(new_agent(), tmp_path)


def test_a_folder_without_a_save_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*; save\(\) writes one"):
        load_checkpoint(new_agent(), tmp_path / "nothing")


def test_keras_rls_own_memory_is_refused_before_anything_is_written(tmp_path):
    agent = linear_agent(memory=SequentialMemory(50, window_length=1))
    with pytest.raises(TypeError, match=r"replay of agents.ReplayMemory"):
        save_checkpoint(agent, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_a_killed_save_left_is_ignored_and_swept_by_the_next(tmp_path):
    first = trained_agent()
    path = save_checkpoint(first, tmp_path)
    # Killed while writing, killed between the folder's name and LATEST, and killed while writing LATEST.
    (tmp_path / "save-000002.part").mkdir()
    (tmp_path / "save-000002.part" / "arrays.npz").write_bytes(b"PK half")
    shutil.copytree(path, tmp_path / "save-000003")
    (tmp_path / "LATEST.part").write_text("save-0000")
    second = new_agent()
    load_checkpoint(second, tmp_path)
    assert_same(everything(first), everything(second))
    newest = save_checkpoint(first, tmp_path)
    assert newest.name == "save-000004"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["LATEST", "save-000004"]


SAVING = """
import sys
import numpy as np
from agent_parts import linear_agent
from agents.checkpoint import save_checkpoint

agent = linear_agent()
nothing = np.zeros(3, np.float32)
for number in range(3000):
    agent.memory.add(0, nothing + number, nothing[:1], 0.0, nothing, False, False)
for number in range(1, 10**9):
    agent.step = number
    agent.actor.set_weights([np.full_like(weight, number) for weight in agent.actor.get_weights()])
    save_checkpoint(agent, sys.argv[1], {"number": number})
"""


@pytest.mark.slow
def test_kill_9_at_any_instant_of_saving_leaves_a_whole_save(tmp_path):
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    rng = np.random.default_rng(0)
    last = 0
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVING, str(tmp_path)],
            env=dict(os.environ, PYTHONPATH=paths),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            had = (tmp_path / "LATEST").read_text() if last else None
            poll_until(lambda had=had: newest(tmp_path) not in (None, had), 60, "the first save")
            for _ in range(15):  # stopped where it is; what lies there is what a kill would leave
                time.sleep(float(rng.uniform(0.001, 0.02)))
                process.send_signal(signal.SIGSTOP)
                poll_until(lambda pid=process.pid: stopped(pid), 10, "the stop")
                copy = tmp_path.parent / (tmp_path.name + "-copy")
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(tmp_path, copy)
                process.send_signal(signal.SIGCONT)
                assert load(copy) > 0
        finally:
            process.kill()
            process.wait(10)
        last = load(tmp_path)
        assert last > 0


def newest(folder):
    with contextlib.suppress(FileNotFoundError):
        return (folder / "LATEST").read_text()
    return None


def stopped(pid):
    return Path("/proc/%d/stat" % pid).read_text().rpartition(")")[2].split()[0] in "Tt"


def load(folder):
    """Loads the save and checks that its parts are of one moment; its number."""
    agent = linear_agent()
    number = load_checkpoint(agent, folder)["number"]
    assert agent.step == number
    assert all((weight == number).all() for weight in agent.actor.get_weights())
    assert len(agent.memory) == 3000
    assert agent.memory.gather([2999]).state[0, 0, 0] == 2999
    return number
