"""The actor's forward pass, by the weights that learn or by a copy of them while a learner changes those."""

from __future__ import annotations

import threading
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from agents.models import alone, copy_of, normalized
from agents.scaling import Statistics


class Acting:
    """Of one actor.

    Attributes:
        overlapped: whether it acts by the copy.
        updates: that the weights had which act.
        copy: of the actor.
        by_copy: its compiled forward pass.
    """

    def __init__(self, actor: keras.Model):
        self._actor, self.copy = actor, copy_of(actor)
        self.copy.set_weights(actor.get_weights())
        self._by_online, self.by_copy = _compiled(actor), _compiled(self.copy)
        self._lock = threading.Lock()  # the copy is not read half written
        self.overlapped = False
        self.updates = 0

    def outputs(self, inputs: list[np.ndarray], statistics: Statistics, nb_updates: int) -> np.ndarray:
        """The actor's outputs (n, ...) for observation inputs (n, window_length, ...) in one pass."""
        tensors = [tf.constant(x) for x in inputs]
        with self._lock:
            forward = self.by_copy if self.overlapped else self._by_online
            found: np.ndarray = forward(tensors, statistics).numpy()
            if not self.overlapped:
                self.updates = nb_updates
        return found

    def publish(self, nb_updates: int) -> None:
        """Hands the newest weights to the copy."""
        with self._lock:
            for mine, theirs in zip(self.copy.variables, self._actor.variables, strict=True):
                mine.assign(theirs)
            self.updates = nb_updates


def _compiled(model: keras.Model) -> Any:
    def forward(inputs: Any, norm: Any) -> Any:
        return model(alone(normalized(inputs, norm)), training=False)

    return tf.function(forward, reduce_retracing=True)
