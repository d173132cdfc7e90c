"""Saves: what comes back goes on as before, and a kill at any instant leaves the saves before it whole."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import keras
import numpy as np
import pytest
from agent_parts import Counter, linear_agent
from checkpoint_agent import Teller, check_one_moment, replay_of
from rl.memory import SequentialMemory
from rl.random import OrnsteinUhlenbeckProcess

from agents import LocalPool, make_sac
from agents.checkpoint import Autosave, Checkpointer, checkpointer, files, manifests
from agents.checkpoint import segments as file_segments

ROOT = Path(__file__).resolve().parents[1]


def played(steps=40, **settings):
    agent = Teller(**settings)
    agent.play(steps)
    return agent


def save(agent, folder, **settings):
    return Checkpointer(folder, **settings).save(agent, {"step": agent.step})


def loaded(folder, **settings):
    """A new agent with what lies in the folder, and the name of the save that it came from."""
    agent, saves = Teller(**settings), Checkpointer(folder)
    check_one_moment(agent, saves.load(agent))
    return agent, saves.loaded.name


def assert_same_replay(one, other):
    first, second = replay_of(one.memory), replay_of(other.memory)
    assert first.keys() == second.keys()
    for name, column in first.items():
        np.testing.assert_array_equal(column, second[name])
        assert column.dtype == second[name].dtype


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def segments(folder):
    return {path.name: path for path in (folder / "replay").iterdir()}


def rows_of(path):
    return np.load(path)["numbers"]


def manifest_of(path):
    return json.loads((path / "manifest.json").read_text())


@pytest.fixture
def no_syncing(monkeypatch):
    """For tests of many saves: waiting for the disk is most of their time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# What a save holds.


def test_what_is_loaded_is_bit_for_bit_what_was_saved(tmp_path):
    agent = played()
    agent.memory.cut_all()  # loading ends running episodes; with none running nothing at all may differ
    extra = {"episodes": [[1.1, 2], [float("inf"), 3]], "name": "Zähler", "count": np.int64(7), "row": np.arange(2)}
    path = Checkpointer(tmp_path / "a" / "b").save(agent, extra)
    other = Teller(seed=5)
    assert Checkpointer(tmp_path / "a" / "b").load(other) == dict(extra, count=7, row=[0, 1])
    assert_same_replay(agent, other)
    check_one_moment(other, {"step": agent.step})
    assert other.rng.bit_generator.state == agent.rng.bit_generator.state
    assert other.memory.draw(5).reward.tolist() == agent.memory.draw(5).reward.tolist()
    manifest = manifest_of(path)
    assert (manifest["format"], manifest["agent"], manifest["step"], manifest["updates"]) == (2, "Teller", 40, 80)
    assert manifest["configuration"]["size"] == 50
    assert re.match(r"20\d\d-\d\d-\d\dT", manifest["written"])


def test_an_agent_that_has_not_played_yet_is_saved_too(tmp_path):
    save(Teller(), tmp_path)
    agent, _ = loaded(tmp_path)
    assert agent.memory.count == 0
    assert names(tmp_path) == ["save-000001"]
    agent.play(5)
    save(agent, tmp_path)
    assert_same_entries_after_load(agent, tmp_path)


def assert_same_entries_after_load(agent, folder):
    """Loading truncates the episodes that were running; so both are compared after that."""
    other, _ = loaded(folder, limit=agent.memory.limit)
    agent.memory.cut_all()
    assert_same_replay(agent, other)


def test_the_learner_is_kept_out_while_the_agent_is_saved_and_loaded(tmp_path):
    agent = played()
    save(agent, tmp_path)
    assert agent.pauses == 1
    Checkpointer(tmp_path).load(agent)
    assert agent.pauses == 2


# Replay is appended.


