"""The farms as a `VecEnv` of Stable-Baselines3, in the environment that has it: `make sb3`. Checks: sb3_checks.py."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from farms import running_farm

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv-sb3" / "bin" / "python"

pytestmark = pytest.mark.skipif(
    not (ROOT / ".venv-sb3" / ".made").exists(), reason=".venv-sb3 is missing; now: make sb3 (torch for CPUs, 1 GB)"
)

CHECKS = {
    "check_every_value_is_that_of_a_dummy_vec_env": "CartPole-v1",
    "check_attributes": "CartPole-v1",
    "check_rows_are_whole_episodes_also_with_one_ahead": "CartPole-v1",
    "check_wrappers_give_what_they_give_over_a_dummy_vec_env": "CartPole-v1",
    "check_sac_learns_saves_and_is_evaluated": "Pendulum-v1",
    "check_make_vec_env_takes_the_gymnasium_id": "Pendulum-v1",
    "check_wrong_actions_are_refused_and_nothing_is_sent": "environments:RaisingEnv",
    "check_a_lost_episode_is_a_time_limit_that_says_why": "environments:RaisingEnv",
}


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A program in that environment, on the code of this tree."""
    return subprocess.run(
        [str(PYTHON), *command],
        cwd=cwd,
        # One thread: those of torch wait for each other actively, and tests run beside each other.
        env=dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]), OMP_NUM_THREADS="1"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
    )


@pytest.fixture(scope="module")
def found():
    """Each check's traceback or None; one process runs them all, for the import of torch takes seconds."""
    farms = {env: running_farm(env, slots=3) for env in sorted(set(CHECKS.values()))}
    addresses = {env: farm.__enter__().address for env, farm in farms.items()}
    try:
        done = run("tests/sb3_checks.py", json.dumps({name: f"{addresses[env]} {env}" for name, env in CHECKS.items()}))
    finally:
        for farm in farms.values():
            farm.__exit__(None, None, None)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, done.stdout + done.stderr
    return {line["check"]: line["error"] for line in lines}


def test_no_check_is_left_out():
    source = (ROOT / "tests" / "sb3_checks.py").read_text()
    assert {line[4:].split("(")[0] for line in source.splitlines() if line.startswith("def check_")} == set(CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_stable_baselines3(found, name):
    assert found[name] is None, found[name]


@pytest.mark.slow
def test_the_example_trains_sac_over_a_farm_and_leaves_a_model(tmp_path):
    with running_farm("Pendulum-v1", slots=2) as farm:
        example = str(ROOT / "examples" / "sb3_farm.py")
        done = run(example, "--farm", farm.address, "--slots", "2", "--steps", "1020", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "return of 2 episodes: -" in done.stdout
    assert (tmp_path / "sac.zip").stat().st_size > 10_000
