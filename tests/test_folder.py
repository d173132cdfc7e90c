"""The folder of a training has one owner at a time, and whoever dies owns nothing."""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import sys

import psutil
import pytest

from session.folder import Folder
from wire.errors import BadFolder

ROOT = pathlib.Path(__file__).resolve().parent.parent
HOLD = "import pathlib, sys, time; from session.folder import Folder; f = Folder(pathlib.Path(sys.argv[1])); "


@contextlib.contextmanager
def holder(folder):
    """A process that has the folder."""
    code = HOLD + "print('it has it', flush=True); time.sleep(100)"
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout.readline() == "it has it\n"
            yield process
        finally:
            process.kill()


def test_a_folder_is_made_and_taken_and_given_back(tmp_path):
    one = Folder(tmp_path / "a" / "b")
    with pytest.raises(BadFolder, match=r"(?s)an earlier session of this Python .* session.close\(\) frees it"):
        Folder(tmp_path / "a" / "b")
    Folder(tmp_path / "a").free()  # another one
    one.free()
    one.free()
    Folder(tmp_path / "a" / "b").free()


def test_another_process_is_named_and_kill_9_frees_what_it_had(tmp_path):
    with holder(tmp_path) as process:
        for _ in range(2):
            with pytest.raises(BadFolder, match=r"another training \(process %d\) has the folder" % process.pid):
                Folder(tmp_path)
        process.kill()
        process.wait()
        Folder(tmp_path).free()


def test_what_the_owner_has_started_does_not_keep_the_folder(tmp_path):
    code = HOLD + "import subprocess; print(subprocess.Popen(['sleep', '60'], stdout=-3, stderr=-3).pid)"
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=environment, check=True
    )
    child = psutil.Process(int(done.stdout))
    try:
        Folder(tmp_path).free()
        assert child.is_running()
    finally:
        child.kill()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_lock_file_that_cannot_be_written_is_told_in_words(tmp_path):
    (tmp_path / "lock").symlink_to("/dev/full")
    with pytest.raises(BadFolder, match=r"cannot write to .*lock: .*\n  now: make room"):
        Folder(tmp_path)


def without_fcntl(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['fcntl'] = None; " + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_where_the_system_has_no_locks_it_says_so_and_goes_on(tmp_path):
    said = without_fcntl(HOLD + "f.free()", tmp_path)
    assert "no locks on this system: see to it that no other training writes to %s" % tmp_path in said


@pytest.mark.slow
def test_checkpoints_too_do_without_locks_where_there_are_none(tmp_path):
    code = (
        "import pathlib; from agents.checkpoint import files\nwith files.locked(pathlib.Path(sys.argv[1]), True): pass"
    )
    without_fcntl(code, tmp_path)