def test_a_second_save_writes_only_new_and_changed_entries(tmp_path):
    agent = Teller(limit=5000)
    agent.play(2000)
    saves = Checkpointer(tmp_path)
    saves.save(agent, {"step": agent.step})
    first = segments(tmp_path)
    count = agent.memory.count
    agent.play(20)
    changed = agent.memory.changed(count)
    assert 10 < len(changed) < 60
    assert changed[0] < count, "an entry that was saved before is changed"
    saves.save(agent, {"step": agent.step})
    (new,) = segments(tmp_path).keys() - first.keys()
    np.testing.assert_array_equal(rows_of(tmp_path / "replay" / new), changed)
    assert segments(tmp_path)[new].stat().st_size < 10_000 < 40_000 < sum(p.stat().st_size for p in first.values())
    assert_same_entries_after_load(agent, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("per_save", [1, 7, 59, 60, 61, 200])
def test_saves_of_a_ring_that_wraps_between_them_come_back_whole(tmp_path, per_save, monkeypatch, no_syncing):
    monkeypatch.setattr(file_segments, "SMALL_SEGMENTS", 5)
    monkeypatch.setattr(file_segments, "SEGMENT_BYTES", 10_000)
    agent, saves = Teller(limit=60), Checkpointer(tmp_path, keep=2)
    for _ in range(max(20, 150 // per_save)):
        agent.play(per_save)
        saves.save(agent, {"step": agent.step})
        other, _ = loaded(tmp_path)
        mine, theirs = replay_of(agent.memory), replay_of(other.memory)
        for name in mine.keys() - {"truncated"}:  # the other's running episodes are over
            np.testing.assert_array_equal(mine[name], theirs[name])
    held = sum(len(rows_of(path)) for path in segments(tmp_path).values())
    assert held <= 2 * 2 * 60 + 2 * per_save, "%d rows lie there for a ring of 60" % held
    assert len(segments(tmp_path)) < 15


def test_many_small_segments_become_one(tmp_path, monkeypatch, no_syncing):
    monkeypatch.setattr(file_segments, "SMALL_SEGMENTS", 5)
    agent, saves = Teller(limit=10_000), Checkpointer(tmp_path, keep=1)
    most = []
    for _ in range(30):
        agent.play(20)
        saves.save(agent, {"step": agent.step})
        most.append(len(segments(tmp_path)))
    assert max(most) == 6
    assert_same_entries_after_load(agent, tmp_path)


def test_much_replay_is_written_in_several_segments(tmp_path, monkeypatch):
    agent = played(500, limit=2000)
    monkeypatch.setattr(file_segments, "SEGMENT_BYTES", 5000)
    save(agent, tmp_path)
    sizes = [path.stat().st_size for path in segments(tmp_path).values()]
    assert len(sizes) > 3
    assert max(sizes) < 5000 + 3000  # headers weigh much in such small ones
    assert_same_entries_after_load(agent, tmp_path)


def test_a_process_that_goes_on_from_a_folder_appends_to_it(tmp_path):
    save(played(1000, limit=5000), tmp_path)
    before = segments(tmp_path)
    agent, saves = Teller(limit=5000), Checkpointer(tmp_path)
    saves.load(agent)
    agent.play(10)
    Checkpointer(tmp_path).save(agent, {"step": agent.step})  # known of the memory, whichever Checkpointer loaded it
    (new,) = segments(tmp_path).keys() - before.keys()
    assert len(rows_of(tmp_path / "replay" / new)) < 40
    assert_same_entries_after_load(agent, tmp_path)


def test_an_agent_that_did_not_come_from_the_folder_writes_its_whole_replay(tmp_path):
    first, second = played(30), played(35, seed=3)
    saves = Checkpointer(tmp_path)
    for turn in range(4):
        for agent in (first, second):
            agent.play(3 + turn)
            path = saves.save(agent, {"step": agent.step})
            other, name = loaded(tmp_path)
            assert name == path.name
            mine, theirs = replay_of(agent.memory), replay_of(other.memory)
            np.testing.assert_array_equal(mine["step"], theirs["step"])
            np.testing.assert_array_equal(mine["previous"], theirs["previous"])
    one, two = (manifest_of(tmp_path / ("save-%06d" % number))["replay"] for number in (7, 8))
    assert one["lineage"] != two["lineage"]
    assert not {entry["name"] for entry in one["segments"]} & {entry["name"] for entry in two["segments"]}


def test_a_memory_that_is_saved_to_two_folders_in_turn_is_whole_in_both(tmp_path):
    agent = played(20)
    for turn in range(6):
        agent.play(5)
        folder = tmp_path / ("even" if turn % 2 else "odd")
        save(agent, folder)
        other, _ = loaded(folder)
        np.testing.assert_array_equal(replay_of(agent.memory)["step"], replay_of(other.memory)["step"])


def test_segments_that_somebody_removed_are_written_again(tmp_path):
    agent = played(40)
    save(agent, tmp_path)
    shutil.rmtree(tmp_path / "replay")
    agent.play(2)
    path = save(agent, tmp_path)
    assert loaded(tmp_path)[1] == path.name


def test_loading_an_older_save_and_going_on_mixes_nothing(tmp_path):
    saves, agent = Checkpointer(tmp_path), played(20)
    for _ in range(2):
        agent.play(5)
        newest = saves.save(agent, {"step": agent.step})
    aside = tmp_path.with_name("aside")
    os.rename(newest, aside)
    branch, _ = loaded(tmp_path)
    os.rename(aside, newest)
    branch.play(9)
    path = save(branch, tmp_path)
    assert loaded(tmp_path)[1] == path.name
    shutil.rmtree(path)
    assert loaded(tmp_path)[1] == newest.name


# How many stay.


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_saves_stay_and_only_what_they_need(tmp_path, keep):
    saves, agent = Checkpointer(tmp_path, keep), played(10)
    steps = {}
    for _ in range(8):
        agent.play(30)
        steps[saves.save(agent, {"step": agent.step}).name] = agent.step
    kept = sorted(steps)[-keep:]
    assert names(tmp_path) == ["replay", *kept]
    needed = {entry["name"] for name in kept for entry in manifest_of(tmp_path / name)["replay"]["segments"]}
    assert set(segments(tmp_path)) == needed
    for name in reversed(kept):
        agent, found = loaded(tmp_path)
        assert (found, agent.step) == (name, steps[name])
        shutil.rmtree(tmp_path / name)


def test_a_damaged_save_does_not_count_among_those_kept(tmp_path):
    agent, saves = played(), Checkpointer(tmp_path, keep=2)
    paths = [saves.save(agent, {"step": agent.step}) for _ in range(2)]
    flip(paths[1] / "arrays.npz", -100)
    saves.load(agent)
    saves.save(agent, {"step": agent.step})
    assert paths[0].exists()
    saves.save(agent, {"step": agent.step})
    assert names(tmp_path) == ["replay", "save-000003", "save-000004"]


@pytest.mark.parametrize(("keep", "every"), [(0, None), (3, -1.0), (3, float("nan"))])
def test_senseless_settings_are_refused(keep, every, tmp_path):
    with pytest.raises(ValueError, match=r"not %r and %r" % (keep, every)):
        Checkpointer(tmp_path, keep, every)


# Damage.


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


DAMAGES = {
    "flipped": (lambda path: flip(path, path.stat().st_size // 2), r"is not as it was written|no manifest"),
    "truncated": (truncate, r"has \d+ bytes instead of \d+|is not as it was written"),
    "emptied": (lambda path: os.truncate(path, 0), r"has 0 bytes instead of|is no manifest"),
    "removed": (lambda path: path.unlink(), r"is missing"),
}


def two_saves(folder):
    """Two saves; the files of the newest that the other one does not need."""
    agent, saves = played(), Checkpointer(folder)
    saves.save(agent, {"step": agent.step})
    before = set(segments(folder).values())
    agent.play(10)
    newest = saves.save(agent, {"step": agent.step})
    (segment,) = set(segments(folder).values()) - before
    return {"manifest": newest / "manifest.json", "arrays": newest / "arrays.npz", "segment": segment}


@pytest.mark.slow
@pytest.mark.parametrize("what", ["manifest", "arrays", "segment"])
@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_save_is_passed_over_and_the_log_says_so(tmp_path, caplog, what, how):
    files = two_saves(tmp_path)
    damage, words = DAMAGES[how]
    damage(files[what])
    agent, name = loaded(tmp_path)
    assert (name, agent.step) == ("save-000001", 40)
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    text = record.getMessage()
    assert "save-000002 is damaged: %s" % files[what].name in text
    assert "save-000001 is taken instead" in text
    assert re.search(words, text)
    agent.play(5)
    assert save(agent, tmp_path).name == "save-000003"
    assert loaded(tmp_path)[1] == "save-000003"


@pytest.mark.slow
def test_no_single_flipped_bit_goes_unseen(tmp_path, no_syncing):
    rng = np.random.default_rng(0)
    for path in two_saves(tmp_path).values():
        whole = path.read_bytes()
        for at in [*range(40), *rng.integers(0, len(whole), 60)]:
            flip(path, int(at))
            assert loaded(tmp_path)[1] == "save-000001", "byte %d of %s" % (at, path.name)
            path.write_bytes(whole)
    assert loaded(tmp_path)[1] == "save-000002"


def test_where_every_save_is_damaged_the_error_tells_each_one(tmp_path):
    two_saves(tmp_path)
    (tmp_path / "save-000002" / "arrays.npz").unlink()
    truncate(tmp_path / "save-000001" / "arrays.npz")
    agent = played(7)
    with pytest.raises(
        FileNotFoundError, match=r"(?s)is whole:.*save-000002: arrays.npz is missing.*save-000001: arra"
    ):
        Checkpointer(tmp_path).load(agent)
    assert agent.step == 7


def test_what_a_killed_save_left_is_ignored_and_swept_by_the_next(tmp_path):
    agent = played()
    save(agent, tmp_path)
    (tmp_path / "save-000009.part").mkdir()
    (tmp_path / "save-000009.part" / "arrays.npz").write_bytes(b"PK half")
    (tmp_path / "replay" / "segment-000077_0-9_00000000.npz.part").write_bytes(b"PK half")
    (tmp_path / "replay" / "segment-000078_0-9_00000000.npz").write_bytes(b"PK of no save")
    assert loaded(tmp_path)[1] == "save-000001"
    agent.play(3)
    path = save(agent, tmp_path)
    assert loaded(tmp_path)[1] == path.name
    assert names(tmp_path) == ["replay", "save-000001", path.name]
    assert not [name for name in segments(tmp_path) if "00000000" in name]


# What does not fit.


def test_a_folder_without_a_save_says_so(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*; save\(\) writes one"):
            Checkpointer(folder).load(Teller())
    assert names(tmp_path) == []


class Other(Teller):
    pass


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: played(7, size=60), r"save-000001 does not fit this agent: 50 weights, not 60"),
        (lambda: played(7, limit=61), r"does not fit this agent: .*holds 60 transitions, this agent's 61"),
        (Other, r"is of another agent: a Teller, this is a Other"),
    ],
)
def test_a_save_of_an_agent_of_another_form_is_refused_and_changes_nothing(tmp_path, make, words):
    save(played(), tmp_path)
    agent = make()
    weights, replay, step = agent.weights.copy(), replay_of(agent.memory), agent.step
    with pytest.raises(ValueError, match=words):
        Checkpointer(tmp_path).load(agent)
    np.testing.assert_array_equal(agent.weights, weights)
    assert agent.step == step
    for name, column in replay_of(agent.memory).items():
        np.testing.assert_array_equal(column, replay[name])


def test_a_save_of_another_format_is_refused_with_both_formats(tmp_path):
    save(played(), tmp_path)
    old = tmp_path / "save-000002"  # as format 1 wrote it
    old.mkdir()
    (old / "manifest.json").write_text('{"format": 1, "agent": "Teller", "step": 3}')
    with pytest.raises(ValueError, match=r"save-000002 is of format 1, this program reads format 2"):
        Checkpointer(tmp_path).load(Teller())


def test_a_newer_programs_segments_are_not_removed(tmp_path, monkeypatch):
    agent = played()
    monkeypatch.setattr(manifests, "FORMAT", 3)
    save(agent, tmp_path)
    theirs = set(segments(tmp_path))
    monkeypatch.setattr(manifests, "FORMAT", 2)
    save(played(seed=3), tmp_path)
    assert theirs <= set(segments(tmp_path))


def test_keras_rls_own_memory_is_refused_before_anything_is_written(tmp_path):
    agent = Teller()
    agent.memory = SequentialMemory(50, window_length=1)
    with pytest.raises(TypeError, match=r"replay of agents.ReplayMemory"):
        Checkpointer(tmp_path / "new").save(agent)
    assert not (tmp_path / "new").exists()


def test_what_is_no_plain_data_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match=r"plain data: .*PosixPath"):
        Checkpointer(tmp_path / "new").save(played(), {"path": tmp_path})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_diverged_agent_is_never_saved(tmp_path, value):
    agent = played()
    save(agent, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    agent.weights[3] = value
    with pytest.raises(FloatingPointError, match=r"actor/0 holds NaN or infinity"):
        save(agent, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    assert loaded(tmp_path)[0].step == 40


# What cannot be written.


@contextlib.contextmanager
def no_big_files():
    """Writing more than 4,000 bytes to a file fails, as on a full disk; to any file, also the one pytest prints to."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("what", ["replay", "weights"])
def test_a_full_disk_is_told_in_words_and_leaves_the_save_before(tmp_path, what):
    agent = played(size=10)
    saves = Checkpointer(tmp_path)
    saves.save(agent, {"step": agent.step})
    before = sorted(tmp_path.rglob("*"))
    agent.play(60 if what == "replay" else 3)
    if what == "weights":
        agent.weights = np.full(2000, agent.step, np.float32)
    words = r"File too large: the checkpoint could not be written; the saves before it are"
    with pytest.raises(OSError, match=words), no_big_files():
        saves.save(agent, {"step": agent.step})
    assert sorted(tmp_path.rglob("*")) == before
    assert loaded(tmp_path, size=10)[0].step == 40


def test_the_save_after_one_that_failed_has_everything(tmp_path, monkeypatch):
    agent, saves = played(), Checkpointer(tmp_path)
    saves.save(agent, {"step": agent.step})
    for fail in ("rename", "fsync"):
        agent.play(4)
        with monkeypatch.context() as patch:
            patch.setattr(os, fail, refuse)
            with pytest.raises(PermissionError, match=r"Permission denied: the checkpoint could not be written"):
                saves.save(agent, {"step": agent.step})
        agent.play(4)
        saves.save(agent, {"step": agent.step})
        other, _ = loaded(tmp_path)
        np.testing.assert_array_equal(replay_of(agent.memory)["step"], replay_of(other.memory)["step"])


def refuse(*args, **kwargs):
    raise PermissionError(13, "Permission denied")


def test_a_folder_that_cannot_be_made_is_told_in_words(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match=r"the checkpoint could not be written"):
        save(played(), tmp_path / "file" / "folder")


def test_an_old_save_that_cannot_be_removed_does_not_fail_the_new_one(tmp_path, monkeypatch, caplog):
    agent, saves = played(), Checkpointer(tmp_path, keep=1)
    saves.save(agent, {"step": agent.step})
    agent.play(3)
    monkeypatch.setattr(shutil, "rmtree", refuse)
    path = saves.save(agent, {"step": agent.step})
    assert "is saved, but what it replaces cannot be removed" in caplog.text
    monkeypatch.undo()
    assert loaded(tmp_path)[1] == path.name


def test_two_that_save_to_one_folder_at_once_take_turns(tmp_path):
    agents, errors = [played(seed=seed) for seed in range(2)], []

    def saving(agent):
        try:
            saves = Checkpointer(tmp_path, keep=1)
            for _ in range(15):
                agent.play(5)
                saves.save(agent, {"step": agent.step})
                loaded(tmp_path)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=saving, args=(agent,)) for agent in agents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert len(names(tmp_path)) == 2


def test_a_folder_that_stays_locked_is_told_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_LIMIT", 0.05)
    agent = played()
    save(agent, tmp_path)
    with files.locked(tmp_path, exclusive=True):
        with pytest.raises(TimeoutError, match=r"another process has been saving to it for 0.05 s"):
            save(agent, tmp_path)
        with pytest.raises(TimeoutError, match=r"another process"):
            loaded(tmp_path)


# Of real agents.


def ddpg(**settings):
    noise = OrnsteinUhlenbeckProcess(theta=0.15, sigma=0.5, sigma_min=0.1, n_steps_annealing=500)
    warm = {"batch_size": 8, "nb_steps_warmup_critic": 20, "nb_steps_warmup_actor": 20}
    settings = dict(dict(warm, random_process=noise, schedule="sync"), **settings)
    return linear_agent(optimizer=keras.optimizers.Adam(0.01), **settings)


def sac():
    pool = counters()
    settings = {"hidden": (8,), "memory_limit": 150, "batch_size": 8, "nb_steps_warmup": 20, "schedule": "sync"}
    return make_sac(pool.observation_space, pool.action_space, seed=3, **settings)


def counters():
    return LocalPool([Counter(5, slot) for slot in range(3)])


def assert_same_agent(one, other):
    (arrays, values), (theirs, others) = one.state(), other.state()
    assert arrays.keys() == theirs.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)
    assert values == others
    assert_same_replay(one, other)


@pytest.mark.parametrize("make", [ddpg, pytest.param(sac, marks=pytest.mark.slow)])
def test_a_loaded_agent_goes_on_as_the_saved_one_does(tmp_path, make):
    first, second = make(), make()
    first.fit(counters(), nb_steps=103, verbose=0)
    Checkpointer(tmp_path).save(first, {"episodes": [1.5]})
    first.fit(counters(), nb_steps=100, verbose=0)
    assert first.step == 203
    assert first.nb_updates > 100
    assert Checkpointer(tmp_path).load(second) == {"episodes": [1.5]}  # random states too, numpy's own among them
    assert second.step == 103
    second.fit(counters(), nb_steps=100, verbose=0)
    assert_same_agent(first, second)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ddpg(obs_dim=4), r"other networks or another environment"),
        (lambda: linear_agent(optimizer=keras.optimizers.SGD(0.1)), r"other networks or optimizers"),
    ],
)
def test_a_real_save_that_does_not_fit_changes_nothing(tmp_path, make, words):
    trained = ddpg()
    trained.fit(counters(), nb_steps=30, verbose=0)
    Checkpointer(tmp_path).save(trained)
    agent = make()
    arrays, values = agent.state()
    with pytest.raises(ValueError, match=words):
        Checkpointer(tmp_path).load(agent)
    now, numbers = agent.state()
    assert numbers == values
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, now[name])
    assert agent.memory.count == 0


def test_autosave_saves_in_the_middle_of_a_training(tmp_path):
    agent, saves = ddpg(schedule="overlap"), Checkpointer(tmp_path, every_s=0)
    agent.fit(counters(), nb_steps=60, verbose=0, callbacks=[Autosave(saves, lambda: {"step": agent.step})])
    other = ddpg()
    assert saves.load(other) == {"step": other.step} == {"step": 60}
    assert other.memory.count == agent.memory.count
    assert len(names(tmp_path)) == 4


# By time.


def test_autosave_saves_when_it_is_time(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(checkpointer.time, "monotonic", lambda: now[0])
    agent, saves = played(), Checkpointer(tmp_path, every_s=60)
    callback = Autosave(saves, lambda: {"step": agent.step})
    callback.set_model(agent)
    made = []
    for second in range(200):
        now[0] = 1000.0 + second
        agent.play(1)
        callback.on_step_end(second, {})
        made.append(len(list(tmp_path.glob("save-*"))))
    callback.on_train_end({})
    assert [made.index(count) for count in (1, 2, 3)] == [60, 120, 180]
    assert made[-1] == len(list(tmp_path.glob("save-*"))) == 3
    assert loaded(tmp_path)[0].step == 40 + 181


def test_without_a_time_it_is_never_due(tmp_path):
    assert not Checkpointer(tmp_path).due()
    assert Checkpointer(tmp_path, every_s=0).due()


def test_an_autosave_that_cannot_be_written_is_logged_and_waits_again(tmp_path, monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(checkpointer.time, "monotonic", lambda: now[0])
    agent, saves = played(), Checkpointer(tmp_path, every_s=60)
    callback = Autosave(saves)
    callback.set_model(agent)
    now[0] = 61.0
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        callback.on_step_end(0, {})
    assert "could not be written" in caplog.text
    assert not saves.due()
    now[0] = 122.0
    callback.on_step_end(1, {})
    assert saves.load(agent) == {}
    agent.weights[0] = np.nan
    now[0] = 200.0
    with pytest.raises(FloatingPointError):
        callback.on_step_end(2, {})


# Kills.


def test_what_lies_there_between_any_two_operations_is_whole(tmp_path, monkeypatch):
    """Stops at each call that changes a folder: what a kill would leave loads, and all a new save names is synced."""
    monkeypatch.setattr(file_segments, "SEGMENT_BYTES", 2000)
    monkeypatch.setattr(file_segments, "SMALL_SEGMENTS", 4)
    folder, copy = tmp_path / "saves", tmp_path / "copy"
    synced, seen, looking = set(), [0], [False]
    agent, saves = played(100), Checkpointer(folder, keep=2)
    saves.save(agent, {"step": agent.step})

    def look():
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        other, name = loaded(copy)
        found = [path for path in copy.glob("save-*") if not path.name.endswith(".part")]
        assert name == max(path.name for path in found)
        assert all(names(path) == ["arrays.npz", "manifest.json"] for path in found)
        assert other.step in (agent.step, before)
        seen[0] += 1

    def watched(name, real):
        def call(*args, **kwargs):
            if looking[0]:
                return real(*args, **kwargs)
            looking[0] = True
            try:
                if name == "rename" and re.fullmatch(r"save-\d+", Path(args[1]).name):
                    source = Path(args[0])
                    named = [source / "arrays.npz", source / "manifest.json", source, folder / "replay"]
                    named += [folder / "replay" / s["name"] for s in manifest_of(source)["replay"]["segments"]]
                    assert {path.stat().st_ino for path in named} <= synced
                look()
                result = real(*args, **kwargs)
                if name == "fsync":
                    synced.add(os.fstat(args[0]).st_ino)
                look()
                return result
            finally:
                looking[0] = False

        return call

    for path in folder.rglob("*"):
        synced.add(path.stat().st_ino)  # by the save before
    for name in ("fsync", "rename", "mkdir", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, watched(name, getattr(os, name)))
    for _ in range(3):
        before = agent.step
        agent.play(40)
        saves.save(agent, {"step": agent.step})
    assert seen[0] > 50


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kill_9_at_200_random_instants_of_saving_leaves_the_newest_save_whole(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "checkpoint_kills.py"), str(tmp_path / "saves"), "200"],
        env=dict(os.environ, PYTHONPATH=os.pathsep.join((str(ROOT), str(ROOT / "tests")))),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["loaded"] == 200
    assert found["halves"] > 50, "most kills came between two saves: %s" % found
    assert found["most"] < 60, "leftovers pile up: %s" % found
