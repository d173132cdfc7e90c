"""The states of a slot, with no process behind them."""

import pytest

from farmhand.slots import BUCKETS, Slot, State
from wire import codec, protocol

RESET, STEP, ASK = protocol.RESET, protocol.STEP, protocol.ASK
OBSERVATION, TRANSITION, FAULT, LOST = protocol.OBSERVATION, protocol.TRANSITION, protocol.FAULT, protocol.LOST


def slot_in(state):
    """A leased slot that came to a state by the events that lead there, with command 1 or 2 under way if any is."""
    slot = Slot(3, "Env")
    if state is State.EMPTY:
        slot.take("me")
        return slot
    slot.started(100)
    slot.take("me")
    if state is State.STARTING:
        return slot
    slot.constructed()
    if state is State.IDLE:
        return slot
    ask(slot, RESET, 1)
    if state is State.RESETTING:
        return slot
    slot.replied(OBSERVATION, 0, 1, b"first")
    if state is State.READY:
        return slot
    ask(slot, STEP, 2)
    return slot


def ask(slot, kind, seq, body=b"body"):
    """Gives a command that must reach the worker; returns the ticket it got."""
    frame, reply = slot.command(kind, seq, body)
    assert reply is None
    ((sent, _, ticket, arrived),) = protocol.FrameReader().feed(frame)
    assert (sent, arrived) == (kind, body)
    return ticket


def why(reply):
    assert reply.kind == LOST
    return codec.decode(reply.body)["text"]


@pytest.mark.parametrize("state", State)
def test_slot_in_brings_each_state(state):
    assert slot_in(state).state is state


# What each command does in each state: the next state, and whether a frame goes to the worker or "lost" to the host.
COMMANDS = [
    (State.EMPTY, RESET, State.EMPTY, "held"),
    (State.STARTING, RESET, State.STARTING, "held"),
    (State.IDLE, RESET, State.RESETTING, "frame"),
    (State.RESETTING, RESET, State.RESETTING, "lost"),
    (State.READY, RESET, State.RESETTING, "frame"),
    (State.STEPPING, RESET, State.STEPPING, "lost"),
    (State.EMPTY, STEP, State.EMPTY, "lost"),
    (State.STARTING, STEP, State.STARTING, "lost"),
    (State.IDLE, STEP, State.IDLE, "lost"),
    (State.RESETTING, STEP, State.RESETTING, "lost"),
    (State.READY, STEP, State.STEPPING, "frame"),
    (State.STEPPING, STEP, State.STEPPING, "lost"),
]


@pytest.mark.parametrize(("before", "kind", "after", "what"), COMMANDS)
def test_a_command_in_each_state(before, kind, after, what):
    slot = slot_in(before)
    frame, reply = slot.command(kind, 9, b"body")
    assert slot.state is after
    assert (frame is not None, reply is not None) == (what == "frame", what == "lost")
    if reply is not None:
        assert (reply.seq, reply.kind) == (9, LOST)


REPLIES = [
    (State.RESETTING, OBSERVATION, 0, State.READY),
    (State.RESETTING, FAULT, 0, State.IDLE),
    (State.STEPPING, TRANSITION, 0, State.READY),
    (State.STEPPING, TRANSITION, protocol.TERMINATED, State.IDLE),
    (State.STEPPING, TRANSITION, protocol.TRUNCATED, State.IDLE),
    (State.STEPPING, FAULT, 0, State.IDLE),
]


@pytest.mark.parametrize(("before", "kind", "flags", "after"), REPLIES)
def test_a_reply_goes_to_its_asker_under_the_askers_number(before, kind, flags, after):
    slot = slot_in(before)
    number = slot.asked
    reply = slot.replied(kind, flags, slot.ticket, b"result")
    assert slot.state is after
    assert (reply.seq, reply.kind, reply.flags, reply.body) == (number, kind, flags, b"result")


