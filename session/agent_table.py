"""The agents that a session can train: for each its factory, and which options are its settings.

A new agent is a line in AGENTS. This module is read before TensorFlow is imported, so it names factories only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.offpolicy import OffPolicyAgent
    from session.options import Options


@dataclass(frozen=True)
class AgentKind:
    """One agent.

    Attributes:
        factory: the function of `agents` that makes it from the spaces.
        settings: the factory's keywords, and what of the options each gets.
    """

    factory: str
    settings: Mapping[str, Callable[[Options], Any]]


#: What every agent takes that learns from replay.
OFF_POLICY: dict[str, Callable[[Options], Any]] = {
    "seed": lambda options: options.seed,
    "updates_per_step": lambda options: options.updates_per_step,
    "schedule": lambda options: options.schedule,
    "n_step": lambda options: options.n_step,
    "layer_norm": lambda options: options.layer_norm,
    "normalize_observations": lambda options: {"auto": None, "on": True, "off": False}[options.normalize],
    "on_lost_episode": lambda options: options.on_lost_episode,
}

#: By the name on the command line.
AGENTS = {
    "ddpg": AgentKind("make_ddpg", OFF_POLICY),
    "sac": AgentKind("make_sac", OFF_POLICY),
}


def make_agent(options: Options, observation_space: Any, action_space: Any) -> OffPolicyAgent:
    """The agent that the options ask for.

    Raises:
        ValueError: it does not fit the spaces.
    """
    import agents

    kind = AGENTS[options.agent]
    settings = {name: value_of(options) for name, value_of in kind.settings.items()}
    agent: OffPolicyAgent = getattr(agents, kind.factory)(observation_space, action_space, **settings)
    return agent
