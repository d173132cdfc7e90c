"""The example trains SAC over a farm, with what a real training has around it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from farms import running_farm

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_sac_example_trains_over_a_farm_and_leaves_weights_and_metrics(tmp_path):
    with running_farm("Pendulum-v1", slots=2) as farm:
        line = [sys.executable, str(ROOT / "examples" / "sac_farm.py"), "--farm", farm.address, "--steps", "1200"]
        done = subprocess.run(
            [*line, "--out", str(tmp_path)],
            cwd=tmp_path,
            env=dict(os.environ, PYTHONPATH=str(ROOT)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"metrics.jsonl", "tensorboard", *("sac_%s.weights.h5" % n for n in ("actor", "critic", "critic2"))}
    assert sum(line.startswith("Episode ") for line in done.stdout.splitlines()) == 4
