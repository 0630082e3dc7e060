"""Learning on one infected network, from its clean images alone."""

import gymnasium as gym
from stable_baselines3.common.monitor import Monitor

from backdoor_gym.envs.prune import BackdoorPruneEnv

from .onp import ONP
from .school import ENVIRONMENT, MAX_STEPS
from .vec_env import ThreadedVecEnv
from .warm_start import examples, warm_start

ENVS = 4
#: Passes of the warm start over the few states of one repair.
EPOCHS = 60


def learn_alone(onp: ONP, env: BackdoorPruneEnv, steps: int, warm: bool = False) -> ONP:
    """Let a policy learn on the network of an environment, by the reward that needs no trigger.

    Args:
        onp: the policy; it acts in ``env`` afterwards.
        env: an environment of a single network.
        steps: environment steps.
        warm: begin with a warm start on what the environment shows of this network: for a policy that knows nothing.
    """
    options = {**env.spec_options(), "score_samples": 0}
    options["max_steps"] = min(options["max_steps"] or MAX_STEPS, MAX_STEPS)
    if warm:
        shown = {key: value for key, value in options.items() if key != "infected"}
        warm_start(onp.network, examples([env.session.prepared.model], oracle=False, **shown), EPOCHS)

    def make() -> gym.Env:
        return Monitor(gym.make(ENVIRONMENT, reward="acc", disable_env_checker=True, **options))

    vector = ThreadedVecEnv([make] * ENVS)
    onp.set_env(vector)
    onp.learn(steps)
    vector.close()
    onp.set_env(env)
    return onp
