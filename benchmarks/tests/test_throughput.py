"""The benchmark of steps counts what it should, notices wrong answers, and goes on without peers that are missing."""

from __future__ import annotations

import re

import numpy as np
import pytest

from benchmarks.memory import slots as memory
from benchmarks.peers import make as peers
from benchmarks.shared.rounds import WrongAnswer, barrier, check, sleeps, whoever_is_ready
from benchmarks.shared.vector_env import LARGE, OBS, Frames, Steps, gym_frames, gym_steps
from benchmarks.steps import large, placement, throughput


class Line:
    """Environments of this process: `exchange` gives back those that got an action, some of them later."""

    def __init__(self, slots, late=()):
        self.envs, self.late, self.waiting = [Steps() for _ in range(slots)], set(late), {}

    def step(self, actions):
        return np.stack([env.step(action)[0] for env, action in zip(self.envs, actions, strict=True)])

    def exchange(self, actions, slots):
        sent = {} if actions is None else {int(s): self.envs[s].step(a)[0] for s, a in zip(slots, actions, strict=True)}
        there = {**self.waiting, **sent}
        ready = {slot: obs for slot, obs in there.items() if slot not in self.late} or there
        self.waiting = {slot: obs for slot, obs in there.items() if slot not in ready}
        return np.array(list(ready)), np.stack(list(ready.values()))


