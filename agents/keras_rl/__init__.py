"""keras-rl's ways: what its scripts find missing under Keras 3, its callbacks, its memory, its verbs and its loop."""
