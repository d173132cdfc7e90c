"""The session at the researcher's desk: an agent learns from all farms at once.

ipython -i train.py -- --env Pendulum-v1 --agent ddpg      then: r(100)
python train.py --env Pendulum-v1 --episodes 100           the same, unattended
"""

from __future__ import annotations

import atexit
import builtins
import functools
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from agents import make_ddpg, make_sac
from agents.callbacks import Callback
from agents.checkpoint import Autosave, Checkpointer
from agents.metrics import MetricsLogger, plot_metrics
from agents.offpolicy import OffPolicyAgent
from farmer import Farmer
from farmer.places import LOST_BUCKETS
from wire.errors import FarmError, FarmlistError

ROOT = Path(__file__).resolve().parent
AGENTS: dict[str, Callable[..., OffPolicyAgent]] = {"ddpg": make_ddpg, "sac": make_sac}
WINDOW = 10  #: episodes of the running mean
START_LIMIT = 150.0  #: s for a local farm to come up
console = Console()


@dataclass(frozen=True)
class Options:
    """A training session over the farms of farmlist.py."""

    env: str
    """A name from the farms' catalogs, as Pendulum-v1 or osim:L2M2019."""
    agent: str = "ddpg"
    """Which agent learns: ddpg or sac."""
    farmlist: Path | None = None
    """The list of farms; ./farmlist.py by default. Without one a local farm is started."""
    key_file: Path | None = None
    """The farms' key, a file of mode 600; by default the key in FARM_KEY, or none."""
    slots: int | None = None
    """Environments at a time; all of the list by default, one a core on a local farm."""
    seed: int | None = None
    """Of networks, noise and episodes."""
    episodes: int = 0
    """Train so many at once; without a prompt, 100."""
    out: Path | None = None
    """Folder for checkpoint and learning curve; runs/ENV by default."""
    python: Path | None = None
    """The simulator's Python, for a local farm."""
    resume: bool = False
    """Load the folder's checkpoint before training."""
    action_repetition: int = 1
    """Frames that an action is applied for, in the worker."""
    updates_per_step: float = 1.0
    """Updates of the networks for each step of the agent, 0.25 to 20."""
    n_step: int = 1
    """Rewards that a transition sums before it bootstraps; 3 to 5 help where reward comes late."""
    layer_norm: bool = False
    """LayerNorm in both networks; steadies a training with more than one update for each step."""
    normalize: Literal["auto", "on", "off"] = "auto"
    """Observations by running mean and deviation; auto: where the space has no bounds, or wide ones."""
    schedule: Literal["overlap", "sync"] = "overlap"
    """Learn while environments step, or in turns that a seed reproduces exactly."""
    on_lost_episode: Literal["keep", "drop"] = "keep"
    """What becomes of the steps before the one that was lost with its worker or farm: learnt from, or taken out."""
    autosave: float = 10.0
    """Minutes between checkpoints while it trains; 0: only save() writes one."""
    keep: int = 3
    """Checkpoints that stay."""


@dataclass(frozen=True)
class Episode:
    """One finished training episode."""

    reward: float
    steps: int
    slot: int
    farm: str
    seconds: float  # of training, all sessions, when it ended


