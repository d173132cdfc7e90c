"""What the agents learn through a real local farm: returns of evaluation episodes, curves, wall time.

python -m benchmarks.learning.returns pendulum --agent sac --seeds 10 --steps 20000
python -m benchmarks.learning.returns halfcheetah --steps 100000 --seeds 3 --peer  # beside SBX's SAC; see peers/make.py
python -m benchmarks.learning.returns osim --env osim:L2M2019 --normalize on          # wants `make osim`
python -m benchmarks.learning.returns table

Each seed is a process of its own with a farm of its own. Results are lines of `runs/learning/results.jsonl`; a seed
that has one is not run again (--again), so a command that was broken off goes on where it was when it is repeated.
Curves lie beside it as JSON and PNG.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.make import Missing, python_of
from benchmarks.shared.farm import ROOT, local_farm
from benchmarks.shared.osim_env import BODIES

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from agents import networks
from farmer import Farmer

from benchmarks.learning import curves  # isort: skip  (keras-rl's callbacks, which it imports, want agents' bridge first)

# SBX's defaults, and both learn from 10,000 steps on, as the SB3 zoo has it for HalfCheetah.
CHEETAH = {
    "hidden": [256, 256],
    "batch_size": 256,
    "learning_rate": 3e-4,
    "gamma": 0.99,
    "target_model_update": 0.005,
    "updates_per_step": 1.0,
}
STARTS = 10_000
OSIM_KWARGS = {"osim:" + name: kwargs for name, kwargs in BODIES.items()}
LAST = 20  #: training episodes that `last_episodes` is the mean of


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tasks = parser.add_subparsers(dest="task", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--first-seed", type=int, default=0, metavar="S")
    common.add_argument("--jobs", type=int, default=1, help="seeds at a time")
    common.add_argument("--set", type=json.loads, default={}, metavar="JSON", help="further settings of make_sac/ddpg")
    common.add_argument("--again", action="store_true", help="also seeds that have a result")
    pendulum = tasks.add_parser("pendulum", parents=[common])
    pendulum.add_argument("--agent", choices=("sac", "ddpg"), default="sac")
    cheetah = tasks.add_parser("halfcheetah", parents=[common])
    cheetah.add_argument("--peer", action="store_true", help="SBX's SAC as well, seed by seed")
    osim = tasks.add_parser("osim", parents=[common])
    osim.add_argument("--env", choices=list(OSIM_KWARGS), default="osim:L2M2019")
    osim.add_argument("--normalize", choices=("on", "off"), default="on")
    osim.add_argument("--action-repetition", type=int, default=4)
    osim.add_argument("--env-kwargs", type=json.loads, metavar="JSON", help="default: %s" % json.dumps(OSIM_KWARGS))
    defaults = {pendulum: (10, 20_000, 2, 100), cheetah: (3, 100_000, 2, 10), osim: (1, 20_000, 2, 10)}
    for task, (seeds, steps, slots, episodes) in defaults.items():
        task.add_argument("--seeds", type=int, default=seeds, metavar="N")
        task.add_argument("--steps", type=int, default=steps)
        task.add_argument("--slots", type=int, default=slots)
        task.add_argument("--episodes", type=int, default=episodes, help="of the evaluation")
        task.add_argument("--python", help="the simulator's Python")
    tasks.add_parser("table")
    tasks.add_parser("one", help="one run, as the other commands start it").add_argument("spec", type=json.loads)
    return parser.parse_args(argv)


def specs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A description of each run that a command asks for, in the order in which they are made.

    Raises:
        Missing: the simulator's Python was not made.
    """
    one: dict[str, Any] = {"steps": args.steps, "slots": args.slots, "episodes": args.episodes, "python": args.python}
    settings: dict[str, Any] = {"agent": args.set}
    if args.task == "pendulum":
        kinds = [dict(one, task="pendulum", env="Pendulum-v1", who=args.agent, settings=settings)]
    elif args.task == "halfcheetah":
        one.update(task="halfcheetah", env="HalfCheetah-v5", python=args.python or python_of("sbx"))
        settings["agent"] = {**CHEETAH, "nb_steps_warmup": STARTS, "memory_limit": 1_000_000, **args.set}
        kinds = [dict(one, who="sac", settings=settings)]
        if args.peer:
            kinds.append(dict(one, who="SBX sac", slots=1, settings={"learning_starts": STARTS}))
    else:
        python = args.python or str(ROOT / ".venv-osim" / "bin" / "python")
        if not Path(python).exists():
            raise Missing("%s is missing\n  now: make osim" % python)
        settings["agent"] = dict(args.set, normalize_observations=args.normalize == "on")
        settings["action_repetition"] = args.action_repetition
        settings["env_kwargs"] = OSIM_KWARGS[args.env] if args.env_kwargs is None else args.env_kwargs
        who = "sac" if args.normalize == "on" else "sac, raw observations"
        task = args.env.replace(":", "-")
        kinds = [dict(one, task=task, env=args.env, who=who, python=python, settings=settings)]
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    return [dict(kind, seed=seed) for seed in seeds for kind in kinds]


