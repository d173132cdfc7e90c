"""Other people's vector environments, each in a process of its own, as libraries that throughput.py and large.py start.

`async` runs in our own Python, which has Gymnasium; the others in environments of peers/make.py.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shared.peer_process import answer_all, take_stdout
from benchmarks.shared.rounds import barrier, whoever_is_ready
from benchmarks.shared.vector_env import LARGE, Steps, gym_frames, gym_steps

ROOT = Path(__file__).resolve().parents[2]


class Vector:
    """All slots as one object; a subclass says how they are stepped."""

    packages: tuple[str, ...] = ()  # whose versions are told

    def __init__(self, slots: int):
        self.slots = slots

    def step(self, actions: np.ndarray) -> np.ndarray:
        """All together."""
        raise NotImplementedError

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """One round."""
        return barrier(self.step, self.slots, message)

    def close(self) -> None:
        """Ends what it started."""


class Async(Vector):
    """Gymnasium's AsyncVectorEnv, shared memory and all, as it comes."""

    packages = ("gymnasium",)

    def __init__(self, slots: int, make: Callable[[], Any] = gym_steps, shared: bool = True):
        import gymnasium

        super().__init__(slots)
        self.envs = gymnasium.vector.AsyncVectorEnv([make] * slots, shared_memory=shared)
        self.envs.reset(seed=0)

    def step(self, actions: np.ndarray) -> np.ndarray:
        return self.envs.step(actions)[0]

    def close(self) -> None:
        self.envs.close()


class SB3(Vector):
    """Stable-Baselines3's SubprocVecEnv."""

    packages = ("stable-baselines3",)

    def __init__(self, slots: int):
        from stable_baselines3.common.vec_env import SubprocVecEnv

        super().__init__(slots)
        self.envs = SubprocVecEnv([gym_steps] * slots)
        self.envs.reset()

    def step(self, actions: np.ndarray) -> np.ndarray:
        return self.envs.step(actions)[0]

    def close(self) -> None:
        self.envs.close()


class RayActors(Vector):
    """An actor for each slot, called as Ray's documentation shows."""

    packages = ("ray",)

    def __init__(self, slots: int):
        super().__init__(slots)
        ray = start_ray()
        self.get = ray.get
        actor = ray.remote(num_cpus=0)(Steps)
        self.actors = [actor.remote() for _ in range(slots)]
        self.get([actor.reset.remote() for actor in self.actors])

    def step(self, actions: np.ndarray) -> np.ndarray:
        sent = [actor.step.remote(action) for actor, action in zip(self.actors, actions, strict=True)]
        return np.stack([found[0] for found in self.get(sent)])

    def close(self) -> None:
        import ray

        ray.shutdown()


class DmEnvRpc(Vector):
    """A gRPC server in a process for each slot; all are written to before the first is read."""

    packages = ("dm-env-rpc", "grpcio")

    def __init__(self, slots: int):
        from grpc_client import Client

        super().__init__(slots)
        self.servers = contextlib.ExitStack()
        self.clients = [Client(port) for port in started_servers("dm_env_rpc", slots, self.servers)]

    def step(self, actions: np.ndarray) -> np.ndarray:
        for client, action in zip(self.clients, actions, strict=True):
            client.send(action)
        return np.stack([client.receive() for client in self.clients])

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.servers.close()


class RemoteGym(Vector):
    """remote-gym's environments, a server each; it has no way to step several at a time, so they go in turn."""

    packages = ("remote-gym", "dm-env-rpc", "grpcio")

    def __init__(self, slots: int):
        from remote_gym import RemoteEnvironment

        super().__init__(slots)
        self.servers = contextlib.ExitStack()
        ports = started_servers("remote-gym", slots, self.servers)
        self.envs = [RemoteEnvironment("localhost", port) for port in ports]
        for env in self.envs:
            env.reset()

    def step(self, actions: np.ndarray) -> np.ndarray:
        return np.stack([env.step(action)[0] for env, action in zip(self.envs, actions, strict=True)])

    def close(self) -> None:
        for env in self.envs:
            env.close()
        self.servers.close()


class Tianshou(Vector):
    """Tianshou's SubprocVectorEnv."""

    packages = ("tianshou",)
    wait: float = 0.0  # share of the slots that a step waits for; 0 is all

    def __init__(self, slots: int):
        super().__init__(slots)
        self.envs = self.make([gym_steps] * slots, **({"wait_num": int(slots * self.wait)} if self.wait else {}))
        self.envs.reset()

    def make(self, factories: list[Any], **options: Any) -> Any:
        """Its vector environment."""
        from tianshou.env import SubprocVectorEnv

        return SubprocVectorEnv(factories, **options)

    def step(self, actions: np.ndarray) -> np.ndarray:
        return self.envs.step(actions)[0]

    def close(self) -> None:
        self.envs.close()


class TianshouRay(Tianshou):
    """Tianshou's RayVectorEnv."""

    packages = ("tianshou", "ray")

    def make(self, factories: list[Any], **options: Any) -> Any:
        start_ray()
        from tianshou.env import RayVectorEnv

        return RayVectorEnv(factories, **options)

    def close(self) -> None:
        import ray

        super().close()
        ray.shutdown()


class TianshouHalf(Tianshou):
    """Tianshou's SubprocVectorEnv, whose step gives back whoever is ready once half of all are."""

    wait = 0.5

    def exchange(self, actions: Any, slots: Any) -> tuple[np.ndarray, np.ndarray]:
        """Next actions out, half of the slots in."""
        obs, _, _, _, infos = self.envs.step(actions, slots)
        return np.array([info["env_id"] for info in infos]), np.stack(list(obs))

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        return whoever_is_ready(self.exchange, self.slots, message)


LIBRARIES: dict[str, Callable[[int], Vector]] = {
    "async": Async,
    **{
        "%s %s" % (how, kind): functools.partial(Async, make=functools.partial(gym_frames, kind), shared=shared)
        for how, shared in (("async", True), ("async-piped", False))
        for kind in LARGE
    },
    "sb3": SB3,
    "ray": RayActors,
    "dm_env_rpc": DmEnvRpc,
    "remote-gym": RemoteGym,
    "tianshou": Tianshou,
    "tianshou-ray": TianshouRay,
    "tianshou-half": TianshouHalf,
}


def start_ray() -> Any:
    """Ray on this machine, without what only people look at; its workers find this project's files."""
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
    return ray


def started_servers(kind: str, count: int, until: contextlib.ExitStack) -> list[int]:
    """Ports of gRPC servers, a process each, which end with the stack."""
    servers = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peers.grpc_server", kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for _ in range(count)
    ]
    for server in servers:
        until.callback(_end, server)
    ports = []
    for server in servers:
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line.strip().isdigit():
            raise RuntimeError("a server of %s did not start: %r" % (kind, line))
        ports.append(int(line))
    return ports


def _end(server: subprocess.Popen[str]) -> None:
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.close()
    try:
        server.wait(5.0)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    server.stdout.close()


def main() -> None:
    """Serves until stdin closes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--library", choices=LIBRARIES, required=True)
    parser.add_argument("--slots", type=int, required=True)
    args = parser.parse_args()
    pipe = take_stdout()
    vector = LIBRARIES[args.library](args.slots)
    try:
        answer_all(pipe, {name: version(name) for name in vector.packages}, vector.answer)
    finally:
        vector.close()


if __name__ == "__main__":
    main()
