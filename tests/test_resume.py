"""Under the schedule `sync` a training that was saved, killed and loaded goes on to the bit as if nothing had happened.

Episodes end by a time limit of LENGTH steps, so that N steps over SLOTS environments are whole episodes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
from farms import ROOT, TESTS
from helpers import poll_until
from learner_parts import AGENTS, Wander, annealed_noise, assert_same, everything_of, hidden

from agents import LocalPool, ReplayMemory
from agents.checkpoint import Checkpointer

SLOTS, LENGTH, N = 2, 5, 60


def fresh(name, **settings):
    """An agent as a script makes it at its start."""
    settings = dict({"schedule": "sync", "nb_actions": 1, "memory": ReplayMemory(100, seed=3)}, **settings)
    if name == "DDPG":
        settings.setdefault("random_process", annealed_noise(2 * N))
        settings["nb_steps_warmup_actor"] = 20  # another phase than the critic's
    else:
        settings["nb_steps_warmup"] = 10
    return AGENTS[name](optimizer=keras.optimizers.Adam(1e-2, clipnorm=1.0), **settings)


def pool():
    """New environments; what they do follows from the agent's seeds."""
    return LocalPool([Wander(LENGTH) for _ in range(SLOTS)])


def train(agent, steps=N):
    agent.fit(pool(), steps, verbose=0)
    return agent


def disturb(agent):
    """Makes another of every state that a load must put right."""
    np.random.seed(999)
    agent.rng.uniform(size=17)
    agent.memory.rng.uniform(size=5)


@pytest.fixture(scope="module", params=AGENTS)
def saved(request, tmp_path_factory):
    """(name, folder of a save after N steps, everything after N more without a save between)."""
    folder = tmp_path_factory.mktemp("save") / request.param
    agent = train(fresh(request.param))
    assert agent.nb_updates > 0
    Checkpointer(folder).save(agent)
    return request.param, folder, everything_of(train(agent))


@pytest.mark.slow
def test_a_loaded_agent_is_the_saved_one_to_the_bit(saved, tmp_path):
    name, folder, _ = saved
    agent = train(fresh(name))
    before = everything_of(agent)
    other = fresh(name, nb_actions=1)
    disturb(other)
    Checkpointer(folder).load(other)
    other.prepare(pool())  # the environment's observations are then known, and their statistics in place
    loaded = everything_of(other)
    assert_same(before, loaded)


@pytest.mark.slow
def test_n_steps_a_save_a_load_and_n_steps_are_two_times_n_steps(saved):
    name, folder, wanted = saved
    agent = fresh(name)
    disturb(agent)
    Checkpointer(folder).load(agent)
    assert_same(everything_of(train(agent)), wanted)
    assert agent.step == 2 * N
    assert agent.memory.count > agent.memory.limit  # the ring has turned


@pytest.mark.slow
def test_two_fits_of_n_steps_are_one_of_two_n(saved):
    name, _, wanted = saved
    assert_same(everything_of(train(fresh(name), 2 * N)), wanted)


@pytest.mark.slow
def test_an_agent_of_another_seed_becomes_another_one(saved):
    name, _, (wanted, _) = saved
    arrays, _ = everything_of(train(fresh(name, seed=8), 2 * N))
    for part in ("actor/0", "target_critic/0", "critic_optimizer/2", "replay/obs/0", "replay/action"):
        assert not np.array_equal(arrays[part], wanted[part]), part


@pytest.mark.slow
def test_three_saves_on_the_way_change_nothing(saved, tmp_path):
    name, _, wanted = saved
    agent = fresh(name)
    for _ in range(4):
        train(agent, N // 2)
        Checkpointer(tmp_path).save(agent)
        agent = fresh(name)
        disturb(agent)
        Checkpointer(tmp_path).load(agent)
    agent.prepare(pool())
    assert_same(everything_of(agent), wanted)


def test_a_save_before_the_next_fit_keeps_the_statistics_of_observations(saved, tmp_path):
    name, folder, _ = saved
    agent = fresh(name)
    Checkpointer(folder).load(agent)
    Checkpointer(tmp_path).save(agent)  # the environment was not seen yet
    again = fresh(name)
    Checkpointer(tmp_path).load(again)
    again.prepare(pool())
    agent.prepare(pool())
    assert agent.norm.count > 0
    assert_same(everything_of(again), everything_of(agent))


def regularised_models(name):
    """Networks with dropout and batch normalisation, whose states are part of a training too."""
    outputs = 2 if name == "SAC" else 1
    seen = keras.Input((1, 3), name="observation")
    x = keras.layers.Dropout(0.3)(keras.layers.BatchNormalization()(keras.layers.Flatten()(seen)))
    actor = keras.Model(seen, keras.layers.Dense(outputs, "tanh")(hidden(x)))
    critics = []
    for _ in range(outputs):
        action, state = keras.Input((1,), name="action"), keras.Input((1, 3), name="seen")
        x = keras.layers.Concatenate()([action, keras.layers.Flatten()(state)])
        x = keras.layers.Dropout(0.3)(keras.layers.BatchNormalization()(hidden(x)))
        critics.append((keras.Model([action, state], keras.layers.Dense(1)(x)), action))
    if name == "SAC":
        return actor, [critic for critic, _ in critics], critics[0][1]
    return actor, *critics[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", AGENTS)
def test_dropout_and_batch_normalisation_go_on_where_they_were(name, tmp_path):
    def another():
        keras.utils.set_random_seed(7)
        return fresh(name, models=regularised_models(name))

    agent = train(another())
    Checkpointer(tmp_path).save(agent)
    wanted = everything_of(train(agent))
    again = another()
    Checkpointer(tmp_path).load(again)
    assert_same(everything_of(train(again)), wanted)


# Across a kill.

PLAYER = """
import sys, time
sys.path[:0] = sys.argv[1:3]
from test_resume import fresh, train
from agents.checkpoint import Checkpointer
agent = train(fresh(sys.argv[3]))
Checkpointer(sys.argv[4]).save(agent)
print("saved", flush=True)
time.sleep(100)
"""

SUCCESSOR = """
import json, sys
sys.path[:0] = sys.argv[1:3]
import numpy as np
from learner_parts import everything_of
from test_resume import fresh, train
from agents.checkpoint import Checkpointer
agent = fresh(sys.argv[3])
Checkpointer(sys.argv[4]).load(agent)
arrays, values = everything_of(train(agent))
np.savez(sys.argv[5], **arrays)
with open(sys.argv[5] + ".json", "w") as file:
    json.dump(values, file)
"""


def started(script, *args):
    """A process that runs a script with these arguments."""
    return subprocess.Popen(
        [sys.executable, "-c", script, str(TESTS), str(ROOT), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ, TF_CPP_MIN_LOG_LEVEL="3"),
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_training_is_taken_over_by_another_process_to_the_bit(saved, tmp_path):
    name, _, (arrays, values) = saved
    player = started(PLAYER, name, tmp_path / "save")
    with player:
        assert player.stdout.readline() == "saved\n"
        player.send_signal(signal.SIGKILL)
        poll_until(lambda: player.poll() is not None, 30, "the player's end")
    assert player.returncode == -signal.SIGKILL
    successor = started(SUCCESSOR, name, tmp_path / "save", tmp_path / "result.npz")
    _, said = successor.communicate(timeout=200)
    assert successor.returncode == 0, said
    with np.load(tmp_path / "result.npz") as file:
        assert_same(
            ({key: file[key] for key in file.files}, json.loads((tmp_path / "result.npz.json").read_text())),
            (arrays, json.loads(json.dumps(values))),
        )
