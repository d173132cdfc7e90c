"""The OpenSim recipes, each run in the OpenSim Python and compared with osim-rl itself.

make osim && .venv/bin/python -m pytest tests/test_osim.py
"""

from __future__ import annotations

import json
import pathlib
import subprocess

import numpy as np
import pytest

import simulators

ROOT = pathlib.Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".venv-osim" / "bin" / "python"

pytestmark = [pytest.mark.osim, pytest.mark.timeout(300)]  # the arm's steps can take seconds


class Answer(dict):
    """The arrays that the probe wrote; `printed` is what came on its stdout, `files` what appeared in its folder."""

    printed: str
    files: list[str]


@pytest.fixture
def probe(tmp_path):
    """`probe(command, recipe, kwargs, **more)` runs `osim_probe.py` in a folder of its own."""
    if not PYTHON.exists():
        pytest.fail(f"no OpenSim environment at {PYTHON}: run `make osim` (or leave these out: -m 'not osim')")

    def run(command, recipe, kwargs=None, **more):
        out = tmp_path / "out.npz"
        here = tmp_path / "here"
        here.mkdir(exist_ok=True)
        arguments = json.dumps({"recipe": recipe, "kwargs": kwargs or {}, **more})
        line = [str(PYTHON), str(ROOT / "tests" / "osim_probe.py"), command, arguments, str(out)]
        done = subprocess.run(line, cwd=here, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stderr
        with np.load(out) as arrays:
            answer = Answer({name: arrays[name] for name in arrays.files})
        answer.printed = done.stdout
        answer.files = sorted(path.name for path in here.iterdir())
        return answer

    return run


@pytest.mark.parametrize(
    ("recipe", "kwargs", "size", "muscles", "limit"),
    [
        ("L2M2019", {}, 339, 22, 2500),
        ("L2M2019", {"difficulty": 0, "model": "2D"}, 339, 22, 1000),
        ("L2M2019", {"max_episode_steps": 7}, 339, 22, 7),
        ("Arm2D", {}, 16, 6, 200),
    ],
)
def test_spaces_are_flat_float32_and_actions_lie_between_0_and_1(probe, recipe, kwargs, size, muscles, limit):
    found = probe("spaces", recipe, kwargs)
    assert tuple(found["observation_shape"]) == (size,)
    np.testing.assert_array_equal(found["action_low"], np.zeros(muscles))
    np.testing.assert_array_equal(found["action_high"], np.ones(muscles))
    assert list(found["dtypes"]) == ["float32", "float32"]
    assert list(found["names"]) == ["Box", "Box"]
    assert found["limit"] == limit


@pytest.mark.parametrize(
    ("recipe", "kwargs", "stale"),
    [
        ("L2M2019", {"difficulty": 0}, 0),
        ("L2M2019", {"difficulty": 3}, 0),
        ("L2M2019", {"difficulty": 1, "model": "2D"}, 0),
        ("Arm2D", {}, 2),  # osim-rl's first observation has the target of the episode before
    ],
)
def test_every_transition_is_osim_rls_own(probe, recipe, kwargs, stale):
    ours = probe("play", recipe, kwargs, steps=230)
    theirs = probe("play_bare", recipe, kwargs, steps=230)
    assert len(ours["first"]) >= 2, "the actions must end at least one episode"
    np.testing.assert_array_equal(ours["obs"], theirs["obs"].astype(np.float32))
    np.testing.assert_array_equal(ours["reward"], theirs["reward"])
    np.testing.assert_array_equal(ours["terminated"] | ours["truncated"], theirs["done"])
    np.testing.assert_array_equal(ours["first"][:, stale:], theirs["first"][:, stale:].astype(np.float32))
    assert list(ours["dtypes"]) == ["float32"]


def test_a_fall_terminates_and_is_not_truncated(probe):
    played = probe("play", "L2M2019", {"difficulty": 0}, steps=120, level=0.0)
    fell = np.flatnonzero(played["terminated"])
    assert len(fell) == 1
    assert played["obs"][fell[0], 242] < 0.6  # the pelvis' height, after 242 values of the target velocity
    assert not played["truncated"].any()


@pytest.mark.parametrize("difficulty", [0, 1, 2, 3])
def test_osim_rls_own_time_limit_truncates_and_raises_nothing(probe, difficulty):
    played = probe("play", "L2M2019", {"difficulty": difficulty}, steps=12, limit=5)
    np.testing.assert_array_equal(np.flatnonzero(played["truncated"]), [4, 9])
    assert not played["terminated"].any()
    assert played["reward"].max() < 5, "osim-rl pays a bonus there"


def test_the_arm_is_truncated_at_its_limit_and_never_terminated(probe):
    played = probe("play", "Arm2D", {"max_episode_steps": 30}, steps=70)
    np.testing.assert_array_equal(np.flatnonzero(played["truncated"]), [29, 59])
    assert not played["terminated"].any()


@pytest.mark.parametrize(("recipe", "target"), [("L2M2019", slice(0, 242)), ("Arm2D", slice(0, 2))])
def test_a_seed_fixes_the_targets_and_0_is_a_seed(probe, recipe, target):
    drawn = {}
    for name, seed in [("0", 0), ("0 again", 0), ("1", 1)]:
        drawn[name] = probe("play", recipe, steps=1, seed=seed)["first"][0][target]
    np.testing.assert_array_equal(drawn["0"], drawn["0 again"])
    assert not np.array_equal(drawn["0"], drawn["1"])


def test_the_arms_first_observation_shows_the_target_of_its_own_episode(probe):
    played = probe("play", "Arm2D", {"max_episode_steps": 3}, steps=6)
    for episode in (0, 1):
        np.testing.assert_array_equal(played["first"][episode][:2], played["obs"][3 * episode][:2])
    assert not np.array_equal(played["first"][0][:2], played["first"][1][:2])


def test_a_second_body_in_the_same_process_changes_nothing(probe):
    alone = probe("play", "L2M2019", {"difficulty": 0}, steps=120)
    beside = probe("play", "L2M2019", {"difficulty": 0}, steps=120, beside=True)
    np.testing.assert_array_equal(alone["obs"], beside["obs"])
    np.testing.assert_array_equal(alone["reward"], beside["reward"])


@pytest.mark.parametrize("recipe", ["L2M2019", "Arm2D"])
def test_nothing_is_printed_and_no_file_is_written(probe, recipe):
    played = probe("play", recipe, steps=5)
    assert played.printed == ""
    assert played.files == []


@pytest.mark.parametrize(
    ("recipe", "kwargs", "text"),
    [
        ("L2M2019", {"model": "4D"}, "ValueError: model must be '2D' or '3D', got '4D'"),
        ("L2M2019", {"difficulty": 4}, "ValueError: difficulty must be 0, 1, 2 or 3, got 4"),
        ("L2M2019", {"speed": 1}, "unexpected keyword argument 'speed'"),
        ("Arm2D", {"max_episode_steps": 0}, "ValueError: max_episode_steps must be at least 1, got 0"),
    ],
)
def test_a_wrong_argument_is_refused_with_the_value(probe, recipe, kwargs, text):
    assert text in str(probe("refusal", recipe, kwargs)["text"])


def test_the_catalog_lists_what_the_file_has():
    for name, recipe in simulators.RECIPES.items():
        assert set(recipe) == {"file", "factory", "about", "needs"}
        text = (ROOT / "simulators" / recipe["file"]).read_text()
        assert f"\ndef {recipe['factory']}(" in text or f"\nclass {recipe['factory']}(" in text, name
