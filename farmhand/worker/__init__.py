"""The process in a slot. Started by the path of this folder, under the simulator's own Python; see `__main__`.

Nothing here is imported by the farm.
"""
