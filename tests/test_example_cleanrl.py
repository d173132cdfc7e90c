"""The single-file example trains over a farm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from farms import running_farm

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_single_file_example_trains_over_a_farm(tmp_path):
    with running_farm("Pendulum-v1", slots=2) as farm:
        line = [sys.executable, str(ROOT / "examples" / "cleanrl_style.py"), "--farm", farm.address, "--num-envs", "2"]
        done = subprocess.run(
            [*line, "--total-timesteps", "1202"],
            cwd=tmp_path,
            env=dict(os.environ, PYTHONPATH=str(ROOT)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    episodes = [line for line in done.stdout.splitlines() if "episodic_return=-" in line]
    assert len(episodes) == 3, done.stdout
