"""Writes down how a training goes, as lines of JSON and for TensorBoard, and draws it.

agent.fit(farmer, nb_steps=100_000, callbacks=[MetricsLogger("runs/pendulum")])
plot_metrics("runs/pendulum", "runs/pendulum/metrics.png", "Pendulum-v1")

tensorboard --logdir runs
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agents.keras_rl.callbacks import Callback

WINDOW = 10  #: episodes of a running mean
FILE = "metrics.jsonl"

#: TensorBoard's names for those of `Meters.take`; what is not here goes there as it is called, or not at all.
TAGS = {
    "mean_return_10": "episode/mean_return_10",
    "steps_per_s": "speed/steps_per_s",
    "updates_per_s": "speed/updates_per_s",
    "updates_per_step": "speed/updates_per_step",
    "env_time_ms": "time/env_ms",
    "network_time_ms": "time/network_ms",
    "acting_time_ms": "time/acting_ms",
    "learning_time_ms": "time/learning_ms",
    "waiting_share": "share/waiting",
    "learning_share": "share/learning",
    "throttled_share": "share/throttled",
    "policy_age_updates": "policy/age_updates",
}

log = logging.getLogger("agents")


class MetricsLogger(Callback):
    """A line for each episode and for each interval, in `folder/metrics.jsonl` and in `folder/tensorboard`.

    An episode: `kind` "episode", `time_s`, `step`, `episode`, `return`, `length_steps`, `slot`, `farm`.
    An interval: `kind` "interval", `time_s`, `step`, `updates` and `mean_return_10`, and of the agent's `meters` all
    that `Meters.take` gives; its counts are called `interval_steps`, `interval_updates`, `interval_s` here.

    `time_s` are seconds of training, `step` and `updates` the agent's, all three since its beginning; `episode`
    counts them in the order of their ends. A training that goes on in the same folder goes on in the same file. What
    is no finite number is null.
    """

    def __init__(self, folder: str | os.PathLike[str], interval_s: float = 10.0, tensorboard: bool = True):
        """Writes nothing yet.

        Args:
            folder: where to; made when a training begins.
            interval_s: seconds between two lines of an interval; looked at after each step.
            tensorboard: whether to write for TensorBoard too.
        """
        super().__init__()
        self.folder = Path(folder)
        self.interval_s = interval_s
        self._board = _Board(self.folder / "tensorboard") if tensorboard else None
        self._file: Any = None
        self._known = False  # what an earlier training left in the file
        self._returns: deque[float] = deque(maxlen=WINDOW)
        self._episodes = 0
        self._time_before = 0.0
        self._began = self._next = 0.0
        self._news = False  # a step since the last interval

    # keras-rl's callbacks.

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Opens the file. Raises OSError when it cannot be written."""
        path = self.folder / FILE
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._known:
            self._remember(path)
        self._file = _opened(path)
        if getattr(self.model, "meters", None) is not None:
            self.model.meters.take()  # the time between two trainings is nobody's
        self._began = time.monotonic()
        self._next = self._began + self.interval_s
        self._news = False

    def on_step_end(self, step: int, logs: dict[str, Any] | None = None) -> None:
        """Writes an interval when its time has come."""
        self._news = True
        if time.monotonic() >= self._next:
            self._interval()

    def on_episode_end(self, episode: int, logs: dict[str, Any] | None = None) -> None:
        """Writes an episode."""
        logs = logs or {}
        self._episodes += 1
        self._returns.append(float(logs["episode_reward"]))
        step = int(logs.get("nb_steps", self.model.step))
        line = {
            "kind": "episode",
            "time_s": self._time(),
            "step": step,
            "episode": self._episodes,
            "return": float(logs["episode_reward"]),
            "length_steps": int(logs["nb_episode_steps"]),
            "slot": logs.get("slot"),
            "farm": logs.get("farm"),
        }
        self._write(line)
        if self._board is not None:
            values = {"episode/return": line["return"], "episode/length_steps": line["length_steps"]}
            self._board.write(step, values)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Writes the last interval, shorter than the others, and closes the file."""
        if self._news:
            self._interval()
        self._time_before = self._time()
        self._began = time.monotonic()
        if self._file is not None:
            self._file.close()
            self._file = None

    def close(self) -> None:
        """Closes TensorBoard's file; a training after this begins another one."""
        if self._board is not None:
            self._board.close()

    # Inside.

    def _time(self) -> float:
        return round(self._time_before + time.monotonic() - self._began, 3)

    def _interval(self) -> None:
        self._next = time.monotonic() + self.interval_s
        self._news = False
        meters = getattr(self.model, "meters", None)
        taken = {} if meters is None else meters.take()
        counts = {"steps": "interval_steps", "updates": "interval_updates", "seconds": "interval_s"}
        step = int(self.model.step)
        line = {
            "kind": "interval",
            "time_s": self._time(),
            "step": step,
            "updates": getattr(self.model, "nb_updates", None),
            "mean_return_10": float(np.mean(self._returns)) if self._returns else None,
        }
        line.update({counts.get(name, name): value for name, value in taken.items()})
        self._write(line)
        if self._board is not None:
            values = {TAGS.get(name, name): value for name, value in line.items() if name in TAGS or "/" in name}
            self._board.write(step, values)
            self._board.flush()

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is None:
            return
        text = json.dumps({name: _plain(value) for name, value in line.items()}, allow_nan=False)
        try:
            self._file.write(text.encode() + b"\n")  # unbuffered: a kill leaves whole lines
        except OSError as error:  # a full disk is no reason to end a training
            log.warning("%s: %s\n  now: the training goes on without it", self.folder / FILE, error)
            self._file.close()
            self._file = None

    def _remember(self, path: Path) -> None:
        self._known = True
        if not path.exists():
            return
        before = read_metrics(path)
        self._returns.extend(before.get("episode/return", [])[-WINDOW:])
        self._episodes = int(max(before.get("episode/episode", [0])))
        self._time_before = max(before.get("episode/time_s", []) + before.get("interval/time_s", []), default=0.0)