def test_steps_and_episodes_of_the_present_worker_are_counted():
    slot = slot_in(State.STEPPING)
    slot.replied(TRANSITION, protocol.TERMINATED, 2, b"")
    assert (slot.steps, slot.episodes) == (1, 1)
    slot.died("killed")
    slot.started(101)
    assert (slot.steps, slot.episodes, slot.starts) == (0, 0, 2)


@pytest.mark.parametrize("state", [state for state in State if state is not State.EMPTY])
def test_death_leaves_an_empty_slot_in_any_state_and_tells_the_one_who_waits(state):
    slot = slot_in(state)
    reply = slot.died("killed by SIGKILL")
    assert (slot.state, slot.pid, slot.trouble) == (State.EMPTY, None, "killed by SIGKILL")
    waiting = {State.RESETTING: 1, State.STEPPING: 2}
    assert (reply and reply.seq) == waiting.get(state)
    if reply:
        assert why(reply) == "killed by SIGKILL"
    assert slot.failures == (state is State.STARTING), "only a failed construction counts as one"
    assert slot.lease == "me", "the lease outlives the worker"


def test_a_step_after_a_death_that_nobody_asked_about_says_why():
    slot = slot_in(State.READY)
    slot.died("killed by SIGSEGV")
    _, reply = slot.command(STEP, 2, b"")
    assert why(reply) == "killed by SIGSEGV", "and nothing beside it that would lead elsewhere"
    slot.started(101)
    _, reply = slot.command(STEP, 3, b"")
    assert "SIGSEGV" in why(reply)


@pytest.mark.parametrize("state", [State.EMPTY, State.STARTING])
def test_a_reset_that_comes_too_early_is_held_until_the_environment_stands(state):
    slot = slot_in(state)
    assert slot.command(RESET, 1, b"seed") == (None, None)
    if state is State.EMPTY:
        slot.started(100)
    (frame,) = slot.constructed()
    assert slot.state is State.RESETTING
    ((kind, _, ticket, body),) = protocol.FrameReader().feed(frame)
    assert (kind, body) == (RESET, b"seed")
    assert slot.replied(OBSERVATION, 0, ticket, b"first").seq == 1


def test_a_held_reset_is_lost_with_the_construction_and_the_next_one_is_refused_at_once():
    slot = slot_in(State.STARTING)
    slot.command(RESET, 1, b"")
    assert why(slot.died("no such file")) == "no such file"
    _, reply = slot.command(RESET, 2, b"")
    assert why(reply) == "no such file", "a slot that can not be built keeps nobody waiting"
    slot.started(101)
    assert slot.constructed() == [], "a reset that was lost is not done after all"
    assert (slot.failures, slot.trouble) == (0, None)


def test_a_held_reset_of_a_former_holder_is_not_done():
    slot = slot_in(State.STARTING)
    slot.command(RESET, 1, b"")
    slot.free()
    assert slot.constructed() == []
    assert slot.state is State.IDLE


def test_the_late_reply_to_a_former_holders_command_is_dropped():
    slot = slot_in(State.STEPPING)
    slot.free()
    slot.take("you")
    mine = ask(slot, RESET, 2)  # the very number that the former holder's step had
    assert slot.replied(TRANSITION, protocol.TERMINATED, mine - 1, b"yours") is None
    assert slot.state is State.RESETTING
    reply = slot.replied(OBSERVATION, 0, mine, b"mine")
    assert (reply.seq, reply.body) == (2, b"mine")


@pytest.mark.parametrize(("state", "kind"), [(State.STEPPING, TRANSITION), (State.RESETTING, OBSERVATION)])
def test_a_slot_that_was_freed_in_the_middle_is_idle_once_its_worker_is_back(state, kind):
    slot = slot_in(state)
    slot.free()
    assert slot.state is state, "the worker does not know"
    assert slot.replied(kind, 0, slot.ticket, b"") is None
    assert slot.state is State.IDLE


def test_a_freed_slot_has_no_episode_for_the_next_holder():
    slot = slot_in(State.READY)
    slot.free()
    slot.take("you")
    _, reply = slot.command(STEP, 1, b"")
    assert "no episode" in why(reply)


