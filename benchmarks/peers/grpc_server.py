"""One environment behind gRPC, as dm_env_rpc or remote-gym serve it: python grpc_server.py dm_env_rpc

Prints its port, and ends when stdin closes. Runs in the environments of peers/make.py.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
from dm_env_rpc.v1 import dm_env_rpc_pb2 as pb
from dm_env_rpc.v1 import dm_env_rpc_pb2_grpc, spec_manager, tensor_spec_utils

from benchmarks.shared.vector_env import ACTIONS, LONGEST, OBS, Steps

ACTION, OBSERVATION = 1, 1


def specs() -> pb.ActionObservationSpecs:
    """One action and one observation of floats."""
    action = pb.TensorSpec(name="action", shape=[ACTIONS], dtype=pb.FLOAT)
    tensor_spec_utils.set_bounds(action, minimum=0.0, maximum=LONGEST)
    observation = pb.TensorSpec(name="observation", shape=[OBS], dtype=pb.FLOAT)
    return pb.ActionObservationSpecs(actions={ACTION: action}, observations={OBSERVATION: observation})


class Servicer(dm_env_rpc_pb2_grpc.EnvironmentServicer):
    """The protocol's verbs for an environment that never ends."""

    def Process(self, request_iterator: Iterator[Any], context: Any) -> Iterator[Any]:  # (gRPC's name)
        """Answers a stream of requests."""
        env, about = Steps(), specs()
        actions, observations = (spec_manager.SpecManager(part) for part in (about.actions, about.observations))
        begun = False
        for request in request_iterator:
            kind = request.WhichOneof("payload")
            response = pb.EnvironmentResponse()
            if kind == "step":
                obs = env.step(actions.unpack(request.step.actions)["action"])[0] if begun else env.reset()[0]
                begun = True
                packed = observations.pack({"observation": obs})
                response.step.CopyFrom(pb.StepResponse(state=pb.RUNNING, observations=packed))
            elif kind == "join_world":
                response.join_world.CopyFrom(pb.JoinWorldResponse(specs=about))
            else:
                getattr(response, kind).SetInParent()
            yield response


def serve_dm_env_rpc() -> Any:
    """A server and its port."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
    dm_env_rpc_pb2_grpc.add_EnvironmentServicer_to_server(Servicer(), server)
    port = server.add_secure_port("localhost:0", grpc.local_server_credentials())
    server.start()
    return server, port


def serve_remote_gym() -> Any:
    """A server and its port; it wants to be told one, so a free one is looked for."""
    from remote_gym import create_remote_environment_server

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # In a thread: the process it would start otherwise is forked beside gRPC's threads, and hangs. Each server has one
    # environment here, so it has its process all the same.
    return create_remote_environment_server(
        {"entrypoint": "benchmarks/shared/vector_env.py"}, "localhost", port, use_thread=True
    ), port


def main() -> None:
    """Serves until stdin closes."""
    os.setpgid(0, 0)  # remote-gym starts processes of its own, and they are to end with this one
    server, port = {"dm_env_rpc": serve_dm_env_rpc, "remote-gym": serve_remote_gym}[sys.argv[1]]()
    print(port, flush=True)
    sys.stdin.read()
    server.stop(0)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
