"""Weights as files, a network each: `x.h5f` becomes `x_actor.weights.h5`, `x_critic.weights.h5` and so on.

Keras 3 insists on that ending. Statistics of observations, where there are any, go to `x_observations.npz`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping

import keras
import numpy as np

Path = str | os.PathLike[str]


def save(
    filepath: Path, networks: Mapping[str, keras.Model], statistics: Mapping[str, np.ndarray] | None, overwrite: bool
) -> None:
    """Writes each network beside the others.

    Raises:
        FileExistsError: one is there and `overwrite` is false; nothing was written.
    """
    paths = _files(filepath, list(networks))
    if not overwrite:
        for path in [*paths, *([_observations(filepath)] if statistics is not None else [])]:
            if os.path.exists(path):
                raise FileExistsError(f"{path} is there already; save_weights(..., overwrite=True) replaces it")
    for model, path in zip(networks.values(), paths, strict=True):
        model.save_weights(path, overwrite=True)
    if statistics is not None:
        np.savez(_observations(filepath), allow_pickle=False, **statistics)


def check(filepath: Path, networks: Mapping[str, keras.Model]) -> None:
    """Raises FileNotFoundError when the file of a network is missing."""
    for path in _files(filepath, list(networks)):
        if not os.path.exists(path):
            raise FileNotFoundError(f"no weights at {path}")


def read_statistics(filepath: Path) -> dict[str, np.ndarray] | None:
    """The statistics that were saved with the weights, if any."""
    if not os.path.exists(_observations(filepath)):
        return None
    with np.load(_observations(filepath), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def load(filepath: Path, networks: Mapping[str, keras.Model]) -> None:
    """Reads what `save` wrote under the same name.

    Raises:
        ValueError: the weights are of other networks; nothing was changed.
    """
    models = list(networks.values())
    before = [model.get_weights() for model in models]
    try:
        with warnings.catch_warnings():
            # That is how Keras tells of layers that it left as they were.
            warnings.simplefilter("error", UserWarning)
            for model, path in zip(models, _files(filepath, list(networks)), strict=True):
                model.load_weights(path)
    except (ValueError, OSError, UserWarning) as error:
        for model, weights in zip(models, before, strict=True):
            model.set_weights(weights)
        raise ValueError(f"the weights at {filepath} do not fit this agent's networks: {error}") from error


def _stem(filepath: Path) -> str:
    name = os.fspath(filepath)
    for ending in (".weights.h5", ".h5f", ".h5", ".hdf5"):
        name = name.removesuffix(ending)
    return name


def _files(filepath: Path, names: list[str]) -> list[str]:
    return [f"{_stem(filepath)}_{name}.weights.h5" for name in names]


def _observations(filepath: Path) -> str:
    return _stem(filepath) + "_observations.npz"
