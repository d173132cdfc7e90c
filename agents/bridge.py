"""Makes keras-rl2 1.0.5 importable under Keras 3: the one place that touches it.

keras-rl2 was written for Keras 2. `rl.core`, `rl.callbacks`, `rl.memory` and `rl.random` import as they are; `rl.util`,
and with it `rl.policy` and `rl.processors`, wants `tensorflow.keras.models.model_from_config`, which Keras 3 dropped.
"""

from __future__ import annotations

from typing import Any


def install() -> None:
    """Puts the missing name where keras-rl looks for it; does nothing where it exists."""
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
