"""The fault bench's checker rejects what it must, its proxy harms as it says, and short forms of its runs are clean."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter

import psutil
import pytest
from farms import running_farm
from helpers import poll_until

from benchmarks.faults.account import Accounts, Watched
from benchmarks.faults.history import (
    BEGUN,
    DONE,
    RESET,
    Did,
    First,
    Got,
    History,
    Lost,
    Sent,
    action_of,
    check,
    number_of,
    read_journal,
    tag,
)
from benchmarks.faults.journal import JournalEnv
from farmer import Farmer

ROOT = pathlib.Path(__file__).resolve().parents[2]

# The checker, with histories made by hand: two slots, an episode of three steps each, and a slot lost in its fourth.


def a_good_run():
    """(events, journal, status) of a run without a fault but one death that was told."""
    events, journal = [], []
    for slot in (0, 1):
        seed, who = 7 + slot, 100 + slot
        events.append(First(slot, seed, who, tag(seed), 0, 0.0))
        journal.append(Did(RESET, who, 1, 0, tag(seed), 0))
    for step in (1, 2, 3):
        for slot in (0, 1):
            seed, who, number = 7 + slot, 100 + slot, 10 * step + slot
            events.append(Sent(slot, number, seed, step, 0.0))
            journal += [Did(kind, who, 1, step, tag(seed), number) for kind in (BEGUN, DONE)]
        events += [Got(slot, 10 * step + slot, 100 + slot, tag(7 + slot), step, step, 0.0) for slot in (0, 1)]
    events += [Sent(0, 40, 7, 4, 0.0), Lost(0, "killed", 0.0)]
    journal.append(Did(BEGUN, 100, 1, 4, tag(7), 40))
    ledger = {"sent": 7, "done": 6, "crashed": 1, "timed out": 0, "lost with its farm": 0, "under way": 0}
    return events, journal, {"farms": [{"farm": "a", "ledger": ledger}]}


def verdict_of(events, journal, status):
    history = History()
    history.events = events
    return check(history, journal, status)


def place_of(events, number):
    return next(i for i, event in enumerate(events) if isinstance(event, Got) and event.number == number)


def changed(events, number, **values):
    place = place_of(events, number)
    events[place] = events[place]._replace(**values)


def an_answer_vanishes(events, journal, status):
    del events[place_of(events, 31)]


def an_answer_vanishes_and_the_ledger_agrees(events, journal, status):
    del events[place_of(events, 31)]
    status["farms"][0]["ledger"].update(sent=6, done=5)


def a_loss_is_not_told(events, journal, status):
    del events[-1]


def an_answer_between_vanishes(events, journal, status):
    del events[place_of(events, 11)]


def the_environment_forgets_a_step(events, journal, status):
    changed(events, 30, step=2, reward=2)


def an_answer_comes_twice(events, journal, status):
    events.insert(place_of(events, 20) + 1, events[place_of(events, 20)])


def a_step_is_executed_twice(events, journal, status):
    journal.append(Did(BEGUN, 100, 1, 4, tag(7), 30))


def the_environment_had_a_step_more(events, journal, status):
    changed(events, 30, step=4, reward=4)


def two_answers_of_a_slot_change_places(events, journal, status):
    first, second = place_of(events, 10), place_of(events, 20)
    events[first], events[second] = events[second], events[first]


def a_reward_is_of_the_step_before(events, journal, status):
    changed(events, 20, reward=1)


def an_answer_is_invented(events, journal, status):
    journal[:] = [did for did in journal if (did.kind, did.number) != (DONE, 21)]


def the_environment_gets_steps_in_another_order(events, journal, status):
    mine = [i for i, did in enumerate(journal) if did.who == 101 and did.kind == BEGUN]
    journal[mine[0]], journal[mine[1]] = journal[mine[1]], journal[mine[0]]


def two_slots_change_answers(events, journal, status):
    changed(events, 20, slot=1)
    changed(events, 21, slot=0)


def an_answer_is_of_another_environment(events, journal, status):
    changed(events, 21, who=100)


def an_answer_is_of_another_episode(events, journal, status):
    changed(events, 21, tag=tag(9))


def an_episode_is_another_slots(events, journal, status):
    events[0] = events[0]._replace(tag=tag(8))


def a_step_reaches_another_environment(events, journal, status):
    journal[:] = [did._replace(tag=tag(8)) if did.number == 20 else did for did in journal]


def somebody_else_steps_an_environment(events, journal, status):
    journal.append(Did(BEGUN, 100, 1, 5, tag(7), 99))


def an_answer_is_to_nothing_that_was_sent(events, journal, status):
    place = place_of(events, 21)
    events[place] = events[place]._replace(number=98)


def two_ledgers_are_wrong_by_the_same(events, journal, status):
    status["farms"][0]["ledger"]["crashed"] = 0
    status["farms"].append({"farm": "b", "ledger": {"sent": 0, "done": 0, "crashed": 1}})


def the_ledger_of_all_farms_does_not_add_up(events, journal, status):
    status["ledger"] = dict(status["farms"][0]["ledger"], unknown=1)


def the_ledger_does_not_add_up(events, journal, status):
    status["farms"][0]["ledger"]["crashed"] = 0


def the_ledger_adds_up_to_something_else(events, journal, status):
    status["farms"][0]["ledger"].update(done=5, crashed=2)


def a_step_is_still_under_way(events, journal, status):
    status["farms"][0]["ledger"].update({"crashed": 0, "under way": 1})


REJECTED = {
    "lost": [
        an_answer_vanishes,
        an_answer_vanishes_and_the_ledger_agrees,
        an_answer_between_vanishes,
        a_loss_is_not_told,
        the_environment_forgets_a_step,
    ],
    "doubled": [an_answer_comes_twice, a_step_is_executed_twice, the_environment_had_a_step_more],
    "swapped": [
        two_answers_of_a_slot_change_places,
        a_reward_is_of_the_step_before,
        an_answer_is_invented,
        the_environment_gets_steps_in_another_order,
    ],
    "cross_slot": [
        two_slots_change_answers,
        an_answer_is_of_another_environment,
        an_answer_is_of_another_episode,
        an_episode_is_another_slots,
        a_step_reaches_another_environment,
        somebody_else_steps_an_environment,
        an_answer_is_to_nothing_that_was_sent,
    ],
    "ledger": [
        the_ledger_does_not_add_up,
        two_ledgers_are_wrong_by_the_same,
        the_ledger_of_all_farms_does_not_add_up,
        the_ledger_adds_up_to_something_else,
        a_step_is_still_under_way,
    ],
}


def test_the_checker_accepts_a_run_in_which_a_death_was_told():
    verdict = verdict_of(*a_good_run())
    assert verdict.good, verdict
    assert (verdict.sent, verdict.delivered, verdict.told, verdict.done_and_told) == (7, 6, 1, 0)


def test_a_step_that_was_done_but_told_as_lost_is_no_transition_and_no_fault():
    events, journal, status = a_good_run()
    journal.append(Did(DONE, 100, 1, 4, tag(7), 40))
    verdict = verdict_of(events, journal, status)
    assert verdict.good, verdict
    assert verdict.done_and_told == 1


@pytest.mark.parametrize(
    ("name", "wrong"),
    [(name, wrong) for name, all_wrong in REJECTED.items() for wrong in all_wrong],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_checker_rejects_a_run_in_which(name, wrong):
    run = a_good_run()
    wrong(*run)
    verdict = verdict_of(*run)
    assert getattr(verdict, name) > 0, verdict
    assert not verdict.good
    assert name in str(verdict)


def test_the_journal_has_what_an_environment_did_up_to_its_death(tmp_path):
    env = JournalEnv(str(tmp_path), who=5)
    env.reset(seed=3)
    env.step([action_of(77)])
    env.reset(seed=3, options={"fault": "raise"})
    with pytest.raises(RuntimeError):
        env.step([action_of(78)])
    env.close()
    with open(next(tmp_path.iterdir()), "ab") as file:
        file.write(b"half a rec")
    assert read_journal(tmp_path) == [
        Did(RESET, 5, 1, 0, tag(3), 0),
        Did(BEGUN, 5, 1, 1, tag(3), 77),
        Did(DONE, 5, 1, 1, tag(3), 77),
        Did(RESET, 5, 2, 0, tag(3), 0),
        Did(BEGUN, 5, 2, 1, tag(3), 78),
    ]


def test_a_number_survives_as_an_action():
    numbers = [1, 2, 3, 12345, 2**23 + 1, 2**24 - 1]
    actions = memoryview(bytearray(4 * len(numbers))).cast("f")
    for place, number in enumerate(numbers):
        actions[place] = action_of(number)
    assert [number_of(action) for action in actions] == numbers


# The proxy, between this test and a server that says everything after it.


@pytest.fixture
def echo():
    """The port of a server that sends back whatever comes."""
    server = socket.create_server(("127.0.0.1", 0))
    threads = []

    def answer(end):
        with end:
            while data := _received(end):
                end.sendall(data)

    def accept():
        while True:
            try:
                end = server.accept()[0]
            except OSError:
                return
            threads.append(threading.Thread(target=answer, args=(end,)))
            threads[-1].start()

    threads.append(threading.Thread(target=accept))
    threads[0].start()
    yield server.getsockname()[1]
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    for thread in threads:
        thread.join(5)


def _received(end):
    try:
        return end.recv(1 << 16)
    except OSError:
        return b""


class ProxyHere:
    """faults/proxy.py before a port, harming every segment in one way."""

    def __init__(self, port, kind):
        command = [sys.executable, "-m", "benchmarks.faults.proxy", "--to", f"127.0.0.1:{port}"]
        command += ["--every", "1", "--kinds", kind, "--most", "1"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        host, _, port = json.loads(self._process.stdout.readline())[0].partition(":")
        self.end = socket.create_connection((host, int(port)), 5)

    def say(self, word):
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()

    def counts(self):
        self.say("counts")
        return json.loads(self._process.stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.end.close()
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


def exchanged(proxy, data, least):
    """What comes back: at least so many bytes, and what else there is until half a second of silence; an error's name
    where the connection ends badly."""
    proxy.end.sendall(data)
    proxy.end.settimeout(30.0 if least else 0.5)
    got = b""
    try:
        while more := proxy.end.recv(1 << 16):
            got += more
            if len(got) >= least:
                proxy.end.settimeout(0.5)
    except TimeoutError:
        return got
    except ConnectionError as error:
        return type(error).__name__
    return "end"


@pytest.mark.parametrize(
    ("kind", "least", "is_right"),
    [
        ("flip", 200, lambda sent, got: sum(bin(a ^ b).count("1") for a, b in zip(sent, got, strict=True)) == 1),
        ("duplicate", 400, lambda sent, got: got == sent + sent),
        ("drop", 0, lambda sent, got: got == b""),
        ("delay", 200, lambda sent, got: got == sent),
        ("cut", 0, lambda sent, got: got in ("end", b"", "ConnectionResetError")),
        ("reset", 1, lambda sent, got: got == "ConnectionResetError"),
    ],
)
def test_the_proxy_harms_one_segment_counts_it_and_is_honest_after_that(echo, kind, least, is_right):
    sent = bytes(range(200))
    with ProxyHere(echo, kind) as proxy:
        got = exchanged(proxy, sent, least)
        assert is_right(sent, got), (kind, got)
        assert proxy.counts()[kind] == 1
        if kind in ("flip", "duplicate", "drop", "delay"):
            assert exchanged(proxy, sent, len(sent)) == sent
            assert proxy.counts()[kind] == 1


def test_a_held_proxy_lets_nothing_through_until_it_may(echo):
    with ProxyHere(echo, "delay") as proxy:
        proxy.say("calm")
        assert exchanged(proxy, b"before", 6) == b"before"
        proxy.say("hold")
        proxy.counts()  # it has obeyed
        assert exchanged(proxy, b"held", 0) == b""
        proxy.say("go")
        assert exchanged(proxy, b", and after", 15) == b"held, and after"


def test_a_calm_proxy_harms_what_is_ordered_and_no_more(echo):
    with ProxyHere(echo, "flip") as proxy:
        proxy.say("calm")
        assert exchanged(proxy, b"before", 6) == b"before"
        proxy.say("fault")
        proxy.counts()  # it has obeyed
        assert exchanged(proxy, b"harmed", 6) != b"harmed"
        assert exchanged(proxy, b"after", 5) == b"after"
        assert proxy.counts()["flip"] == 1


# What became of a slot's time.


def test_every_second_of_a_slot_is_under_the_kind_of_what_it_was_at():
    accounts = Accounts(slow=0.1, honest=0.02)
    began = time.perf_counter()
    accounts.begin("harm")
    for what, env_s, bucket in (
        ("reset", 0.0, None),
        ("step", 0.01, None),
        ("step", 0.2, None),
        ("step", 0.0, "timed out"),
        ("reset", 0.0, "lost with its farm"),
        ("reset", 0.01, None),
    ):
        accounts.sent([0], what == "step")
        time.sleep(env_s + 0.02)
        if bucket is None:
            accounts.answered(0, what == "step", env_s)
        else:
            accounts.lost(0, bucket)
        time.sleep(0.01)
    accounts.left(0)
    time.sleep(0.03)
    accounts.begin(None)
    took = time.perf_counter() - began
    spent = accounts.seconds["harm"]
    assert sum(spent.values()) == pytest.approx(took, abs=0.05)
    assert spent["work"] == pytest.approx(0.03), "of the slow one, what an honest one takes"
    assert spent["slow"] == pytest.approx(0.18)
    assert spent["reset"] == pytest.approx(0.01)
    for kind, least in (
        ("way", 0.04),
        ("start", 0.04),
        ("hang", 0.02),
        ("wire", 0.02),
        ("again", 0.02),
        ("farm", 0.03),
    ):
        assert spent[kind] >= least, kind
    assert spent["crash"] == spent["invalid"] == 0.0
    assert accounts.steps["harm"] == 2


def test_what_is_missing_adds_up_to_the_loss_of_goodput():
    accounts = Accounts()
    accounts.seconds = {"calm": Counter(work=90.0, host=10.0), "harm": Counter(work=81.0, host=9.0, hang=10.0)}
    accounts.steps = Counter(calm=1000, harm=900)
    missing = accounts.missing("harm", "calm")
    assert accounts.goodput("harm", "calm") == pytest.approx(0.9)
    assert missing["hang"] == pytest.approx(10.0)
    assert sum(missing.values()) == pytest.approx(10.0)


@pytest.mark.slow
def test_a_farmer_that_keeps_accounts_tells_a_killed_worker_from_a_farm_that_is_gone():
    accounts = Accounts()
    with running_farm("environments:SlowEnv", slots=2) as farm:
        with Watched(accounts, "environments:SlowEnv", [(farm.address, 2)]) as pool:
            pool.reset([0, 1])
            pool.recv(2)
            accounts.begin("harm")
            pool.send([[30.0], [0.01]], [0, 1])
            os.kill(farm.workers()[0], signal.SIGKILL)
            pool.recv(2)
            spent = dict(accounts.seconds["harm"])
            assert spent["crash"] > 0
            assert spent["work"] > 0
            assert "farm" not in spent
            pool.send([[30.0]], [1])
            farm.kill()
            assert pool.recv(1).lost.all()
            accounts.begin(None)
        assert accounts.seconds["harm"]["farm"] > 0
        assert accounts.steps["harm"] == 1


# Short forms of the runs.


def bench(*words, limit=100):
    """(exit code, what it said) of benchmarks/faults/bench.py."""
    command = [sys.executable, "-m", "benchmarks.faults.bench", *words]
    run = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=ROOT)
    return run.returncode, run.stdout + run.stderr


CLEAN = "0 lost, 0 doubled, 0 swapped, 0 cross-slot"


def test_workers_that_are_killed_come_back_and_nothing_is_lost_unsaid():
    code, said = bench("kills", "--count", "5", "--block", "5", "--calm", "0.5", "--settle", "0.1")
    assert code == 0, said
    assert "5 recovered" in said
    assert "5 told as lost (5 crashed" in said
    assert CLEAN in said


@pytest.mark.slow
def test_a_network_that_harms_everything_loses_doubles_swaps_and_mixes_nothing_up():
    code, said = bench(
        "network", "--faults", "60", "--steps", "1000", "--proxies", "3", "--farms", "1", "--every", "20"
    )
    assert code == 0, said
    assert CLEAN in said
    assert "every farm still runs" in said
    assert int(re.search(r"(\d+) faults \(", said)[1]) >= 25


@pytest.mark.slow
def test_farms_that_are_killed_stopped_and_cut_off_leave_no_orphans_and_come_back():
    code, said = bench("farms", "--count", "3", "--at-a-time", "3", "--calm", "1")
    assert code == 0, said
    assert CLEAN in said
    assert "0 orphans after 1 s" in said
    assert ", 0 of its slots lost" in said


@pytest.mark.slow
def test_a_host_that_is_killed_frees_its_slots_and_disturbs_nobody():
    code, said = bench("hosts", "--count", "2", "--at-a-time", "2")
    assert code == 0, said
    assert CLEAN in said
    assert "0 of its slots touched" in said
    assert float(re.search(r"longest ([\d.]+) s", said)[1]) < 40


@pytest.mark.slow
def test_many_faults_in_a_row_are_looked_at_twice():
    code, said = bench("drift", "--faults", "40", "--looks", "2")
    assert code in (0, 1), said  # so soon the first threads and buffers still count as growth
    assert re.search(r"after 0, 20, 40 faults: RSS of the farm [\d.]+, [\d.]+, [\d.]+ MB; RSS of the host", said), said
    assert int(re.search(r"(\d+) told as lost", said)[1]) > 0


def test_hangs_of_all_kinds_are_detected():
    code, said = bench("hangs", "--count", "5")
    assert code == 0, said
    assert "5 told as lost (5 timed out" in said
    assert "; 0 processes left after 1 s" in said


def test_a_kill_in_the_middle_of_a_reset_costs_no_pause_and_a_second_one_does():
    slow = "environments:SlowEnv"
    with running_farm(slow, slots=1, kwargs={"reset_takes": 30.0}) as farm, Farmer(slow, [(farm.address, 1)]) as farmer:
        for vacant in ([0], []):
            farmer.reset([0])
            poll_until(lambda: farm.status()[0]["state"] == "resetting", 30, "the reset")
            os.kill(farm.workers()[0], signal.SIGKILL)
            assert [row.lost for row in farmer.collect()] == [True]
            assert farmer.vacant() == vacant
        poll_until(lambda: farmer.vacant() == [0], 30, "the end of the pause")


@pytest.mark.slow
def test_ctrl_c_ends_a_run_with_all_that_it_started(tmp_path):
    with open(tmp_path / "out.txt", "w") as out:
        run = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.faults.bench", "kills"], stdout=out, stderr=out, cwd=ROOT
        )
    poll_until(lambda: psutil.Process(run.pid).children(), 30, "a farm")
    time.sleep(0.5)  # into its start, or its work
    started = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 130, (tmp_path / "out.txt").read_text()
    poll_until(lambda: not any(process.is_running() for process in started), 30, "the farm's own end")