def test_the_next_holder_can_not_ask_for_a_former_holders_result():
    slot = slot_in(State.READY)
    slot.free()
    slot.take("you")
    _, reply = slot.command(ASK, 1, b"")
    assert why(reply)


@pytest.mark.parametrize("state", [State.RESETTING, State.STEPPING])
def test_asking_for_a_command_under_way_waits_for_its_answer(state):
    slot = slot_in(state)
    assert slot.command(ASK, slot.asked, b"") == (None, None)
    assert slot.state is state


def test_asking_for_a_finished_command_gives_its_answer_again():
    slot = slot_in(State.STEPPING)
    reply = slot.replied(TRANSITION, protocol.TRUNCATED, 2, b"result")
    for _ in range(2):
        assert slot.command(ASK, 2, b"") == (None, reply)


def test_asking_for_a_command_that_died_with_its_worker_says_why():
    slot = slot_in(State.STEPPING)
    slot.died("killed")
    assert why(slot.command(ASK, 2, b"")[1]) == "killed"


def test_a_command_that_was_asked_about_before_it_came_is_refused_when_it_comes():
    # After a broken connection the question can overtake the command, which may still be in a buffer on the way.
    slot = slot_in(State.READY)
    assert "never reached" in why(slot.command(ASK, 2, b"")[1])
    frame, reply = slot.command(STEP, 2, b"")
    assert frame is None, "its host was told that it never happens"
    assert why(reply)
    assert slot.state is State.READY
    assert ask(slot, STEP, 3)


def test_a_command_that_comes_twice_is_done_once():
    slot = slot_in(State.STEPPING)
    assert slot.command(STEP, 2, b"") == (None, None), "it is under way"
    reply = slot.replied(TRANSITION, 0, 2, b"result")
    assert slot.command(STEP, 2, b"") == (None, reply)
    assert slot.state is State.READY


def test_numbers_begin_anew_with_each_holder():
    slot = slot_in(State.STEPPING)
    slot.replied(TRANSITION, 0, 2, b"")
    slot.free()
    slot.take("you")
    assert ask(slot, RESET, 1)


def test_a_host_can_not_give_the_farms_own_commands():
    slot = slot_in(State.READY)
    for seq, kind in enumerate((protocol.CONSTRUCT, protocol.CLOSE, 77), start=9):
        frame, reply = slot.command(kind, seq, b"")
        assert frame is None
        assert "reset, step and ask" in why(reply)
    assert slot.state is State.READY


def test_a_worker_that_is_ended_on_purpose_while_it_starts_is_no_failure():
    slot = slot_in(State.STARTING)
    slot.command(RESET, 1, b"seed")
    assert slot.died("changes to another environment", wanted=True) is None
    assert slot.failures == 0
    slot.started(101)
    (frame,) = slot.constructed()
    assert frame, "the reset waits for the new worker"


# The ledger.


def counted(slot):
    """The buckets that are not 0; given is their sum and what is under way."""
    kept = {bucket: count for bucket, count in slot.ledger.items() if count}
    given = kept.pop("given", 0)
    assert given == sum(kept.values()) + slot.under_way
    assert set(kept) <= set(BUCKETS)
    return kept


ENDS = [
    (lambda slot: slot.replied(TRANSITION, 0, slot.ticket, b""), "done"),
    (lambda slot: slot.replied(FAULT, 0, slot.ticket, b""), "invalid"),
    (lambda slot: slot.died("killed"), "crashed"),
    (lambda slot: slot.died("too long", "timed out"), "timed out"),
    (lambda slot: slot.free(), "abandoned"),
    (lambda slot: slot.take("you"), "abandoned"),
]


@pytest.mark.parametrize(("end", "bucket"), ENDS)
def test_a_step_ends_in_one_bucket(end, bucket):
    slot = slot_in(State.STEPPING)
    assert (counted(slot), slot.under_way) == ({}, 1)
    end(slot)
    assert (counted(slot), slot.under_way) == ({bucket: 1}, 0)
    slot.replied(TRANSITION, 0, slot.ticket, b"late")
    slot.died("and later the worker")
    assert counted(slot) == {bucket: 1}


