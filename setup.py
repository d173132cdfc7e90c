"""What pyproject.toml cannot say: a file that belongs into site-packages itself, where Python looks when it starts."""

import sysconfig
from pathlib import Path

from setuptools import Distribution, setup


class WithData(Distribution):
    """An editable installation asks by this name whether there are data files, and setuptools has no such method."""

    def has_data(self) -> bool:
        return bool(self.data_files)


# A wheel's data files are named from the environment's root.
PURELIB = Path(sysconfig.get_path("purelib")).relative_to(sysconfig.get_path("data"))

setup(distclass=WithData, data_files=[(PURELIB.as_posix(), ["keras_rl_hook.pth"])])