class _Board:
    """Event files as TensorBoard reads them, written by TensorFlow itself: TensorBoard is for looking at them only."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._writer: Any = None

    def write(self, step: int, values: dict[str, Any]) -> None:
        import tensorflow as tf

        if self._writer is None:
            self._writer = tf.summary.create_file_writer(str(self._folder))
        v1 = tf.compat.v1
        kind = v1.SummaryMetadata(plugin_data=v1.SummaryMetadata.PluginData(plugin_name="scalars"), data_class=1)
        with self._writer.as_default(), tf.device("cpu:0"):
            for tag, value in values.items():
                if value is not None and math.isfinite(value):
                    tf.summary.write(tag, tf.constant(value, tf.float32), step=step, metadata=kind)

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def read_metrics(path: str | os.PathLike[str]) -> dict[str, list[Any]]:
    """What a MetricsLogger wrote.

    Args:
        path: the file, or the folder it is in. Lines that are broken are left out.

    Returns:
        The columns, by kind and name as "episode/return" or "interval/train/loss". Those of one kind are of one
        length; NaN where a line has nothing or null.

    Raises:
        FileNotFoundError: there is none.
    """
    file = Path(path)
    file = file / FILE if file.is_dir() else file
    rows: dict[str, list[dict[str, Any]]] = {"episode": [], "interval": []}
    with open(file, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
                rows[row.pop("kind")].append(row)
            except (ValueError, LookupError, TypeError, AttributeError):  # half a line, or another program's
                continue
    columns = {}
    for kind, of_kind in rows.items():
        for name in dict.fromkeys(name for row in of_kind for name in row):
            values = (row.get(name) for row in of_kind)
            columns["%s/%s" % (kind, name)] = [math.nan if value is None else value for value in values]
    return columns


def plot_metrics(path: str | os.PathLike[str], file: str | os.PathLike[str], title: str) -> Path:
    """Draws a training: returns, losses and other metrics of learning, speeds, times and shares, over agent steps.

    Args:
        path: of `read_metrics`.
        file: the PNG; its folder is made.
        title: above all of it.

    Raises:
        FileNotFoundError: there is nothing to draw.
    """
    from matplotlib.figure import Figure

    columns = read_metrics(path)
    train = [name for name in columns if name.startswith("interval/train/")]
    losses = [name for name in train if "loss" in name]
    panels: list[Callable[[Any], None]] = [
        lambda axes: _draw_returns(axes, columns),
        lambda axes: _draw(axes, columns, losses, "loss"),
        lambda axes: _draw(axes, columns, [name for name in train if name not in losses], "metric of learning"),
        lambda axes: _draw(
            axes, columns, ["interval/steps_per_s", "interval/updates_per_s"], "speed (1/s)", ["steps/s", "updates/s"]
        ),
        lambda axes: _draw_times(axes, columns),
        lambda axes: _draw(
            axes,
            columns,
            ["interval/waiting_share", "interval/throttled_share", "interval/learning_share"],
            "share of the time (%)",
            ["collector waits for results", "collector waits for the learner", "learner learns"],
            scale=100.0,
        ),
    ]
    figure = Figure(figsize=(15, 8), layout="constrained")
    figure.suptitle(title)
    for panel, axes in zip(panels, figure.subplots(2, 3).flat, strict=True):
        panel(axes)
        axes.set_xlabel("agent steps")
        axes.locator_params(axis="x", nbins=6)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
        else:
            axes.text(0.5, 0.5, "nothing yet", ha="center", va="center", transform=axes.transAxes, alpha=0.5)
    target = Path(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    return target


def _draw_returns(axes: Any, columns: dict[str, list[Any]]) -> None:
    axes.set_ylabel("return of an episode")
    steps, returns = columns.get("episode/step", []), columns.get("episode/return", [])
    if not returns:
        return
    axes.plot(steps, returns, ".", alpha=0.4, label="episode")
    means = [np.mean(returns[max(0, i - WINDOW + 1) : i + 1]) for i in range(len(returns))]
    axes.plot(steps, means, label="mean of the last %d" % WINDOW)


def _draw_times(axes: Any, columns: dict[str, list[Any]]) -> None:
    names = ["env_time_ms", "network_time_ms", "acting_time_ms", "learning_time_ms"]
    labels = ["environment, a step", "network, a step", "acting, a step", "learning, an update"]
    _draw(axes, columns, ["interval/" + name for name in names], "time (ms)", labels)
    if any(np.nanmax(line.get_ydata()) > 0 for line in axes.get_lines()):
        axes.set_yscale("log")  # from microseconds to seconds


def _draw(
    axes: Any,
    columns: dict[str, list[Any]],
    names: Sequence[str],
    unit: str,
    labels: Sequence[str] | None = None,
    scale: float = 1.0,
) -> None:
    axes.set_ylabel(unit)
    steps = columns.get("interval/step", [])
    for name, label in zip(names, labels or [name.rsplit("/", 1)[1] for name in names], strict=True):
        values = scale * np.array(columns.get(name, []), np.float64)
        if np.isfinite(values).any():
            axes.plot(steps, values, ".-", markersize=3, label=label)


def _plain(value: Any) -> Any:
    """A value that JSON has: numpy's numbers as Python's, and null for what is no finite number."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _opened(path: Path) -> Any:
    """The file to append to; half a line that a kill has left at its end is taken off."""
    file = open(path, "ab", buffering=0)  # noqa: SIM115  (on_train_end closes it)
    try:
        whole = path.read_bytes()
        last = whole.rsplit(b"\n", 1)[-1]
        if last:
            try:
                json.loads(last)
                file.write(b"\n")  # only its end is missing
            except ValueError:
                file.truncate(len(whole) - len(last))
    except BaseException:
        file.close()
        raise
    return file
