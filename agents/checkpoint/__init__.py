"""Everything of an agent on disk: `Checkpointer` saves and loads, `Autosave` does so beside a training."""

from agents.checkpoint.checkpointer import Autosave, Checkpointer

__all__ = ["Autosave", "Checkpointer"]
