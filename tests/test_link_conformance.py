"""Every implementation of `farmer.link.Link` keeps the contract that stands there: one suite over all of them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
from farms import TESTS, running_farm
from helpers import poll_until
from proxy import Proxy

from farmer import Farmer
from farmer.farmlist import load_farmlist
from farmer.link import Link, Route, fetch
from farmer.routes import route_to
from wire import auth, codec, protocol
from wire.errors import FarmError, FarmUnreachable, LeaseLost, NoFreeSlot, NoSuchEnvironment

SLOW = "environments:SlowEnv"  # its action is how long the step sleeps
LIMIT = 30.0


class Way(NamedTuple):
    """One implementation with a farm behind it."""

    address: str
    key_file: str | None
    workers: Callable[[], list[int]]
    proxy: Proxy | None  # between link and farm, where there is a network
    freeze: Callable[[], None] | None  # stops the farm, where it is another process

    def route(self, slots: int = 3) -> Route:
        address = load_farmlist([(self.address, slots)])[0]
        return route_to(address, SLOW, auth.load_key(self.key_file) if self.key_file else None)


@contextlib.contextmanager
def over_pyro(key_file: Any = None) -> Iterator[Way]:
    with running_farm(SLOW, slots=3, key_file=key_file) as farm, contextlib.closing(Proxy(farm.port)) as proxy:
        yield Way(proxy.address, key_file, farm.workers, proxy, farm.freeze)
        with contextlib.suppress(ProcessLookupError):
            farm.signal(signal.SIGCONT)


@contextlib.contextmanager
def in_this_process() -> Iterator[Way]:
    before = {child.pid for child in psutil.Process().children()}
    here = os.getcwd()
    os.chdir(TESTS)  # where a local farm looks for the environment's module
    try:
        yield Way(
            "local:",
            None,
            lambda: [child.pid for child in psutil.Process().children() if child.pid not in before],
            None,
            None,
        )
    finally:
        os.chdir(here)


@pytest.fixture(params=["pyro", "pyro with a key", "local"])
def way(request, tmp_path):
    if request.param == "local":
        made = in_this_process()
    elif request.param == "pyro":
        made = over_pyro()
    else:
        auth.new_key(tmp_path / "farm.key")
        made = over_pyro(tmp_path / "farm.key")
    with made as found:
        yield found


class Joined:
    """A link with a lease of some slots, and all that it brought."""

    def __init__(self, link: Link, count: int):
        self.link, self.slots = link, link.acquire(SLOW, count)
        self.replies: list[list[Any]] = []
        self.lost: list[FarmError] = []
        self._seq = 0
        link.start(self.replies.extend, self.lost.append)

    def put(self, slot: int, kind: int, body: Any) -> int:
        """The number of the command."""
        self._seq += 1
        self.link.put([[slot, self._seq, kind, codec.encode(body)]])
        return self._seq

    def reset(self, *slots: int) -> None:
        asked = [self.put(slot, protocol.RESET, {"seed": 1, "options": None}) for slot in slots or self.slots]
        self.wait(*asked)

    def step(self, slot: int, sleep: float = 0.0) -> int:
        return self.put(slot, protocol.STEP, {"action": np.array([sleep], "float32"), "repeat": 1})

    def answered(self) -> list[int]:
        return [reply[1] for reply in self.replies]

    def wait(self, *asked: int) -> None:
        """Until these are answered, taking part in it as a pool does."""
        end = time.monotonic() + LIMIT
        while not set(asked) <= set(self.answered()):
            assert time.monotonic() < end, (asked, self.replies, self.lost)
            if not fetch([self.link], 0.2):
                time.sleep(0.01)

    def observation(self, seq: int) -> list[float]:
        reply = next(reply for reply in self.replies if reply[1] == seq)
        assert reply[2] in (protocol.OBSERVATION, protocol.TRANSITION), codec.decode(reply[4])
        return codec.decode(reply[4], reply[5])[0].tolist()


@pytest.fixture
def route(way):
    with contextlib.closing(way.route()) as found:
        yield found


@pytest.fixture
def joined(route):
    link = route.connect()
    try:
        yield Joined(link, 3)
    finally:
        link.close()


@pytest.mark.slow
def test_it_tells_what_the_farm_offers_and_leases_it_once(route):
    with contextlib.closing(route.connect()) as link:
        about = link.describe()
        assert (about["slots"], about["free"]) == (3, 3)
        assert SLOW in about["envs"]
        with pytest.raises(NoSuchEnvironment):
            link.acquire("environments:None", 1)
        with pytest.raises(NoFreeSlot):
            link.acquire(SLOW, 4)
        assert len(link.acquire(SLOW, 1)) == 1
        assert sorted(link.acquire(SLOW, 3)) == sorted(link.acquire(SLOW, 3)) == [0, 1, 2]
        assert link.describe()["free"] == 0
        link.release([1])
        assert link.describe()["free"] == 1
        with contextlib.closing(route.connect()) as other:
            assert other.acquire(SLOW, 1) == [1]
            link.end_lease(other.lease)
            assert link.describe()["free"] == 1
    with contextlib.closing(route.connect()) as link:
        poll_until(lambda: link.describe()["free"] == 3, LIMIT, "the lease's end with its link")


@pytest.mark.slow
def test_each_slots_replies_come_in_the_order_of_its_commands(joined):
    joined.reset()
    asked = {slot: [] for slot in joined.slots}
    for _ in range(20):
        for slot in joined.slots:
            asked[slot].append(joined.step(slot))
        joined.wait(*(seqs[-1] for seqs in asked.values()))
    for slot, seqs in asked.items():
        assert [reply[1] for reply in joined.replies if reply[0] == slot and reply[1] in seqs] == seqs
    assert len(joined.answered()) == len(set(joined.answered())) == 3 * 21
    assert joined.lost == []


@pytest.mark.slow
def test_a_slow_slot_delays_no_other_and_its_late_reply_has_its_own_number(joined):
    joined.reset()
    slow, *others = joined.slots
    late = joined.step(slow, 1.5)
    joined.link.begin()
    for _ in range(10):
        joined.wait(*(joined.step(slot) for slot in others))
    assert late not in joined.answered(), "twenty steps of no length are made while it sleeps"
    joined.wait(late)
    assert joined.observation(late)


@pytest.mark.slow
def test_without_anybody_who_fetches_replies_come_all_the_same(joined):
    joined.reset()
    asked = [joined.step(slot, 0.1) for slot in joined.slots]
    joined.link.begin()
    poll_until(lambda: set(asked) <= set(joined.answered()), LIMIT, "replies by the link's own threads")


@pytest.mark.slow
def test_it_stays_joined_while_nothing_is_asked(joined):
    joined.reset()
    time.sleep(3.0)  # more than any wait of one call; the lease lives 8 s without a sign
    joined.wait(joined.step(joined.slots[0]))
    assert joined.lost == []


@pytest.mark.slow
def test_a_worker_that_dies_is_a_reply_and_no_loss_of_the_farm(joined, way):
    joined.reset()
    asked = [joined.step(slot, 20.0) for slot in joined.slots]
    joined.link.begin()
    time.sleep(0.3)
    os.kill(way.workers()[0], signal.SIGKILL)
    poll_until(lambda: len(set(asked) & set(joined.answered())) == 1, LIMIT, "the reply of the dead one")
    assert joined.replies[-1][2] == protocol.LOST
    assert joined.lost == []


@pytest.mark.slow
def test_a_large_message_arrives_whole(joined):
    slot = joined.slots[0]
    asked = joined.put(slot, protocol.RESET, {"seed": 1, "options": {"much": "x" * (3 << 20)}})
    joined.wait(asked)
    assert joined.observation(asked)


@pytest.mark.slow
def test_a_slot_that_is_not_in_the_lease_loses_the_link_with_its_reason(joined):
    joined.step(17)
    joined.link.begin()
    poll_until(lambda: joined.lost, LIMIT, "the loss")
    assert isinstance(joined.lost[0], LeaseLost)


@pytest.mark.slow
def test_ctrl_c_in_the_middle_costs_no_command(joined):
    joined.reset()
    asked = [joined.step(slot, 0.5) for slot in joined.slots]
    joined.link.begin()
    interrupt = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        joined.wait(*asked)
    interrupt.join()
    joined.wait(*asked)
    assert [joined.observation(seq) for seq in asked]
    again = [joined.step(slot) for slot in joined.slots]
    joined.wait(*again)
    assert joined.lost == []


@pytest.mark.slow
def test_after_close_nothing_comes_and_nothing_is_lost(route):
    link = route.connect()
    joined = Joined(link, 2)
    joined.reset()
    joined.step(joined.slots[0], 0.3)
    link.begin()
    link.close()
    count = len(joined.replies)
    time.sleep(0.6)
    assert (len(joined.replies), joined.lost) == (count, [])


@pytest.mark.slow
def test_a_broken_connection_is_replaced_and_no_step_is_made_twice(joined, way):
    if way.proxy is None:
        pytest.skip("a farm in this process has no connection that could break")
    joined.reset()
    made = dict.fromkeys(joined.slots, 0)
    for cut in range(12):
        asked = {slot: joined.step(slot, 0.02 * (cut % 3)) for slot in joined.slots}
        joined.link.begin()
        if cut % 3 == 0:
            way.proxy.cut()
        joined.wait(*asked.values())
        for slot, seq in asked.items():
            reply = next(reply for reply in joined.replies if reply[1] == seq)
            made[slot] += reply[2] == protocol.TRANSITION
    for slot in joined.slots:
        last = joined.step(slot)
        joined.wait(last)
        assert joined.observation(last)[1] == made[slot] + 1, "the environment counts its own steps"
    assert len(joined.answered()) == len(set(joined.answered()))
    assert joined.lost == []


@pytest.mark.slow
def test_a_farm_that_freezes_is_lost_with_a_reason(joined, way):
    if way.freeze is None:
        pytest.skip("a farm in this process freezes with its host")
    joined.reset()
    joined.step(joined.slots[0])
    way.freeze()
    joined.link.begin()
    poll_until(lambda: joined.lost, LIMIT, "the loss of the frozen farm")
    assert len(joined.lost) == 1


@pytest.mark.slow
def test_a_farm_that_is_gone_is_told_once(joined, way, route):
    joined.reset()
    asked = joined.step(joined.slots[0], 5.0)
    joined.link.begin()
    if way.proxy is None:
        route.close()
    else:
        way.proxy.close()
    poll_until(lambda: joined.lost, LIMIT, "the loss of the farm")
    assert len(joined.lost) == 1
    assert asked not in joined.answered()


@pytest.mark.slow
def test_where_no_farm_is_connecting_says_so(way):
    if way.proxy is None:
        route = route_to(load_farmlist([("local:", 1)])[0], "environments:Missing", None)
    else:
        way.proxy.close()
        route = way.route()
    with contextlib.closing(route), pytest.raises(FarmUnreachable):
        route.connect(1.0)


def test_a_farmer_plays_over_it_and_its_ledger_sums(way):
    with Farmer(SLOW, [(way.address, 3)], key_file=way.key_file) as farmer:
        farmer.reset(farmer.vacant())
        batch = farmer.recv(3)
        for _ in range(20):
            batch = farmer.step([[0.0]] * len(batch.slot), batch.slot)
            assert len(batch) == 3
        ledger = farmer.status()["ledger"]
    assert (ledger["sent"], ledger["done"]) == (60, 60)
