"""Write a pruning policy of your own, twice, and benchmark it against published rules.

    python tutorials/own_policy.py            # some minutes on two cores: eight networks are made first, and kept
    python tutorials/own_policy.py --short    # seconds: one network

A policy decides from the network and the clean images alone; the benchmark knows the triggers, and scores.
"""

import argparse
from collections.abc import Mapping

import numpy as np
from torch import nn

from backdoor_gym import benchmark
from backdoor_gym.analysis.features import standardise
from backdoor_gym.baselines import Policy, Rule
from backdoor_gym.baselines.pre_activations import moments
from backdoor_gym.envs.observation import GLOBAL_FEATURES, NODE_FEATURES
from backdoor_gym.policies.contract import stop_action
from backdoor_gym.session.defender import Defender


class VarianceGap(Rule):
    """First way: a score of every neuron, once. Thresholds, ``"auto"``, budgets and ``VarianceGap.prune`` come with ``Rule``.

    Triggered images move what a backdoor neuron reads, so it varied more in training, of which the batch normalisation
    kept the variance, than it does on clean images.
    """

    def scores(self, defender: Defender) -> np.ndarray:
        """The larger, the sooner pruned. The defender is the network and the clean images: nothing else can be asked for."""
        scores = np.full(len(defender.neurons), -np.inf)  # minus infinity is never pruned
        found = moments(defender)  # mean and variance of each channel on the clean images
        for layer in defender.neurons.layers:
            norm = defender.neurons.graph.get_submodule(layer.module)
            if isinstance(norm, nn.BatchNorm2d):
                _, variance = found[layer.node]
                gap = norm.running_var.double().log() - variance.clamp(min=1e-12).log()
                scores[layer.neurons] = standardise(gap)  # what stands out in its layer
        return scores


class PullAgainstHarm(Policy):
    """Second way: an action at every step, from the observation, which tells what the prunes so far have changed.

    Prune what holds up the suspected label most and the clean images least; stop when little of that label is left.
    """

    pull, harm = NODE_FEATURES.index("pull_now"), NODE_FEATURES.index("harm_now")
    danger = GLOBAL_FEATURES.index("suspected_danger")

    def act(self, observation: Mapping[str, np.ndarray], environment: int) -> int:
        """A neuron's number, or the last action to stop."""
        legal = observation["action_mask"][:-1] == 1
        worth = observation["nodes"][:, self.pull] - observation["nodes"][:, self.harm]
        if observation["globals"][self.danger] < 0.1 or not legal.any():
            return stop_action(observation)
        return int(np.where(legal, worth, -np.inf).argmax())


def variance_gap(env: object, seed: int) -> Rule:
    """Makes the policy for an environment. ``"budget"`` prunes until the accuracy budget ends it, so all rows spend alike."""
    return VarianceGap(env, "budget")


def pull_against_harm(env: object, seed: int) -> Policy:
    """A policy that acts on observations needs no environment."""
    return PullAgainstHarm()


def main() -> None:
    """Everything on the same networks, with the same accuracy budget of two points on the same clean images."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true")
    short = parser.parse_args().short
    mine = {"variance gap": variance_gap, "pull against harm": pull_against_harm}
    done = benchmark(
        ["digits-badnets"] if short else ["digits-val/*"],  # digits-test/* is for a final figure, once
        {**mine, "bnp": "bnp"} if short else {**mine, "clp": "clp", "bnp": "bnp", "random": "random", "onp": "onp"},
        budgets=[0.02],
        most=8,
        max_steps=20 if short else 100,
        test_samples=100 if short else None,
        jobs=1 if short else None,  # with several processes a policy must be importable, and main() guarded as below
        out="own_policy",  # every finished cell is kept there: killed and run again, it goes on
        progress=True,
    )
    print(done.table)


if __name__ == "__main__":
    main()