@pytest.mark.parametrize("state", [state for state in State if state is not State.READY])
def test_a_step_that_never_reaches_the_worker_is_counted_as_well(state):
    slot = slot_in(state)
    before = sum(counted(slot).values())
    slot.command(STEP, 9, b"")
    assert slot.ledger["crashed"] == 1
    assert sum(counted(slot).values()) == before + 1


@pytest.mark.parametrize("end", [end for end, _ in ENDS])
def test_resets_are_no_steps(end):
    slot = slot_in(State.RESETTING)
    end(slot)
    assert counted(slot) == {}


def test_a_step_that_comes_twice_is_counted_once():
    slot = slot_in(State.STEPPING)
    slot.command(STEP, 2, b"")
    slot.replied(TRANSITION, 0, 2, b"result")
    slot.command(ASK, 2, b"")
    slot.command(STEP, 2, b"")
    assert counted(slot) == {"done": 1}


def test_a_loss_says_its_bucket():
    slot = slot_in(State.STEPPING)
    assert codec.decode(slot.died("too long", "timed out").body) == {"text": "too long", "bucket": "timed out"}
    assert codec.decode(slot.command(STEP, 3, b"")[1].body)["bucket"] == "crashed", "that one never began"


# Replacement, and quarantine.


def test_a_worker_that_is_replaced_between_two_episodes_is_no_loss():
    slot = slot_in(State.STEPPING)
    slot.replied(TRANSITION, protocol.TERMINATED, 2, b"")
    slot.recycle("memory")
    assert (slot.state, slot.trouble, slot.recycled) == (State.EMPTY, None, {"memory": 1})
    assert slot.command(RESET, 3, b"seed") == (None, None), "held until the next one stands"
    slot.started(101)
    (frame,) = slot.constructed()
    assert frame
    assert not slot.quarantined


def test_a_step_after_a_death_says_why_though_a_spare_stands_already():
    slot = slot_in(State.READY)
    slot.died("killed by SIGSEGV")
    slot.started(101)
    slot.constructed()
    assert "SIGSEGV" in why(slot.command(STEP, 2, b"")[1])
    ask(slot, RESET, 3)


def live_and_die(slot, steps, flags=0, lived=1.0):
    slot.started(100)
    slot.constructed()
    slot.take("me")
    ticket = ask(slot, RESET, 1)
    slot.replied(OBSERVATION, 0, ticket, b"")
    for number in range(steps):
        ticket = ask(slot, STEP, number + 2)
        slot.replied(TRANSITION, flags if number == steps - 1 else 0, ticket, b"")
    slot.died("killed", lived=lived)


def test_workers_that_die_one_after_the_other_and_did_nothing_are_a_failure_to_start():
    slot = Slot(3, "Env")
    failed = []
    for _ in range(5):
        live_and_die(slot, 3)
        failed.append((slot.failed, slot.quarantined))
    assert failed == [(0, False), (0, False), (1, True), (2, True), (3, True)]
    assert why(slot.command(RESET, 99, b"")[1]) == "killed", "nobody waits for it"


@pytest.mark.parametrize(
    "life", [{"steps": 10}, {"steps": 1, "flags": protocol.TERMINATED}, {"steps": 0, "lived": 60.0}]
)
def test_a_worker_that_was_of_use_ends_the_row(life):
    slot = Slot(3, "Env")
    for _ in range(4):
        live_and_die(slot, 3)
    live_and_die(slot, **life)
    assert (slot.failed, slot.quarantined) == (0, False)


def test_a_slot_in_quarantine_is_out_of_it_while_the_next_worker_is_tried():
    slot = slot_in(State.STARTING)
    slot.died("no such file")
    assert slot.quarantined
    slot.started(101)
    assert not slot.quarantined
    slot.constructed()
    assert slot.failed == 0
