"""dm_env_rpc's client in two halves, so that one thread can have several environments step at a time.

Its own `Connection.send` waits for the answer; this writes to the same stream and reads it later. Runs in an
environment of peers/make.py.
"""

from __future__ import annotations

import grpc
import numpy as np
from dm_env_rpc.v1 import connection, dm_env_rpc_pb2_grpc, spec_manager
from dm_env_rpc.v1 import dm_env_rpc_pb2 as pb


class Client:
    """One environment, created, joined and begun."""

    def __init__(self, port: int):
        self._channel = grpc.secure_channel("localhost:%d" % port, grpc.local_channel_credentials())
        grpc.channel_ready_future(self._channel).result(30)
        self._stream = connection.StreamReaderWriter(dm_env_rpc_pb2_grpc.EnvironmentStub(self._channel))
        world = self._ask(pb.EnvironmentRequest(create_world=pb.CreateWorldRequest())).create_world.world_name
        request = pb.EnvironmentRequest(join_world=pb.JoinWorldRequest(world_name=world))
        about = self._ask(request).join_world.specs
        self._actions = spec_manager.SpecManager(about.actions)
        self._observations = spec_manager.SpecManager(about.observations)
        self._wanted = [self._observations.name_to_uid("observation")]
        self.send(np.zeros(self._actions.name_to_spec("action").shape, np.float32))  # begins the episode
        self.receive()

    def send(self, action: np.ndarray) -> None:
        """Writes a step; `receive` is to be called once for each."""
        packed = self._actions.pack({"action": action})
        step = pb.StepRequest(actions=packed, requested_observations=self._wanted)
        self._stream.write(pb.EnvironmentRequest(step=step))

    def receive(self) -> np.ndarray:
        """Waits for the answer to the first step that has none yet."""
        return self._observations.unpack(self._stream.read().step.observations)["observation"]

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()

    def _ask(self, request: pb.EnvironmentRequest) -> pb.EnvironmentResponse:
        self._stream.write(request)
        return self._stream.read()