def run_all(wanted: list[dict[str, Any]], jobs: int, again: bool) -> int:
    """Runs what has no result yet, `jobs` at a time; returns how many failed."""
    known = [] if again else curves.results()
    left = [spec for spec in wanted if not any(curves.same(spec, result) for result in known)]
    print("%d runs, %d have a result already" % (len(wanted), len(wanted) - len(left)), flush=True)

    def run(spec: dict[str, Any]) -> bool:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.learning.returns", "one", json.dumps(spec)], check=False, cwd=ROOT
        )
        if done.returncode:
            print("%s: failed with exit code %d" % (label(spec), done.returncode), file=sys.stderr, flush=True)
        return bool(done.returncode)

    with ThreadPoolExecutor(jobs) as pool:
        return sum(pool.map(run, left))


def label(spec: dict[str, Any]) -> str:
    """A run's name on the screen and in legends."""
    return "%s, %s, seed %d" % (spec["task"], spec["who"], spec["seed"])


def run_one(spec: dict[str, Any]) -> None:
    """Trains, evaluates, and appends the result."""
    found = (run_peer if spec["who"].startswith("SBX") else run_ours)(spec)
    found["mean"] = float(np.mean(found["returns"]))
    kept = {key: spec[key] for key in curves.KEYS}
    curves.append(dict(kept, **found, cores=os.cpu_count(), ended=time.strftime("%Y-%m-%dT%H:%M:%S")))
    print(
        "%s: mean of %d evaluation episodes %.1f after %.1f minutes"
        % (label(spec), len(found["returns"]), found["mean"], found["train_s"] / 60),
        flush=True,
    )


def run_ours(spec: dict[str, Any]) -> dict[str, Any]:
    """Ours, through a farm of its own."""
    name = label(spec).replace(", ", "-").replace(" ", "-")
    settings = dict(spec["settings"]["agent"])
    if "hidden" in settings:
        settings["hidden"] = tuple(settings["hidden"])
    repetition = spec["settings"].get("action_repetition", 1)
    kwargs = spec["settings"].get("env_kwargs")
    make = networks.make_ddpg if spec["who"] == "ddpg" else networks.make_sac
    folder = curves.HOME / "logs" / name
    recorder = curves.Recorder(label(spec), spec["steps"], curves.HOME / (name + ".json"))
    with (
        local_farm(spec["env"], spec["slots"], folder, spec["python"], kwargs) as address,
        Farmer(spec["env"], [(address, spec["slots"])], seed=spec["seed"]) as farmer,
    ):
        agent = make(farmer.observation_space, farmer.action_space, seed=spec["seed"], **settings)
        start = time.monotonic()
        agent.fit(farmer, nb_steps=spec["steps"], action_repetition=repetition, verbose=0, callbacks=[recorder])
        trained = time.monotonic() - start
        recorder.say()
        played = agent.test(
            farmer, nb_episodes=spec["episodes"], action_repetition=repetition, visualize=False, verbose=0
        )
        returns = [float(value) for value in played.history["episode_reward"]]
    last = [episode["return"] for episode in recorder.episodes[-LAST:]]
    found = {"returns": returns, "train_s": trained, "updates": int(agent.nb_updates), "agent_steps": int(agent.step)}
    found["last_episodes"] = float(np.mean(last)) if last else None
    found["stalls"] = curves.summary(recorder.stalls)
    recorder.save(spec=spec, **found)
    curves.draw(spec["task"])
    return found


def run_peer(spec: dict[str, Any]) -> dict[str, Any]:
    """SBX's, in its own Python."""
    command = [python_of("sbx"), "-m", "benchmarks.peers.sbx_learn", "--env", spec["env"]]
    command += ["--steps", str(spec["steps"]), "--seed", str(spec["seed"]), "--episodes", str(spec["episodes"])]
    command += ["--settings", json.dumps(spec["settings"])]
    folder = curves.HOME / "logs" / "SBX"  # MuJoCo writes a log where it runs
    folder.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=folder, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Runs a subcommand; the exit code is 1 when a run failed, 2 when it could not start."""
    args = parse()
    if args.task == "one":
        run_one(args.spec)
        return 0
    failed = 0
    if args.task != "table":
        try:
            wanted = specs(args)
        except Missing as error:
            print("returns.py: %s" % error, file=sys.stderr)
            return 2
        failed = run_all(wanted, args.jobs, args.again)
    print(curves.tables())
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
