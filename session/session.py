"""The session: an agent, a farmer, and the verbs that a researcher types."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from agents.checkpoint import Autosave, Checkpointer
from agents.interrupt import stop_loops
from agents.keras_rl.callbacks import Callback
from agents.metrics import FILE as METRICS_FILE
from agents.metrics import MetricsLogger, plot_metrics
from farmer.ledger import LOST_BUCKETS
from session.agent_table import make_agent
from session.ctrl_c import one_ctrl_c
from session.farms import Farms
from session.folder import Folder
from session.options import Options
from session.screen import console, say, shell
from wire.errors import FarmError, FarmlistError

WINDOW = 10  #: episodes of the running mean


@dataclass(frozen=True)
class Episode:
    """One finished training episode."""

    reward: float
    steps: int
    slot: int
    farm: str
    seconds: float  # of training, all sessions, when it ended


class Watch(Callback):
    """keras-rl callback of a session: keeps the episodes, shows where the training is."""

    def __init__(self, session: Session, total: int):
        super().__init__()
        self.session = session
        self.total = total
        self.done = self.steps = 0
        self._began = self._shown = time.monotonic()
        self._updates = session.agent.nb_updates
        self._bar: Progress | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        if not console.is_terminal:
            return
        text = "{task.fields[told]}"
        self._bar = Progress(
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(20),
            TextColumn(text),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._bar.add_task("", total=self.total, told="first steps")
        self._bar.start()

    def on_step_end(self, step: int, logs: dict[str, Any] | None = None) -> None:
        self.steps += 1
        if time.monotonic() - self._shown > 0.25 and self._bar is not None:
            self._shown = time.monotonic()
            self._bar.update(self._task, completed=self.done, told=self.told())

    def on_episode_end(self, episode: int, logs: dict[str, Any] | None = None) -> None:
        logs = logs or {}
        self.done += 1
        seconds = self.session.seconds + time.monotonic() - self._began
        self.session.episodes.append(
            Episode(
                float(logs["episode_reward"]),
                int(logs["nb_episode_steps"]),
                int(logs["slot"]),
                str(logs["farm"]),
                seconds,
            )
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=min(self.done, self.total), told=self.told())
        elif self.done % WINDOW == 0 or self.done == self.total:
            print("episode %d/%d  %s" % (self.done, self.total, self.told()), flush=True)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self.session.seconds += time.monotonic() - self._began
        if self._bar is not None:
            self._bar.update(self._task, completed=min(self.done, self.total), told=self.told())
            self._bar.stop()

    def told(self) -> str:
        """One line: mean return, steps/s, updates/s, busy slots."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        updates = self.session.agent.nb_updates - self._updates
        return "return %8.1f (last %d)  %5.0f steps/s  %5.0f updates/s  busy %d/%d" % (
            self.session.mean_return(),
            WINDOW,
            self.steps / seconds,
            updates / seconds,
            self.session.farmer.busy,
            self.session.farmer.nb_slots,
        )


