"""An agent's updates as one compiled program: many in a call, the next batches gathered while one computes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from agents.memory import Transitions

#: (what was drawn, the same as the program takes it), for so many updates after so many.
Gather = Callable[[int, int], "tuple[Transitions, tuple[Any, ...]]"]


class Updates:
    """The program of an agent."""

    def __init__(self, update_many: Callable[..., Any]):
        """Compiles at the first call, with XLA.

        Args:
            update_many: K updates from batches, their metrics as (K, M).
        """
        self._update_many = update_many
        self._program, self.by_xla = tf.function(update_many, jit_compile=True), True

    def run(self, sizes: Sequence[int], gather: Gather, before: int) -> Iterator[tuple[int, np.ndarray, Transitions]]:
        """Makes as many updates as `sizes` sum to, one call each; a second thread gathers the next call's batches.

        Args:
            sizes: updates of each call.
            gather: draws the batches of a call.
            before: updates made so far.

        Yields:
            Updates of the call, their metrics (K, M), and what was drawn for them.
        """
        with ThreadPoolExecutor(1, "gather") as ahead:
            found, batches = gather(sizes[0], before)
            for size, following in zip(sizes, [*sizes[1:], 0], strict=True):
                before += size
                next_up = ahead.submit(gather, following, before) if following else None
                yield size, self(*batches).numpy(), found
                if next_up is not None:
                    found, batches = next_up.result()

    def __call__(self, *batches: Any) -> Any:
        """One call; without XLA, and saying so, where XLA cannot compile an operation of the user's model."""
        try:
            return self._program(*batches)
        except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError, tf.errors.InternalError) as error:
            if not self.by_xla:
                raise
            reason = str(error.message).strip().splitlines()[0]
            warnings.warn(
                f"XLA cannot compile these networks; learning goes on without it, slower: {reason}", stacklevel=2
            )
            self._program, self.by_xla = tf.function(self._update_many), False
            return self._program(*batches)


def fold(arrays: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    """(K * B, ...) as (K, B, ...)."""
    return [x.reshape(count, -1, *x.shape[1:]) for x in arrays]


def check_finite(values: np.ndarray, found: Transitions, before: int, names: Sequence[str], folder: str | Path) -> None:
    """Writes down the batch of the first update that has diverged.

    Args:
        values: metrics (K, M) of the updates after the first `before`.
        found: what was drawn for them, K batches in a row.
        names: of the metrics.
        folder: for the file.

    Raises:
        FloatingPointError: a metric is NaN or infinite; the text names the file.
    """
    bad = ~np.isfinite(values).all(1)
    if not bad.any():
        return
    k, size = int(np.argmax(bad)), len(found.reward) // len(values)
    rows, number = slice(k * size, (k + 1) * size), before + k + 1
    path = Path(folder) / f"diverged-update-{number:07d}.npz"
    arrays: dict[str, Any] = {f"state/{i}": leaf[rows] for i, leaf in enumerate(found.state)}
    arrays.update({f"next_state/{i}": leaf[rows] for i, leaf in enumerate(found.next_state)})
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, action=found.action[rows], reward=found.reward[rows], discount=found.discount[rows], **arrays)
    told = ", ".join(f"{name} {value:g}" for name, value in zip(names, values[k], strict=True))
    raise FloatingPointError(
        f"update {number} has diverged ({told}); the batch that showed it is in {path}\n"
        "  now: load() the last save, then look at that batch, or try a smaller learning rate or clipnorm"
    )
