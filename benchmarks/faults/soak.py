"""Training under faults of all kinds, for `bench.py soak`."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.faults.account import BY_FAULTS, KINDS, Accounts, Watched
from benchmarks.faults.parts import Bench, Farm, Proxy, row

INSIDE = ["nan", "inf", "wrong_shape", "raise", "raise_unpicklable", "exit", "segfault", "abort", "spin", "hang_in_c"]
INSIDE += ["stop", "leak", "slow", "print", "grandchild"]
#: Of a hundred faults: whole farms that go away, workers that are killed and stopped, the wire, and the environments.
SHARES = {"away": 1, "kill": 12, "stop": 12, "wire": 45, "inside": 30}
AWAY = 6.0  #: s that a farm is stopped or cut off
SETTLE = 15.0  #: s between the last fault and a look at how fast it is without


def soak(args: argparse.Namespace) -> int:
    """SAC learns Pendulum from two farms while everything fails at random; before, between and after, nothing does."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from agents import networks

    with Bench() as bench:
        orders = bench.folder / "orders"
        orders.mkdir()
        kwargs = {"orders": str(orders), "takes": args.takes, "seconds": args.slow}
        options = ["--step-timeout", "1", "--reset-timeout", "1", "--start-timeout", "20", "--spares", str(args.spares)]
        options += ["--recycle-memory", "300M", "--memory", "600M"]
        env = "benchmarks.faults.journal:FaultyPendulum"
        both = [Farm(bench.folder, args.slots, options, env, kwargs) for _ in range(2)]
        proxies = [bench.proxy(farm, seed=args.seed) for farm in both]
        for proxy in proxies:
            proxy.say("calm")
        accounts = Accounts(slow=args.takes + 0.8 * args.slow, honest=args.takes)
        try:
            farmlist = [(proxy.addresses[0], args.slots) for proxy in proxies]
            with Watched(accounts, env, farmlist, seed=args.seed) as farmer:
                agent = networks.make_sac(
                    farmer.observation_space,
                    farmer.action_space,
                    seed=args.seed,
                    hidden=(64, 64),
                    learning_rate=1e-3,
                    memory_limit=args.memory,
                    updates_per_step=args.updates,
                )
                trouble = Trouble(args, agent, accounts, both, proxies, orders)
                trouble.start()
                with contextlib.suppress(KeyboardInterrupt):
                    agent.fit(farmer, nb_steps=10**9, verbose=0)
                trouble.join(30)
                if trouble.error is not None:
                    raise trouble.error
                if not trouble.done:
                    raise KeyboardInterrupt
                played = agent.test(farmer, nb_episodes=10, visualize=False, verbose=0)
                farmer.abandon()
                end = time.monotonic() + 10
                while farmer.busy and time.monotonic() < end:
                    time.sleep(0.05)
                ledgers = [farm["ledger"] for farm in farmer.status()["farms"]]
        finally:
            for farm in both:
                farm.stop()
    adds_up = all(ledger["sent"] == sum(n for name, n in ledger.items() if name != "sent") for ledger in ledgers)
    told = {name: sum(ledger[name] for ledger in ledgers) for name in ledgers[0] if name not in ("sent", "done")}
    print("ledgers: %s" % ledgers)
    print(_table(accounts))
    measured = "%s; %s; mean return of 10 episodes %.0f; %d steps, not done: %s; ledger %s" % (
        trouble.summary(),
        _goodput(accounts),
        float(np.mean(played.history["episode_reward"])),
        sum(ledger["sent"] for ledger in ledgers),
        ", ".join("%d %s" % (n, name) for name, n in told.items() if n) or "none",
        "sums" if adds_up else "**wrong**",
    )
    wanted = "drift <= 1 %, goodput >= 95 %, Pendulum is learnt (about -150)"
    row("%g min of SAC on Pendulum under faults of all kinds" % args.minutes, wanted, measured, None)
    return 0 if adds_up else 1


def _goodput(accounts: Accounts) -> str:
    missing, total = accounts.missing("harm", "calm"), sum(accounts.seconds["harm"].values())
    most = sorted(((seconds, kind) for kind, seconds in missing.items()), reverse=True)
    return "goodput %.1f %% of fault-free; faults alone cost %.1f %% of %.0f slot-seconds; lost by kind: %s" % (
        100 * accounts.goodput("harm", "calm"),
        100 * sum(missing[kind] for kind in BY_FAULTS) / total,
        total,
        ", ".join("%s %.0f s" % (kind, seconds) for seconds, kind in most),
    )


def _table(accounts: Accounts) -> str:
    """Slot-seconds by kind, as shares, and what a step took of each."""
    lines = ["%-8s %9s %9s %12s %12s %9s" % ("", "calm", "harm", "calm, a step", "harm, a step", "lost")]
    calm, harm = accounts.seconds["calm"], accounts.seconds["harm"]
    missing = accounts.missing("harm", "calm")
    for kind in KINDS:
        numbers = [100 * spent[kind] / sum(spent.values()) for spent in (calm, harm)]
        each = [1e3 * accounts.seconds[name][kind] / max(1, accounts.steps[name]) for name in ("calm", "harm")]
        lines.append("%-8s %7.2f %% %7.2f %% %9.2f ms %9.2f ms %7.0f s" % (kind, *numbers, *each, missing[kind]))
    return "\n".join(lines)


