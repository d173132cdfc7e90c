"""What `returns.py` keeps: results as JSON lines, curves as JSON and PNG, and the tables of them."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from rl.callbacks import Callback

from benchmarks.shared.farm import ROOT
from benchmarks.shared.table import table

HOME = ROOT / "runs" / "learning"
RESULTS = HOME / "results.jsonl"
KEYS = ("task", "env", "who", "steps", "slots", "settings", "seed")  #: what makes two runs the same
SAY = 10.0  #: s between two lines of progress, and between two saves of a curve
STALL = 1.0  #: s from which a step counts as one that could hold others up
WINDOW = 10  #: episodes of a running mean


def results() -> list[dict[str, Any]]:
    """All results so far; a line that a kill broke off is none."""
    found = []
    for line in RESULTS.read_text().splitlines() if RESULTS.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether both are of the same run."""
    return all(one.get(key) == other.get(key) for key in KEYS)


def append(result: dict[str, Any]) -> None:
    """Adds a result in one write, so that several processes may."""
    HOME.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(result) + "\n").encode()
    at = os.open(RESULTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(at, line)
    finally:
        os.close(at)


class Recorder(Callback):
    """keras-rl callback of a training: the curve, lines of progress, and what long steps did to the other slots."""

    def __init__(self, label: str, steps: int, path: Path):
        super().__init__()
        self.label, self.steps, self.path = label, steps, path
        self.start = self.said = time.monotonic()
        self.episodes: list[dict[str, float]] = []
        self.stalls: list[dict[str, float]] = []
        self.made = 0
        self._last: dict[int, tuple[float, int, int]] = {}  # slot -> when its step was told, all steps, updates by then

    def on_step_end(self, step: int, logs: dict[str, Any] | None = None) -> None:
        now, slot = time.monotonic(), (logs or {}).get("slot", 0)
        self.made += 1
        updates = self.model.nb_updates
        before, made, updates_then = self._last.get(slot, (now, self.made, updates))
        compiled = updates_then == 0 < updates  # meanwhile, once, which is no doing of the environments
        if step and now - before > STALL and not compiled:
            self.stalls.append({"seconds": round(now - before, 3), "steps_of_others": self.made - made - 1})
        self._last[slot] = now, self.made, updates
        if now - self.said > SAY:
            self.said = now
            self.say()

    def on_episode_end(self, episode: int, logs: dict[str, Any] | None = None) -> None:
        logs = logs or {}
        self.episodes.append(
            {
                "step": self.made,
                "wall_s": round(time.monotonic() - self.start, 2),
                "return": float(logs["episode_reward"]),
                "steps": int(logs["nb_episode_steps"]),
                "slot": int(logs.get("slot", 0)),
            }
        )

    def say(self) -> None:
        """One line, and the curve so far."""
        took = time.monotonic() - self.start
        returns = [episode["return"] for episode in self.episodes[-WINDOW:]]
        mean = np.mean(returns) if returns else np.nan
        counts = (self.label, self.made, self.steps, self.model.nb_updates, len(self.episodes), len(returns))
        print(
            "%s: %d of %d steps, %d updates, %d episodes, last %d: %.1f, %.1f steps/s, %d steps over %g s"
            % (*counts, mean, self.made / took, len(self.stalls), STALL),
            flush=True,
        )
        self.save()

    def save(self, **more: Any) -> None:
        """Writes the curve beside its name and renames it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(dict(more, label=self.label, episodes=self.episodes, stalls=self.stalls)))
        beside.replace(self.path)


def summary(stalls: list[dict[str, float]]) -> dict[str, float | None]:
    """What the other slots did while one made a step of seconds."""
    seconds = [stall["seconds"] for stall in stalls]
    made = sum(stall["steps_of_others"] for stall in stalls)
    return {
        "count": len(stalls),
        "longest_s": max(seconds, default=0.0),
        "steps_of_others_per_s": made / sum(seconds) if seconds else None,
    }


def draw(task: str) -> Path | None:
    """Draws all curves of a task against agent steps and against wall time; the PNG's path, None without curves."""
    paths = sorted(HOME.glob(task + "-*.json"))
    if not paths:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    for path in paths:
        curve = json.loads(path.read_text())
        episodes = curve["episodes"]
        if len(episodes) < WINDOW:
            continue
        mean = np.convolve([episode["return"] for episode in episodes], np.ones(WINDOW) / WINDOW, "valid")
        for axes, x, scale in zip(both, ("step", "wall_s"), (1, 60), strict=True):
            axes.plot([episode[x] / scale for episode in episodes][WINDOW - 1 :], mean, label=curve["label"])
    for axes, name in zip(both, ("agent steps", "wall time, minutes"), strict=True):
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
    both[0].set_ylabel("return, mean of %d episodes" % WINDOW)
    if both[0].lines:
        both[0].legend(fontsize="small")
    figure.suptitle(task)
    figure.tight_layout()
    out = HOME / (task + ".png")
    figure.savefig(out, dpi=120)
    pyplot.close(figure)
    return out


def tables() -> str:
    """Markdown tables of all results, one a task: each seed's mean return, and mean and deviation over seeds."""
    tasks: dict[str, dict[tuple[Any, ...], list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for one in results():
        settings = json.dumps(one["settings"], sort_keys=True)
        tasks[one["task"]][one["env"], one["who"], one["steps"], one["slots"], settings].append(one)
    parts = []
    for task, groups in tasks.items():
        rows = []
        for (env, who, steps, slots, settings), runs in groups.items():
            runs = list({run["seed"]: run for run in runs}.values())  # the newest of each seed
            means = [run["mean"] for run in runs]
            each = ", ".join("%.1f" % mean for mean in means)
            deviation = "%.1f" % np.std(means, ddof=1) if len(means) > 1 else "-"
            minutes = "%.1f" % (np.mean([run["train_s"] for run in runs]) / 60)
            last = [run["last_episodes"] for run in runs if run.get("last_episodes") is not None]
            last_text = "%.1f" % np.mean(last) if last else "-"
            stalls = [run["stalls"] for run in runs if run.get("stalls") and run["stalls"]["count"]]
            long = "; ".join(
                "%(count)d, longest %(longest_s).1f s, others made %(steps_of_others_per_s).1f/s" % one
                for one in stalls
            )
            speed = "%.1f" % (steps * len(runs) / sum(run["train_s"] for run in runs))
            figures = ["%.1f" % np.mean(means), deviation, last_text, minutes, speed, long or "-", each]
            rows.append([env, who, steps, slots, len(means), *figures, "`%s`" % settings])
        head = [
            "env",
            "who",
            "steps",
            "slots",
            "seeds",
            "mean of evaluation",
            "deviation of seeds",
            "last 20 in training",
        ]
        head += ["minutes", "steps/s", "steps over %g s" % STALL, "each seed", "settings"]
        parts.append("### %s\n\n%s" % (task, table(head, rows)))
    return "\n\n".join(parts) or "no results in %s yet" % RESULTS
