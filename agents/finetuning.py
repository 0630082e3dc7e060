"""Learning on one infected network, from its clean images alone."""

import gymnasium as gym
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from backdoor_gym.envs.prune import BackdoorPruneEnv

from .onp import ONP
from .school import ENVIRONMENT, MAX_STEPS

ENVS = 4


def learn_alone(onp: ONP, env: BackdoorPruneEnv, steps: int) -> ONP:
    """Let a policy learn on the network of an environment, by the reward that needs no trigger.

    Args:
        onp: the policy; it acts in ``env`` afterwards.
        env: an environment of a single network.
        steps: environment steps.
    """
    options = {**env.spec_options(), "reward": "acc", "score_samples": 0}
    options["max_steps"] = min(options["max_steps"] or MAX_STEPS, MAX_STEPS)

    def make() -> gym.Env:
        return Monitor(gym.make(f"backdoor_gym:{ENVIRONMENT}", disable_env_checker=True, **options))

    onp.set_env(DummyVecEnv([make] * ENVS))
    onp.learn(steps)
    onp.set_env(env)
    return onp
