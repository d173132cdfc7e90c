"""What a script for keras-rl2 1.0.5 and Keras 2 finds missing under Keras 3: the one place that touches either.

Imports of keras-rl are in `keras_rl_hook`, which must work before this package is imported.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import keras_rl_hook


def install() -> None:
    """Puts what is missing where keras-rl and scripts written for it look; does nothing where it exists."""
    keras_rl_hook.restore_model_from_config()
    _legacy_learning_rate()


def _legacy_learning_rate() -> None:
    """Lets every optimizer take Keras 2's `lr=`, as all of keras-rl's examples write it; Keras 3 raises ValueError.

    Keras itself ignores `decay=` with a warning. Every optimizer's constructor hands on what it does not know to
    this one, whichever name it was imported by and whether before or after this.
    """
    import keras

    constructor = keras.optimizers.Optimizer.__init__
    if getattr(constructor, "takes_lr", False):
        return

    @functools.wraps(constructor)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if "lr" in kwargs:
            value = kwargs.pop("lr")
            warnings.warn(
                "%s(lr=%r) is Keras 2's name: taken as learning_rate=%r" % (type(self).__name__, value, value),
                UserWarning,
                stacklevel=3,  # the script's line: Adam's constructor called this one
            )
            if args:
                args = (value, *args[1:])
            else:
                kwargs["learning_rate"] = value
        constructor(self, *args, **kwargs)

    __init__.takes_lr = True  # type: ignore[attr-defined]
    keras.optimizers.Optimizer.__init__ = __init__
