"""Makes keras-rl2 1.0.5 importable under Keras 3, and Keras 2's `lr=` understood: the one place that touches either.

keras-rl2 was written for Keras 2. `rl.core`, `rl.callbacks`, `rl.memory` and `rl.random` import as they are; `rl.util`,
and with it `rl.policy` and `rl.processors`, wants `tensorflow.keras.models.model_from_config`, which Keras 3 dropped.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any


def install() -> None:
    """Puts what is missing where keras-rl and scripts written for it look; does nothing where it exists."""
    _model_from_config()
    _legacy_learning_rate()


def _model_from_config() -> None:
    import keras
    import tensorflow.keras.models as models

    def model_from_config(config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
        """Keras 2's function: a model from what `{"class_name", "config"}` describes.

        Keras 3 finds a class by its module, which Keras 2's descriptions, as `rl.util.clone_model` writes, do not name.
        """
        models_by_name = {"Sequential": keras.Sequential, "Functional": keras.Model, "Model": keras.Model}
        if config["class_name"] not in models_by_name:
            return keras.saving.deserialize_keras_object(config, custom_objects=custom_objects)
        with keras.saving.custom_object_scope(custom_objects or {}):
            return models_by_name[config["class_name"]].from_config(config["config"])

    if not hasattr(models, "model_from_config"):
        models.model_from_config = model_from_config


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
