"""The command line of train.py, and what can be known to be wrong with it before anything is started."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from session.agent_table import AGENTS
from wire.auth import find_key


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

    @property
    def folder(self) -> Path:
        """Where checkpoints, logs and pictures go."""
        return self.out or Path("runs") / re.sub(r"[^\w.-]+", "_", self.env)

    def check(self) -> None:
        """What is wrong here is told at once, and not after TensorFlow, farms and agent are up.

        Raises:
            ValueError: an option is out of its range.
            BadKey: the key cannot be used.
            FileNotFoundError: there is nothing to resume.
        """
        if self.agent not in AGENTS:
            raise ValueError("no agent %r\n  there are: %s" % (self.agent, ", ".join(AGENTS)))
        for name, least in (("slots", 1), ("seed", 0), ("episodes", 0), ("action_repetition", 1), ("keep", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError("--%s must be %d or more, not %d" % (name.replace("_", "-"), least, value))
        if not self.autosave >= 0:
            raise ValueError("--autosave must be 0 (never) or minutes, not %g" % self.autosave)
        find_key(self.key_file)
        saves = self.folder / "checkpoint"
        if self.resume and not any(saves.glob("save-*")):
            raise FileNotFoundError(
                "no checkpoint at %s, so there is nothing for --resume to go on with\n"
                "  now: name its folder with --out, or leave --resume out" % saves
            )