class Trouble(threading.Thread):
    """Breaks things by a Poisson process, and keeps an eye on host and farms."""

    def __init__(
        self,
        args: argparse.Namespace,
        agent: Any,
        accounts: Accounts,
        farms: list[Farm],
        proxies: list[Proxy],
        orders: Path,
    ):
        super().__init__(daemon=True)
        self.error: BaseException | None = None
        self.done = False
        self.counts: Counter[str] = Counter()
        self.samples: list[dict[str, float]] = []
        self._args, self._agent, self._accounts = args, agent, accounts
        self._farms, self._proxies, self._orders = farms, proxies, orders
        self._rng = random.Random(args.seed)
        self._away: threading.Thread | None = None
        self._harmed = 0.0  # s in which there were faults

    def run(self) -> None:
        try:
            self._run()
            self.done = True
        except BaseException as error:
            self.error = error
        os.kill(os.getpid(), signal.SIGINT)  # `fit` ends between two steps

    def _run(self) -> None:
        self._span(self._args.warm_up, None, False)
        # Threads and buffers that the first faults need are no drift; what comes after them is.
        self._span(self._args.first_faults, None, True)
        self._span(SETTLE, None, False)
        for _ in range(self._args.blocks):
            self._span(self._args.calm, "calm", False)
            self._span(60 * self._args.minutes / self._args.blocks, "harm", True)
            self._span(SETTLE, None, False)
        self._span(self._args.calm, "calm", False)
        for proxy in self._proxies:
            self.counts.update(proxy.counts())

    def _span(self, seconds: float, name: str | None, harm: bool) -> None:
        """Lets time pass, with or without faults; a look at everything every second."""
        begin, steps, looked = time.monotonic(), self._agent.step, 0.0
        due = begin + self._rng.expovariate(1 / self._args.every) if harm else float("inf")
        self._accounts.begin(name)
        while (now := time.monotonic()) < begin + seconds:
            while due <= now:
                self._harm(self._rng.choices(list(SHARES), list(SHARES.values()))[0])
                due += self._rng.expovariate(1 / self._args.every)
            if now - looked >= 1.0:
                looked = now
                if name is not None:
                    self.samples.append(self._look(now))
            time.sleep(max(0.01, min(0.1, due - time.monotonic())))
        if self._away is not None:
            self._away.join(60)
        for left in self._orders.iterdir():
            left.unlink()
        self._accounts.begin(None)
        self._harmed += harm * (time.monotonic() - begin)
        print("%s: %d steps in %.0f s" % (name, self._agent.step - steps, seconds), file=sys.stderr, flush=True)

    def _harm(self, kind: str) -> None:
        if kind == "away":
            if self._away is None or not self._away.is_alive():
                self._away = threading.Thread(target=self._take_away, daemon=True)
                self._away.start()
            return
        if kind == "wire":  # counted by the proxies, for a segment must come by
            self._rng.choice(self._proxies).say("fault")
            return
        if kind == "inside":
            kind = self._rng.choice(INSIDE)
            (self._orders / ("%s.%d" % (kind, self.counts.total()))).touch()
        else:
            workers = [pid for farm in self._farms for pid in farm.children()]
            if not workers:
                return
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._rng.choice(workers), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
            kind = "kill -9" if kind == "kill" else "SIGSTOP"
        self.counts[kind] += 1

    def _take_away(self) -> None:
        """The second farm goes: the first one's daemon lives through all of it, so that it can be watched."""
        farm, proxy = self._farms[1], self._proxies[1]
        kind = self._rng.choice(("farm killed", "farm stopped", "farm cut off"))
        self.counts[kind] += 1
        if kind == "farm killed":
            farm.kill()
            farm.start()
        else:
            os.kill(farm.pid, signal.SIGSTOP) if kind == "farm stopped" else proxy.say("hold")
            time.sleep(AWAY)
            os.kill(farm.pid, signal.SIGCONT) if kind == "farm stopped" else proxy.say("go")

    def _look(self, now: float) -> dict[str, float]:
        found = {"at": now}
        for name, pid in (("host", os.getpid()), ("farm", self._farms[0].pid)):
            process = psutil.Process(pid)
            found["RSS of the " + name] = process.memory_info().rss
            found["descriptors of the " + name] = process.num_fds()
            found["threads of the " + name] = process.num_threads()
            zombies = 0
            for child in process.children():
                with contextlib.suppress(psutil.Error):
                    zombies += child.status() == psutil.STATUS_ZOMBIE
            found["zombies of the " + name] = zombies
        return found

    def summary(self) -> str:
        """What was done to them, and how much of everything they hold at the end, beside the beginning."""
        drifts = []
        tenth = max(1, min(len(self.samples) // 5, int(self._args.calm)))
        for name in self.samples[0]:
            if name == "at":
                continue
            before, after = (
                statistics.median(sample[name] for sample in part)
                for part in (self.samples[:tenth], self.samples[-tenth:])
            )
            if name.startswith("zombies"):
                drifts.append("%d %s" % (after, name))
            elif name.startswith("RSS"):
                drifts.append(
                    "%s %.1f -> %.1f MB (%+.1f %%)" % (name, before / 2**20, after / 2**20, _drift(before, after))
                )
            else:
                drifts.append("%s %d -> %d" % (name, before, after))
        total = sum(self.counts.values())
        return "%d faults, %.1f a minute: %s; %s" % (
            total,
            60 * total / self._harmed,
            ", ".join("%d %s" % (n, kind) for kind, n in self.counts.items()),
            ", ".join(drifts),
        )


def _drift(before: float, after: float) -> float:
    return 100 * (after - before) / before
