"""Everything of an agent on disk: written beside, synced, then named; a kill at any instant leaves the save before it.

FOLDER/LATEST          the name of the newest whole save
FOLDER/save-000007/    manifest.json, arrays.npz
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from agents.memory import ReplayMemory

FORMAT = 1
LATEST = "LATEST"


def save_checkpoint(agent: Any, folder: str | os.PathLike[str], extra: dict[str, Any] | None = None) -> Path:
    """Saves weights, targets, optimizers, replay and counters.

    Args:
        agent: a compiled DDPGAgent with a ReplayMemory.
        folder: holds the saves; the newest one stays, older ones go once it is whole.
        extra: plain data of the caller's, for `load_checkpoint`.

    Raises:
        TypeError: the agent's memory cannot be saved; nothing was written.
    """
    _check_memory(agent)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = [int(path.name[5:]) for path in folder.glob("save-*") if path.name[5:].isdigit()]
    target = folder / ("save-%06d" % (max(numbers, default=0) + 1))
    beside = folder / (target.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    arrays = {name: value.numpy() for name, value in _variables(agent)}
    arrays.update({"memory/" + name: value for name, value in agent.memory.state_dict().items()})
    with open(beside / "arrays.npz", "wb") as file:
        np.savez(file, **arrays)
        _sync(file)
    manifest = {
        "format": FORMAT,
        "agent": type(agent).__name__,
        "step": int(agent.step),
        "nb_updates": agent.nb_updates,
    }
    manifest.update(
        owed=agent._owed,
        noise=agent._noise.n_steps if agent._noise is not None else 0,
        rng=agent.memory.rng.bit_generator.state,
        extra=extra or {},
    )
    with open(beside / "manifest.json", "w") as text:
        json.dump(manifest, text)
        _sync(text)
    os.rename(beside, target)
    _sync_folder(folder)
    with open(folder / (LATEST + ".part"), "w") as text:
        text.write(target.name)
        _sync(text)
    os.replace(folder / (LATEST + ".part"), folder / LATEST)
    _sync_folder(folder)
    for path in folder.glob("save-*"):
        if path != target:
            shutil.rmtree(path)
    return target


def load_checkpoint(agent: Any, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Puts the newest save into a compiled agent of the same form; returns `extra`.

    Raises:
        FileNotFoundError: no save there.
        ValueError: it is of an agent of another form; nothing was changed.
        TypeError: the agent's memory cannot take it.
    """
    _check_memory(agent)
    folder = Path(folder)
    if not (folder / LATEST).exists():
        raise FileNotFoundError("no checkpoint at %s; save() writes one" % folder)
    source = folder / (folder / LATEST).read_text().strip()
    manifest = json.loads((source / "manifest.json").read_text())
    with np.load(source / "arrays.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    mine = dict(_variables(agent))
    theirs = {name for name in arrays if not name.startswith("memory/")}
    if manifest["format"] != FORMAT or manifest["agent"] != type(agent).__name__ or theirs != set(mine):
        raise ValueError("the checkpoint %s is of another agent (%s)" % (source, manifest["agent"]))
    for name, variable in mine.items():
        if tuple(variable.shape) != arrays[name].shape:
            raise ValueError(
                "the checkpoint %s has %s of shape %s, this agent %s: other networks or another environment"
                % (source, name, arrays[name].shape, tuple(variable.shape))
            )
    agent.memory.load_state_dict({n[7:]: value for n, value in arrays.items() if n.startswith("memory/")})
    for name, variable in mine.items():
        variable.assign(arrays[name])
    agent.step, agent.nb_updates, agent._owed = manifest["step"], manifest["nb_updates"], manifest["owed"]
    if agent._noise is not None:
        agent._noise.n_steps = manifest["noise"]
    agent.memory.rng.bit_generator.state = manifest["rng"]
    return dict(manifest["extra"])


def _check_memory(agent: Any) -> None:
    if not isinstance(agent.memory, ReplayMemory):
        raise TypeError("a checkpoint holds the replay of agents.ReplayMemory; this agent has %r" % (agent.memory,))


def _variables(agent: Any) -> Iterator[tuple[str, Any]]:
    parts = ("actor", "critic", "target_actor", "target_critic", "actor_optimizer", "critic_optimizer")
    for part in parts:
        for index, variable in enumerate(getattr(agent, part).variables):
            yield "%s/%d" % (part, index), variable


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