def table_of(said):
    """Rows of the first table, without its head."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in said.splitlines() if line.startswith("|")]
    return rows[2:]


# What a round counts.


def test_sleeps_have_the_mean_that_was_asked_and_only_the_first_slot_is_slow():
    drawn = sleeps({"mean": 0.05, "sigma": 0.8, "slow": 50.0, "seed": 3}, 64)
    assert drawn[1:].mean() == pytest.approx(0.05, rel=0.02)
    assert np.log(drawn[1:]).std() == pytest.approx(0.8, rel=0.02)
    assert drawn[0].mean() == pytest.approx(50 * 0.05, rel=0.15)
    np.testing.assert_array_equal(drawn, sleeps({"mean": 0.05, "sigma": 0.8, "slow": 50.0, "seed": 3}, 64))
    np.testing.assert_array_equal(sleeps({"mean": 0.25}, 2), 0.25)


def test_a_round_with_a_barrier_counts_every_step_and_the_sleep_of_each():
    found = barrier(Line(3).step, 3, {"seconds": 0.5, "mean": 0.001})
    batches = found["counts"][0]
    assert batches > 1
    assert found["counts"] == [batches] * 3
    assert found["steps"] == 3 * batches
    assert found["slept"] == pytest.approx([batches * 0.001] * 3)
    assert found["seconds"] >= max(0.5, sum(found["slept"]))
    assert 0 < throughput.share(found) <= 1 / 3  # these three sleep one after the other


def test_a_round_of_whoever_is_ready_counts_each_slot_by_itself_and_leaves_nothing_under_way():
    line = Line(3, late={2})
    found = whoever_is_ready(line.exchange, 3, {"seconds": 0.5, "mean": 0.001, "warm": 0.01})
    assert found["counts"][0] == found["counts"][1] > 1
    assert found["counts"][2] <= 1
    assert found["steps"] == sum(found["counts"])
    assert found["slept"] == pytest.approx([0.001 * count for count in found["counts"]])
    assert line.waiting == {}


def test_an_answer_to_another_slot_is_noticed():
    line = Line(2)

    def swapped(actions, slots):
        ready, obs = line.exchange(actions, slots)
        return ready, obs[::-1]

    with pytest.raises(WrongAnswer):
        barrier(lambda actions: line.step(actions)[::-1], 2, {"seconds": 0.01})
    with pytest.raises(WrongAnswer):
        whoever_is_ready(swapped, 2, {"seconds": 0.01})


def test_the_two_forms_of_the_environment_are_one():
    action = np.full(22, 0.5, np.float32) * np.float32([0, 1] * 11)
    for env in (Steps(), gym_steps()):
        assert env.reset()[0].shape == env.observation_space.shape == (OBS,)
        obs = env.step(action)[0]
        np.testing.assert_array_equal(obs, np.full(OBS, 0.5, np.float32), strict=True)
        for space in (env.observation_space, env.action_space):
            assert space.dtype == np.float32
    np.testing.assert_array_equal(Steps.action_space.high, gym_steps().action_space.high)


@pytest.mark.parametrize("kind", LARGE)
def test_large_observations_repeat_the_mark_of_their_action(kind):
    action = np.zeros(22, np.float32)
    action[1] = 249
    for env in (Frames(kind), gym_frames(kind)):
        obs = env.step(action)[0]
        assert env.reset()[0].shape == env.observation_space.shape == obs.shape == LARGE[kind][0]
        assert env.observation_space.dtype == obs.dtype == LARGE[kind][1]
        obs = env.step(action)[0][None]
        check(obs, action[1:2])
        obs[0, -1, -1] += 1
        with pytest.raises(WrongAnswer):
            check(obs, action[1:2])


@pytest.mark.parametrize("serial", [0.0, 0.001, 0.02])
def test_the_serial_fraction_is_amdahls(serial):
    speedups = {n: 1 / (serial + (1 - serial) / n) for n in (1, 2, 4, 8, 16, 32, 64)}
    assert throughput.serial_fraction({n: s / n for n, s in speedups.items()}) == pytest.approx(serial, abs=1e-12)


# Placement, and the time until a policy is good.


def test_the_shortest_time_for_a_few_episodes_is_that_of_the_best_order():
    fast, slow = (placement.LENGTH * each for each in (placement.STEP, placement.SLOW))
    assert [placement.shortest(n) for n in (1, placement.EACH)] == pytest.approx([fast, fast])
    assert placement.shortest(2 * placement.EACH) == pytest.approx(2 * fast)
    assert placement.shortest(4 * placement.EACH) == pytest.approx(max(3 * fast, slow))


@pytest.mark.slow
def test_placement_is_measured_in_short(tmp_path, capfd):
    placement.main(["--rounds", "1", "--seconds", "0.3", "--out", str(tmp_path)])
    said = capfd.readouterr().out
    assert [row[0] for row in table_of(said) if row[0].isdigit()] == [str(count) for count in placement.FEW]
    for name in ("AsyncVectorEnv", "make_vec, ahead=4", "by itself", "when the caller is back"):
        assert f"| {name} | " in said


@pytest.mark.slow
def test_the_time_until_a_policy_is_good_is_that_of_its_first_good_copy(tmp_path, monkeypatch, capfd):
    from benchmarks.steps import wallclock  # with TensorFlow

    monkeypatch.setitem(wallclock.SETTINGS, "nb_steps_warmup", 150)
    words = ["--slots", "1", "2", "--steps", "300", "--sleep", "0", "--out", str(tmp_path)]
    assert wallclock.main(words) == 1
    assert "not within" in capfd.readouterr().out
    monkeypatch.setattr(wallclock, "GOAL", -5000.0)
    assert wallclock.main(words) == 0
    assert [row[2] for row in table_of(capfd.readouterr().out)] == ["200", "200"]


# Peers that are missing or fail.


def test_a_peer_that_is_not_installed_or_cannot_start_is_a_row_and_no_crash(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(peers, "HOME", tmp_path / "nothing")
    monkeypatch.setitem(throughput.LIBRARIES, "ray", throughput.Library("not Ray", None))  # in a Python without it
    words = ["--cases", "noop", "--slots", "1", "--rounds", "1", "--seconds", "0.02", "--peers", "sb3", "ray"]
    assert throughput.main([*words, "--out", str(tmp_path)]) == 1
    said = capfd.readouterr().out
    assert [row[:3] for row in table_of(said)] == [["1", "SB3 SubprocVecEnv", "missing"], ["1", "not Ray", "missing"]]
    assert re.search(r"^SB3 SubprocVecEnv is missing: .*nothing/vector is missing", said, re.MULTILINE)
    assert re.search(r"^not Ray is missing: .*ended \(1\)", said, re.MULTILINE)


@pytest.mark.slow
def test_no_op_steps_are_measured_beside_gymnasiums(tmp_path, capfd):
    words = ["--cases", "noop", "--slots", "2", "--rounds", "1", "--seconds", "0.05", "--peers", "async"]
    assert throughput.main([*words, "--out", str(tmp_path)]) == 0
    rows = table_of(capfd.readouterr().out)
    assert [(row[0], row[1], row[3]) for row in rows] == [
        (slots, "AsyncVectorEnv", ours) for slots in ("1", "2") for ours in ("FarmVectorEnv.step", "Farmer.step")
    ]
    for row in rows:
        its, mine, ratio = float(row[2]), float(row[4]), float(row[5])
        assert its > 0
        assert mine / its == pytest.approx(ratio, rel=0.1, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(set(throughput.CASES) - {"noop"}))
def test_each_other_case_runs_in_short(case, tmp_path, capfd):
    words = ["--cases", case, "--slots", "4", "--rounds", "1", "--seconds", "0.5", "--peers", "async"]
    assert throughput.main([*words, "--out", str(tmp_path)]) == 0
    said = capfd.readouterr().out
    assert len(table_of(said)) >= 1
    assert "missing" not in said
    if case == "straggler":
        assert table_of(said)[1] == ["results discarded", "0", "<= 0: met"]
    if case == "scaling":
        assert (tmp_path / "scaling.png").read_bytes()[:4] == b"\x89PNG"
        assert str(tmp_path / "scaling.png") in said


@pytest.mark.slow
def test_large_observations_are_measured_in_short(tmp_path, capfd):
    words = ["--slots", "2", "--rounds", "1", "--seconds", "0.1", "--out", str(tmp_path)]
    assert large.main(words) == 0
    rows = table_of(capfd.readouterr().out)
    libraries = [*throughput.BOTH, *large.PEERS.values()]
    assert [tuple(row[:3]) for row in rows] == [(kind, "2", name) for kind in LARGE for name in libraries]
    for row in rows:
        size = 84 * 84 * 4 if row[0].startswith("84") else 1 << 20
        assert float(row[4]) == pytest.approx(size / float(row[3]), rel=0.1)
        assert (row[6] == "") == (row[2] not in throughput.BOTH)


@pytest.mark.slow
def test_memory_is_measured_in_short(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(memory, "MANY", 12)
    assert memory.main(["--rounds", "1", "--steps", "5", "--out", str(tmp_path)]) == 0
    rows = table_of(capfd.readouterr().out)
    figures = [float(row[2].split()[0]) for row in rows]
    assert len(figures) == 4
    assert (
        10 < figures[0] < 500
    )  # MB of the farm: far from what any Python with numpy holds it would be a wrong process