class LocalFarm:
    """A farm on this machine as a child, for a user who has no farmlist yet. It ends with this process."""

    def __init__(self, options: Options, folder: Path):
        """Starts it and waits until it offers the environment.

        Raises:
            FarmError: it did not start; what it said is in the text.
        """
        slots = options.slots or os.cpu_count() or 1
        command = [
            sys.executable,
            str(ROOT / "farm.py"),
            options.env,
            "--slots",
            str(slots),
            "--port",
            "0",
            "--until-eof",
        ]
        command += ["--log-dir", str(folder / "logs")]
        command += ["--python", str(options.python)] if options.python else []
        command += ["--key-file", str(options.key_file)] if options.key_file else []
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "farm.log"
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
            )
        self.address = self._wait(slots)

    def _wait(self, slots: int) -> tuple[str, int]:
        assert self._process.stdout is not None
        patience = threading.Timer(START_LIMIT, self._process.kill)
        patience.start()
        try:
            line = self._process.stdout.readline()
        except BaseException:
            self.stop()
            raise
        finally:
            patience.cancel()
        found = re.match(r"farm at (\S+?),", line)
        if found is None:
            self.stop()
            said = [text for text in self.log.read_text(errors="replace").splitlines() if text]
            raise FarmError("the local farm did not start:\n  " + "\n  ".join(said[-12:]))
        return found.group(1), slots

    def stop(self) -> None:
        """Ends it and its workers, within about 6 s."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(6.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


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
    """Everything behind the prompt."""

    def __init__(self, options: Options):
        """Finds or starts farms and builds the agent.

        Raises:
            FarmError: no farm, or none that offers the environment.
            ValueError: the agent does not exist, or does not fit the environment.
        """
        if options.agent not in AGENTS:
            raise ValueError("no agent %r\n  there are: %s" % (options.agent, ", ".join(AGENTS)))
        if options.action_repetition < 1:
            raise ValueError("--action-repetition must be at least 1, not %d" % options.action_repetition)
        if options.autosave < 0:
            raise ValueError("--autosave must be 0 (never) or minutes, not %g" % options.autosave)
        self.options = options
        self.out = options.out or Path("runs") / re.sub(r"[^\w.-]+", "_", options.env)
        self.episodes: list[Episode] = []
        self.seconds = 0.0
        self.local: LocalFarm | None = None
        self.saves = Checkpointer(self.out / "checkpoint", options.keep, 60 * options.autosave or None)
        self.metrics = MetricsLogger(self.out)
        self.farmer = self._farmer()
        try:
            self.agent = self._agent()
            if options.resume:
                self.load()
        except BaseException:
            self.close()
            raise

    def _farmer(self) -> Farmer:
        path = self.options.farmlist or Path("farmlist.py")
        if self.options.farmlist is None and not path.exists():
            say("no farmlist.py here: starting a local farm (copy farmlist.example.py to use other machines)")
            self.local = LocalFarm(self.options, self.out)
            farms: Any = [self.local.address]
        else:
            farms = path
        try:
            options = self.options
            return Farmer(options.env, farms, slots=options.slots, seed=options.seed, key_file=options.key_file)
        except BaseException:
            if self.local is not None:
                self.local.stop()
            raise

    def _agent(self) -> OffPolicyAgent:
        options = self.options
        agent = AGENTS[options.agent](
            self.farmer.observation_space,
            self.farmer.action_space,
            seed=options.seed,
            updates_per_step=options.updates_per_step,
            schedule=options.schedule,
            n_step=options.n_step,
            layer_norm=options.layer_norm,
            normalize_observations={"auto": None, "on": True, "off": False}[options.normalize],
            on_lost_episode=options.on_lost_episode,
        )
        agent.fault_folder = self.out
        return agent

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
        callbacks = [watch, self.metrics, Autosave(self.saves, self._extra)]
        repetition = self.options.action_repetition
        try:
            self.agent.fit(self.farmer, None, repetition, callbacks, verbose=0, nb_episodes=n)
        finally:
            if watch.done < n:
                say("stopped after %d of %d episodes; r(%d) goes on" % (watch.done, n, n - watch.done))
            if self.episodes:
                say("mean return of the last %d episodes: %.1f" % (min(WINDOW, len(self.episodes)), self.mean_return()))
        return watch.done

    def test(self, n: int = 10) -> list[float]:
        """Plays n episodes without noise and without learning; returns their returns."""
        repetition = self.options.action_repetition
        history = self.agent.test(self.farmer, _positive(n), repetition, visualize=False, verbose=0)
        returns = [float(value) for value in history.history.get("episode_reward", [])]
        if returns:
            say("test: mean return %.1f over %d episodes (sd %.1f)" % (np.mean(returns), len(returns), np.std(returns)))
        return returns

    def save(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Saves everything: weights, optimizers, targets, replay, random states, counters, history."""
        saves = self.saves if path is None else Checkpointer(path, self.options.keep)
        made = saves.save(self.agent, self._extra())
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
                "%s%s  %d of %d slots, %d busy; %s"
                % (
                    farm["farm"],
                    " (leaving)" if farm["leaving"] else "",
                    farm["slots"],
                    farm["wanted"],
                    farm["busy"],
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
        shell = _shell()
        if shell is not None and shell.has_trait("kernel"):
            from IPython.display import Image, display

            display(Image(str(file)))
        say("learning curve: %s" % file)
        if (self.out / "metrics.jsonl").exists():
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

    def close(self) -> None:
        """Frees all slots and ends a local farm."""
        self.metrics.close()
        self.farmer.close()
        if self.local is not None:
            self.local.stop()
            self.local = None

    def greet(self) -> None:
        """Says what there is to type."""
        say("%s on %s, %d slots" % (self.options.agent, self.options.env, self.farmer.nb_slots))
        say("r(n) train   test(n) evaluate   save() load()   status() plot() refarm()   agent, farmer, session")

    def names(self) -> dict[str, Any]:
        """What the prompt offers; there a mistake is told in a line, where the session's own methods raise."""
        verbs = (self.r, self.test, self.save, self.load, self.status, self.plot, self.refarm)
        return dict({verb.__name__: _told(verb) for verb in verbs}, agent=self.agent, farmer=self.farmer, session=self)


def _ends(ledger: dict[str, int]) -> str:
    """How many steps were sent, and what became of them."""
    ends = ", ".join("%d %s" % (count, name) for name, count in ledger.items() if count and name != "sent")
    return "%d steps sent%s" % (ledger["sent"], ": " + ends if ends else "")


def say(text: str) -> None:
    """A line for people, never wrapped: it may be read by `grep`."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _told(verb: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(verb)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            result = verb(*args, **kwargs)
        except (FarmError, FloatingPointError, ValueError, OSError) as error:
            say("%s: %s" % (type(error).__name__, error))
            return None
        return result if verb.__name__ == "test" else None  # the others have said theirs

    return call


def _positive(n: int) -> int:
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError("how many episodes? A whole number from 1, not %r" % (n,))
    return n


def _shell() -> Any:
    return getattr(builtins, "get_ipython", lambda: None)()


def open_session(argv: list[str] | None = None) -> Session | None:
    """A session from a command line, None when it cannot start (which it has said then)."""
    options = tyro.cli(Options, args=argv, prog="train.py", description=__doc__)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    for library in ("absl", "tensorflow", "h5py", "matplotlib"):
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        session = Session(options)
    except (FarmError, ValueError, FileNotFoundError) as error:
        print("train.py: %s: %s" % (type(error).__name__, error), file=sys.stderr)
        return None
    atexit.register(session.close)
    return session


def main(argv: list[str] | None = None) -> int:
    """Trains unattended.

    Returns:
        The exit code: 0, 1 when the training failed, 2 when it could not start, 130 when it was interrupted.
    """
    try:
        session = open_session(argv)
    except KeyboardInterrupt:
        return 130
    if session is None:
        return 2
    try:
        return _unattended(session, session.options.episodes or 100)
    finally:
        session.close()


def _unattended(session: Session, n: int) -> int:
    try:
        code = 0 if session.r(n) >= n else 130
    except (FarmError, FloatingPointError, ValueError) as error:
        print("train.py: %s: %s" % (type(error).__name__, error), file=sys.stderr)
        return 1  # and the save before this one stays: these weights may be what failed
    session.save()
    session.plot()
    return code


if __name__ == "__main__":
    if _shell() is None and not sys.flags.interactive:
        sys.exit(main())
    session = open_session(sys.argv[1:])
    if session is not None:
        globals().update(session.names())
        session.greet()
        if session.options.episodes:
            session.r(session.options.episodes)
