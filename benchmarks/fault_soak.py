"""Training under faults of all kinds, for `faults.py soak`."""

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
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from fault_parts import Bench, Farm, Proxy, row

from farmer import Farmer

INSIDE = ["nan", "inf", "wrong_shape", "raise", "raise_unpicklable", "exit", "segfault", "abort", "spin", "hang_in_c"]
INSIDE += ["stop", "leak", "slow", "print", "grandchild"]


def soak(args: argparse.Namespace) -> int:
    """SAC learns Pendulum from two farms while everything fails at random; before and after, nothing does."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from agents import networks

    with Bench() as bench:
        switch = bench.folder / "harm"
        kwargs = {"fault": INSIDE, "probability": args.inside, "only_if": str(switch)}
        kwargs.update(takes=args.takes, seconds=args.slow)  # a slow one takes as long again
        options = ["--step-timeout", "1", "--recycle-memory", "300M", "--memory", "600M", "--spares", "1"]
        env = "journal:FaultyPendulum"
        both = [Farm(bench.folder, args.slots, options, env, kwargs) for _ in range(2)]
        proxies = [bench.proxy(farm, every=args.every, seed=args.seed) for farm in both]
        for proxy in proxies:
            proxy.say("calm")
        try:
            with Farmer(env, [(proxy.addresses[0], args.slots) for proxy in proxies], seed=args.seed) as farmer:
                agent = networks.make_sac(
                    farmer.observation_space,
                    farmer.action_space,
                    seed=args.seed,
                    hidden=(64, 64),
                    learning_rate=1e-3,
                    memory_limit=args.memory,
                    updates_per_step=args.updates,
                )
                trouble = Trouble(args, agent, farmer, both, proxies, switch)
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
    measured = "%s; goodput %.1f %% of fault-free; mean return of 10 episodes %.0f; steps not done: %s; ledger %s" % (
        trouble.summary(),
        100 * trouble.goodput(),
        float(np.mean(played.history["episode_reward"])),
        ", ".join("%d %s" % (n, name) for name, n in told.items() if n) or "none",
        "sums" if adds_up else "**wrong**",
    )
    wanted = "drift <= 1 %, goodput >= 95 %, Pendulum is learnt (about -150)"
    row("%g min of SAC on Pendulum under faults of all kinds" % args.minutes, wanted, measured, None)
    return 0 if adds_up else 1


class Trouble(threading.Thread):
    """Breaks things by a Poisson process, each kind with a rate of its own, and keeps an eye on host and farms."""

    def __init__(
        self,
        args: argparse.Namespace,
        agent: Any,
        farmer: Farmer,
        farms: list[Farm],
        proxies: list[Proxy],
        switch: Path,
    ):
        super().__init__(daemon=True)
        self.error: BaseException | None = None
        self.done = False
        self.counts: dict[str, int] = {}
        self.samples: list[dict[str, float]] = []
        self._args, self._agent, self._farmer = args, agent, farmer
        self._farms, self._proxies, self._switch = farms, proxies, switch
        self._rng = random.Random(args.seed)
        self._spans: dict[str, list[tuple[float, float]]] = {"calm": [], "harm": []}  # seconds, steps
        self._network: dict[str, int] = {}

    def run(self) -> None:
        try:
            self._run()
            self.done = True
        except BaseException as error:
            self.error = error
        os.kill(os.getpid(), signal.SIGINT)  # `fit` ends between two steps

    def _run(self) -> None:
        self._span(self._args.warm_up, None)
        self._span(self._args.calm, "calm")
        self._switch.touch()
        for proxy in self._proxies:
            proxy.say("harm")
        self._span(60 * self._args.minutes, "harm")
        self._switch.unlink()
        for proxy in self._proxies:
            proxy.say("calm")
            for kind, count in proxy.counts().items():
                self._network[kind] = self._network.get(kind, 0) + count
        self._span(15.0, None)
        self._span(self._args.calm, "calm")

    def _span(self, seconds: float, name: str | None) -> None:
        """Lets time pass, with or without faults; a look at everything every second."""
        begin, steps = time.monotonic(), self._agent.step
        rates = {"kill": self._args.kill, "stop": self._args.kill, "away": self._args.away}
        due = {kind: begin + self._rng.expovariate(1 / mean) for kind, mean in rates.items()}
        looked = 0.0
        while (now := time.monotonic()) < begin + seconds:
            if name == "harm":
                for kind, at in due.items():
                    if now >= at:
                        self._harm(kind)
                        due[kind] = time.monotonic() + self._rng.expovariate(1 / rates[kind])
            if now - looked >= 1.0:
                looked = now
                if name is not None:
                    self.samples.append(self._look(now))
            time.sleep(0.1)
        if name is not None:
            self._spans[name].append((time.monotonic() - begin, self._agent.step - steps))
        print("%s: %d steps in %.0f s" % (name, self._agent.step - steps, seconds), file=sys.stderr, flush=True)

    def _harm(self, kind: str) -> None:
        if kind == "away":  # the second farm: the first one's daemon lives through all of it, so that it can be watched
            farm, proxy = self._farms[1], self._proxies[1]
            kind = self._rng.choice(("farm killed", "farm stopped", "farm cut off"))
            if kind == "farm killed":
                farm.kill()
                farm.start()
            else:
                os.kill(farm.pid, signal.SIGSTOP) if kind == "farm stopped" else proxy.say("hold")
                time.sleep(6.0)
                os.kill(farm.pid, signal.SIGCONT) if kind == "farm stopped" else proxy.say("go")
        else:
            workers = [pid for farm in self._farms for pid in farm.children()]
            if not workers:
                return
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._rng.choice(workers), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
            kind = "kill -9" if kind == "kill" else "SIGSTOP"
        self.counts[kind] = self.counts.get(kind, 0) + 1

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

    def goodput(self) -> float:
        """Steps per second under faults as a share of those without."""
        rate = {name: sum(n for _, n in spans) / sum(s for s, _ in spans) for name, spans in self._spans.items()}
        return rate["harm"] / rate["calm"]

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
                    "%s %.0f -> %.0f MB (%+.1f %%)" % (name, before / 2**20, after / 2**20, _drift(before, after))
                )
            else:
                drifts.append("%s %d -> %d" % (name, before, after))
        done = dict(self.counts, **self._network)
        return "%s; %s" % (", ".join("%d %s" % (n, kind) for kind, n in done.items()), ", ".join(drifts))


def _drift(before: float, after: float) -> float:
    return 100 * (after - before) / before
