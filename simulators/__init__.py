"""Ready recipes for simulators that need a Python of their own. Data only: this file imports nothing.

A recipe is a file in this folder and the name of a function in it. A farm hands both to its worker, which
loads the file by its path inside the simulator's Python; so no recipe may import anything of this project,
and this package may be imported where no simulator is installed.

    python farm.py osim:L2M2019 --python .venv-osim/bin/python
"""

_OSIM_NEEDS = (
    "opensim 4.6 and osim-rl 3.0.11 in a Python of their own: `make osim`, then --python .venv-osim/bin/python"
)

# The keys are what a user types after `farm.py`; `file` is relative to this folder.
RECIPES = {
    "osim:L2M2019": {
        "file": "osim.py",
        "factory": "L2M2019",
        "about": "a walking body, 22 muscles follow a target velocity (NeurIPS 2019 Learn to Move)",
        "needs": _OSIM_NEEDS,
    },
    "osim:Arm2D": {
        "file": "osim.py",
        "factory": "Arm2D",
        "about": "an arm in the plane, 6 muscles reach for a target; some steps take 1,000 times longer than others",
        "needs": _OSIM_NEEDS,
    },
    "faulty": {
        "file": "faulty.py",
        "factory": "FaultyEnv",
        "about": "hangs, crashes, leaks or returns nonsense on command, to try a set-up with",
        "needs": "numpy; any Python from 2.7 on",
    },
}
