"""The example is a keras-rl script: it runs, and one line of it is ours."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "ddpg_pendulum.py"
OURS = {"agents", "farmer", "farmhand", "simulators", "wire", "farm", "train"}


@pytest.mark.slow
def test_the_keras_rl_example_trains_saves_its_weights_and_tests(tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--steps", "600", "--weights", str(tmp_path / "w.h5f")],
        cwd=ROOT,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w_actor.weights.h5", "w_critic.weights.h5"]
    lines = done.stdout.splitlines()
    assert lines[0] == "Training for 600 steps ..."
    assert lines.count("Interval 1 (0 steps performed)") == 1
    assert sum(line.startswith("Episode ") for line in lines) == 3


def test_one_line_of_the_example_is_ours():
    imports = []
    for node in ast.walk(ast.parse(EXAMPLE.read_text())):
        if isinstance(node, ast.Import):
            imports += [(alias.name.split(".")[0], alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imports += [(node.module.split(".")[0], alias.name) for alias in node.names]
    assert [found for found in imports if found[0] in OURS] == [("agents", "DDPGAgent")]
