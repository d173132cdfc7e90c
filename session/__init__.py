"""What is behind train.py: its options, the folder of a training, the local farm, and the session at the prompt."""
