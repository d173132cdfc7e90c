"""DDPG in one file, in CleanRL's manner, on all environments of a farm: python examples/cleanrl_style.py

Start one first: python farm.py Pendulum-v1. Only the line that makes `envs` is about farms: with
gymnasium.vector.SyncVectorEnv, or gymnasium.make_vec, in its place the rest stays as it is.
"""

import time
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf
import tyro
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics

import farmer


@dataclass
class Args:
    env: str = "Pendulum-v1"
    farm: str = "127.0.0.1:20099"
    """address of the farm"""
    num_envs: int = 4
    total_timesteps: int = 20_000
    learning_starts: int = 1_000
    batch_size: int = 256
    buffer_size: int = 100_000
    learning_rate: float = 1e-3
    gamma: float = 0.98
    tau: float = 0.005
    """share of the new weights in the targets, each update"""
    exploration_noise: float = 0.1
    """deviation, as a share of the actions' range"""
    seed: int = 1


def mlp(inputs, outputs, activation):
    hidden = [keras.layers.Dense(256, activation="relu") for _ in range(2)]
    return keras.Sequential([keras.Input((inputs,)), *hidden, keras.layers.Dense(outputs, activation=activation)])


args = tyro.cli(Args)
rng = np.random.default_rng(args.seed)
keras.utils.set_random_seed(args.seed)

# Same-step: a row of the buffer is whole when its step returns, with the end of an episode in "final_obs".
envs = farmer.make_vec(args.env, args.num_envs, [(args.farm, args.num_envs)], AutoresetMode.SAME_STEP)
envs = RecordEpisodeStatistics(envs)
obs_dim, act_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
low, high = envs.single_action_space.low, envs.single_action_space.high
center, scale = (high + low) / 2, (high - low) / 2

actor, target_actor = mlp(obs_dim, act_dim, "tanh"), mlp(obs_dim, act_dim, "tanh")
critic, target_critic = mlp(obs_dim + act_dim, 1, None), mlp(obs_dim + act_dim, 1, None)
target_actor.set_weights(actor.get_weights())
target_critic.set_weights(critic.get_weights())
actor_optimizer = keras.optimizers.Adam(args.learning_rate)
critic_optimizer = keras.optimizers.Adam(args.learning_rate)


@tf.function
def policy(obs):
    return actor(obs)  # in [-1, 1]


@tf.function
def update(obs, actions, next_obs, rewards, terminations):
    next_values = target_critic(tf.concat([next_obs, target_actor(next_obs)], 1))[:, 0]
    targets = rewards + args.gamma * (1.0 - terminations) * next_values
    with tf.GradientTape() as tape:
        critic_loss = tf.reduce_mean((critic(tf.concat([obs, actions], 1))[:, 0] - targets) ** 2)
    critic_optimizer.apply(tape.gradient(critic_loss, critic.trainable_weights), critic.trainable_weights)
    with tf.GradientTape() as tape:
        actor_loss = -tf.reduce_mean(critic(tf.concat([obs, actor(obs)], 1)))
    actor_optimizer.apply(tape.gradient(actor_loss, actor.trainable_weights), actor.trainable_weights)
    for net, target in ((actor, target_actor), (critic, target_critic)):
        for weight, slow in zip(net.weights, target.weights, strict=True):
            slow.assign(args.tau * weight + (1 - args.tau) * slow)
    return critic_loss


buffer = {
    "obs": np.zeros((args.buffer_size, obs_dim), np.float32),
    "actions": np.zeros((args.buffer_size, act_dim), np.float32),
    "next_obs": np.zeros((args.buffer_size, obs_dim), np.float32),
    "rewards": np.zeros(args.buffer_size, np.float32),
    "terminations": np.zeros(args.buffer_size, np.float32),
}
stored, start = 0, time.time()
obs, _ = envs.reset(seed=args.seed)
for global_step in range(args.num_envs, args.total_timesteps + 1, args.num_envs):
    if global_step <= args.learning_starts:
        actions = rng.uniform(-1, 1, (args.num_envs, act_dim))
    else:
        noise = args.exploration_noise * rng.normal(size=(args.num_envs, act_dim))
        actions = np.clip(policy(obs.astype(np.float32)).numpy() + noise, -1, 1)
    next_obs, rewards, terminations, truncations, infos = envs.step(center + scale * actions)

    real_next_obs = next_obs.copy()
    for index in np.flatnonzero(terminations | truncations):
        real_next_obs[index] = infos["final_obs"][index]
    # An episode whose worker died is no transition: nobody knows what the action led to.
    good = np.flatnonzero(~infos.get("_lost", np.zeros(args.num_envs, bool)))
    where = (stored + np.arange(len(good))) % args.buffer_size
    stored += len(good)
    for name, values in (
        ("obs", obs),
        ("actions", actions),
        ("next_obs", real_next_obs),
        ("rewards", rewards),
        ("terminations", terminations),
    ):
        buffer[name][where] = values[good]
    obs = next_obs

    if "episode" in infos:
        ended = infos["_episode"]
        print("global_step=%d, episodic_return=%.1f" % (global_step, infos["episode"]["r"][ended].mean()))
    if global_step > args.learning_starts:
        for _ in range(args.num_envs):
            drawn = rng.integers(0, min(stored, args.buffer_size), args.batch_size)
            loss = update(*(tf.constant(column[drawn]) for column in buffer.values()))
        if global_step % 1000 < args.num_envs:
            print("SPS: %d, critic_loss: %.3f" % (global_step / (time.time() - start), loss))
envs.close()
