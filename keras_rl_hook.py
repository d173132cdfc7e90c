"""Lets keras-rl2 1.0.5 be imported under Keras 3, by a script that imports it before anything of ours.

`rl.util`, and with it `rl.policy` and `rl.processors`, wants `tensorflow.keras.models.model_from_config`, which Keras 3
dropped. A line in site-packages (setup.py puts it there) imports this module at the start of every Python of an
environment with this project, so it is small and waits until `rl.util` is asked for.
"""

import sys

WANTED = "rl.util"


class _Finder:
    """Finds nothing; what `rl.util` needs is put in place just before others find it."""

    @staticmethod
    def find_spec(name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name == WANTED:
            sys.meta_path.remove(_Finder)
            restore_model_from_config()
        return None


def watch() -> None:
    """Begins to wait; a second call changes nothing."""
    if WANTED not in sys.modules and _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)


def restore_model_from_config() -> None:
    """Puts the missing name where keras-rl looks for it; does nothing where it exists."""
    try:
        import keras
        import tensorflow.keras.models as models
    except ImportError:  # keras-rl's own import says what is missing
        return
    if hasattr(models, "model_from_config"):
        return

    def model_from_config(config, custom_objects=None):  # type: ignore[no-untyped-def]
        """Keras 2's function: a model from what `{"class_name", "config"}` describes.

        Keras 3 finds a class by its module, which Keras 2's descriptions, as `rl.util.clone_model` writes, do not name.
        """
        models_by_name = {"Sequential": keras.Sequential, "Functional": keras.Model, "Model": keras.Model}
        if config["class_name"] not in models_by_name:
            return keras.saving.deserialize_keras_object(config, custom_objects=custom_objects)
        with keras.saving.custom_object_scope(custom_objects or {}):
            return models_by_name[config["class_name"]].from_config(config["config"])

    models.model_from_config = model_from_config


watch()