class Session:
    """Everything behind the prompt.

    Attributes:
        unsaved: whether something was trained since the last save that is worth one.
    """

    def __init__(self, options: Options, folder: Folder, farms: Farms):
        """Builds the agent.

        Args:
            options: as typed, and checked.
            folder: for all that is written; `close` frees it.
            farms: to learn from; `close` closes them.

        Raises:
            ValueError: the agent does not fit the environment.
            FileNotFoundError: there is nothing to resume.
        """
        self.options = options
        self.out = folder.path
        self._folder = folder
        self.episodes: list[Episode] = []
        self.seconds = 0.0
        self.farms, self.farmer = farms, farms.farmer
        self.unsaved = self._closed = False
        self._training = False
        self.saves = Checkpointer(self.out / "checkpoint", options.keep, 60 * options.autosave or None)
        self.metrics = MetricsLogger(self.out)
        self.agent = make_agent(options, self.farmer.observation_space, self.farmer.action_space)
        self.agent.fault_folder = self.out
        if options.resume:
            self.load()
        else:
            self._warn_of_saves()
        if farms.local is not None:
            farms.local.on_end = self._local_ended

    def _warn_of_saves(self) -> None:
        found = self.saves.found()
        if found:
            told = "%s holds an earlier training: %d save%s, the newest %s\n"
            told += "  this one begins anew: its saves replace those, %d stay%s; %s goes on\n"
            told += "  now: --resume (or load() at the prompt) goes on with it, another --out leaves it alone"
            keep = self.options.keep
            several = "" if len(found) == 1 else "s"
            say(told % (self.out, len(found), several, found[0].name, keep, "s" if keep == 1 else "", METRICS_FILE))

    def r(self, n: int = 100) -> int:
        """Trains n episodes; Ctrl-C ends it at once and keeps what was learnt.

        Returns:
            How many were trained.

        Raises:
            ValueError: n is no number of episodes.
            FloatingPointError: the training has diverged.
            FarmError: the farms failed in a way that it cannot go on with; what was learnt is kept.
        """
        watch = Watch(self, _positive(n))
        self._check_local()
        callbacks = [watch, self.metrics, Autosave(self.saves, self._extra)]
        repetition = self.options.action_repetition
        steps = self.agent.step
        with one_ctrl_c():
            self._training = True
            try:
                self.agent.fit(self.farmer, None, repetition, callbacks, verbose=0, nb_episodes=n)
            except (FloatingPointError, ValueError):
                steps = self.agent.step  # the save before this one stays: these weights may be what failed
                self.unsaved = False
                raise
            finally:
                self._training = False
                self.unsaved |= self.agent.step not in (steps, self.saves.step)
                self._tell(watch, n)
        if watch.done < n:
            self._check_local()
        return watch.done

    def _tell(self, watch: Watch, n: int) -> None:
        if watch.done < n:
            say("stopped after %d of %d episodes; r(%d) goes on" % (watch.done, n, n - watch.done))
        if self.episodes:
            say("mean return of the last %d episodes: %.1f" % (min(WINDOW, len(self.episodes)), self.mean_return()))

    def _check_local(self) -> None:
        local = self.farms.local
        if local is not None and local.trouble is not None:
            raise FarmError("%s\n  now: save() keeps what was learnt; leave, and go on with --resume" % local.trouble)

    def _local_ended(self) -> None:
        """No step will come any more, so a training has to be ended as Ctrl-C ends it."""
        while self._training and not stop_loops():
            time.sleep(0.1)  # its loop is about to begin

    def test(self, n: int = 10) -> list[float]:
        """Plays n episodes without noise and without learning; returns their returns."""
        repetition = self.options.action_repetition
        with one_ctrl_c():
            history = self.agent.test(self.farmer, _positive(n), repetition, visualize=False, verbose=0)
        returns = [float(value) for value in history.history.get("episode_reward", [])]
        if returns:
            say("test: mean return %.1f over %d episodes (sd %.1f)" % (np.mean(returns), len(returns), np.std(returns)))
        return returns

    def save(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Saves everything: weights, optimizers, targets, replay, random states, counters, history."""
        saves = self.saves if path is None else Checkpointer(path, self.options.keep)
        made = saves.save(self.agent, self._extra())
        self.unsaved = False
        say("saved to %s" % made)
        return made

    def load(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Loads the newest whole save.

        Raises:
            FileNotFoundError, ValueError: nothing there, or it does not fit; everything stays as it was.
        """
        saves = self.saves if path is None else Checkpointer(path, self.options.keep)
        extra = saves.load(self.agent)
        assert saves.loaded is not None
        self.unsaved = False
        self.episodes = [Episode(*row) for row in extra.get("episodes", [])]
        self.seconds = extra.get("seconds", 0.0)
        if extra.get("env", self.options.env) != self.options.env:
            say("note: it was trained on %s" % extra["env"])
        told = "loaded %s: %d episodes, %d steps, %d updates, mean return %.1f"
        say(told % (saves.loaded, len(self.episodes), self.agent.step, self.agent.nb_updates, self.mean_return()))
        return saves.loaded

    def _extra(self) -> dict[str, Any]:
        rows = [[e.reward, e.steps, e.slot, e.farm, e.seconds] for e in self.episodes]
        return {"env": self.options.env, "episodes": rows, "seconds": self.seconds}

    def status(self) -> None:
        """Shows farms, slots and the ledger of steps; of slots only those that lost some."""
        status = self.farmer.status()
        if status["farmlist"]:
            say("the farmlist is broken, the list before counts: " + status["farmlist"].replace("\n", "\n  "))
        for farm in status["farms"]:
            say(
                "%s%s  %d of %d slots, %d busy%s; %s"
                % (
                    farm["farm"],
                    " (leaving)" if farm["leaving"] else "",
                    farm["slots"],
                    farm["wanted"],
                    farm["busy"],
                    ", %.3g ms a step" % (1000 * farm["step_s"]) if farm["step_s"] else "",
                    _ends(farm["ledger"]),
                )
            )
            for place in farm["places"]:
                if any(place["ledger"][bucket] for bucket in LOST_BUCKETS):
                    say("  slot %d: %s" % (place["slot"], _ends(place["ledger"])))
            if farm["dropped"]:
                say("  %d late replies that nobody waited for any more" % farm["dropped"])
            if farm["trouble"]:
                say("  " + farm["trouble"].replace("\n", "\n  "))
        say("%d episodes, %d steps, %d updates" % (len(self.episodes), self.agent.step, self.agent.nb_updates))

    def plot(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Draws the learning curve to a PNG, and inline in a notebook; losses, speeds and times to metrics.png."""
        from matplotlib.figure import Figure

        file = Path(path or self.out / "returns.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        returns = [episode.reward for episode in self.episodes]
        steps = np.cumsum([episode.steps for episode in self.episodes])
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(steps, returns, ".", alpha=0.4, label="episode")
        means = [np.mean(returns[max(0, i - WINDOW + 1) : i + 1]) for i in range(len(returns))]
        axes.plot(steps, means, label="mean of the last %d" % WINDOW)
        axes.set(xlabel="environment steps", ylabel="return", title="%s, %s" % (self.options.env, self.options.agent))
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(file, dpi=120)
        ipython = shell()
        if ipython is not None and ipython.has_trait("kernel"):
            from IPython.display import Image, display

            display(Image(str(file)))
        say("learning curve: %s" % file)
        if (self.out / METRICS_FILE).exists():
            say(
                "losses, speeds, times: %s" % plot_metrics(self.out, file.parent / "metrics.png", str(axes.get_title()))
            )
        return file

    def refarm(self) -> None:
        """Reads the farmlist again, at once; edits are followed without this, within seconds.

        Raises:
            FarmlistError: it is broken; the farms stay as they were.
        """
        try:
            self.farmer.refarm()
        except FarmlistError as error:
            raise FarmlistError("%s\nthe farms stay as they were" % error) from None
        self.status()

    def mean_return(self) -> float:
        """Of the last WINDOW episodes; nan before the first."""
        last = [episode.reward for episode in self.episodes[-WINDOW:]]
        return float(np.mean(last)) if last else float("nan")

    def leave(self) -> None:
        """Saves what was trained since the last save, if anything was, and closes; after `close` nothing."""
        if self._closed:
            return
        try:
            if self.unsaved:
                say("saving what was trained since the last save; --resume goes on with it")
                self.save()
        except (FarmError, FloatingPointError, ValueError, OSError) as error:
            say("not saved: %s: %s" % (type(error).__name__, error))
        finally:
            self.close()

    def close(self) -> None:
        """Frees all slots and the folder, and ends a local farm."""
        self._closed = True
        self.metrics.close()
        self.farms.close()
        self._folder.free()

    def greet(self) -> None:
        """Says what there is to type."""
        slots = self.farmer.nb_slots
        say("%s on %s, %d slot%s" % (self.options.agent, self.options.env, slots, "" if slots == 1 else "s"))
        say("r(n) train   test(n) evaluate   save() load()   status() plot() refarm()   agent, farmer, session")


def _ends(ledger: dict[str, int]) -> str:
    """How many steps were sent, and what became of them."""
    ends = ", ".join("%d %s" % (count, name) for name, count in ledger.items() if count and name != "sent")
    return "%d steps sent%s" % (ledger["sent"], ": " + ends if ends else "")


def _positive(n: int) -> int:
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError("how many episodes? A whole number from 1, not %r" % (n,))
    return n
