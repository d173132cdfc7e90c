"""A slot as a Pyro4 object of its own, and the example that drives one."""

import subprocess
import sys

import Pyro4
import pytest
from farms import ROOT, running_farm
from helpers import poll_until

from farmer import Farmer
from wire.errors import NoFreeSlot

COUNTING = "environments:CountingEnv"
SLOW = "environments:SlowEnv"


@pytest.fixture(scope="module")
def farm():
    with running_farm(COUNTING, slots=2, kwargs={"length": 3}) as farm:
        yield farm


@pytest.fixture
def connect(farm):
    """Opens slot objects, each over a connection of its own."""
    proxies = []

    def opened(number, address=farm.address):
        proxies.append(Pyro4.Proxy(f"PYRO:slot-{number}@{address}"))
        proxies[-1]._pyroTimeout = 30.0
        return proxies[-1]

    Pyro4.config.SERIALIZER = "msgpack"
    yield opened
    for proxy in proxies:
        proxy._pyroRelease()
    poll_until(lambda: farm.describe()["free"] == 2, 30, "free slots")


@pytest.mark.slow
def test_the_example_runs_against_a_farm():
    with running_farm("Pendulum-v1", slots=1) as farm:
        done = subprocess.run(
            [sys.executable, str(ROOT / "examples" / "one_slot.py"), farm.address],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert len(lines) == 3
        assert all(line.startswith("[") for line in lines)
        assert farm.describe()["free"] == 1, "it gave the slot back"


def test_a_slot_object_plays_an_episode_in_plain_values(farm, connect):
    slot = connect(0)
    observation, info = slot.reset(7, {"level": 2})
    assert observation[1:] == [0.0, 0.0]
    assert (info["seed"], info["options"]) == (7, {"level": 2})
    for step in (1, 2, 3):
        observation, reward, terminated, truncated, info = slot.step([0.5])
        assert observation[1:] == [step, 0.5]
        assert (reward, terminated, truncated) == (step, False, step == 3)


def test_a_step_without_an_episode_is_refused_in_words(farm, connect):
    with pytest.raises(RuntimeError, match="no episode runs in slot 0"):
        connect(0).step([0.5])


def test_a_wrong_action_ends_the_episode_and_says_so(farm, connect):
    slot = connect(0)
    slot.reset()
    with pytest.raises(
        RuntimeError, match=r"(?s)not stepped, and its episode has ended with this\n  now: reset begins"
    ):
        slot.step([0.5, 1.0])
    with pytest.raises(RuntimeError, match="no episode runs in slot 0"):
        slot.step([0.5])
    assert slot.reset()[0][1:] == [0.0, 0.0]


def test_a_held_slot_is_refused_to_another_connection_and_to_a_farmer(farm, connect):
    connect(0).reset()
    with pytest.raises(RuntimeError, match="slot 0 is held by another connection"):
        connect(0).reset()
    with Farmer(COUNTING, [(farm.address, 2)]) as farmer:
        assert farmer.nb_slots == 1, "a farmer gets the other slot only"
        with pytest.raises(NoFreeSlot, match="no slot is free"):
            Farmer(COUNTING, [(farm.address, 2)])
        with pytest.raises(RuntimeError, match="slot 1 is leased to another host"):
            connect(1).reset()


def test_a_released_slot_is_free_for_the_next_one(farm, connect):
    first, second = connect(0), connect(0)
    first.reset()
    second.release()  # not its own: nothing happens
    assert farm.describe()["free"] == 1
    first.release()
    assert farm.describe()["free"] == 2
    second.reset()
    with pytest.raises(RuntimeError, match="held by another"):
        first.step([0.0])


def test_the_end_of_its_connection_frees_a_slot(farm, connect):
    connect(1).reset()
    assert farm.describe()["free"] == 1
    holder = connect(0)
    holder.reset()
    assert farm.describe()["free"] == 0
    holder._pyroRelease()
    poll_until(lambda: farm.describe()["free"] == 1, 30, "the slot of the connection that ended")


def test_a_script_that_is_killed_frees_its_slot(farm):
    code = (
        "import sys, time, Pyro4; Pyro4.config.SERIALIZER = 'msgpack'\n"
        "slot = Pyro4.Proxy('PYRO:slot-0@' + sys.argv[1]); slot.reset(); print('holding', flush=True); time.sleep(60)"
    )
    script = subprocess.Popen([sys.executable, "-c", code, farm.address], stdout=subprocess.PIPE)
    try:
        assert script.stdout.readline() == b"holding\n"
        assert farm.describe()["free"] == 1
    finally:
        script.kill()
        script.wait()
        script.stdout.close()
    poll_until(lambda: farm.describe()["free"] == 2, 30, "the slot of the killed script")


@pytest.mark.slow
def test_another_connection_is_refused_at_once_though_the_holder_is_in_a_long_step():
    with running_farm(SLOW, slots=1) as farm:
        code = (
            "import sys, Pyro4; Pyro4.config.SERIALIZER = 'msgpack'\n"
            "slot = Pyro4.Proxy('PYRO:slot-0@' + sys.argv[1]); slot.reset(); slot.step([60.0])"
        )
        script = subprocess.Popen([sys.executable, "-c", code, farm.address])
        try:
            poll_until(lambda: farm.status()[0]["state"] == "stepping", 30, "the step")
            with Pyro4.Proxy(f"PYRO:slot-0@{farm.address}") as other:
                other._pyroTimeout = 3.0
                with pytest.raises(RuntimeError, match="held by another connection"):
                    other.reset()
        finally:
            script.kill()
            script.wait()


def test_an_environment_that_raises_tells_its_far_traceback():
    with running_farm("environments:RaisingEnv", slots=1) as farm, Pyro4.Proxy(f"PYRO:slot-0@{farm.address}") as slot:
        slot.reset()
        with pytest.raises(RuntimeError, match=r"(?s)asked to raise in step.*environments\.py"):
            slot.step([0.75])
        assert slot.reset()[0][1] == 0
