"""Fine-Pruning, its pruning part (Liu, Dolan-Gavitt and Garg, RAID 2018, arXiv:1805.12185, section 3.1).

Neurons of the last convolutional layer that clean images leave dormant are pruned first, in increasing order of their
average activation, until the accuracy on clean images falls below what the defender tolerates: the paper leaves that
threshold to the defender, so it is "auto" here. The fine-tuning that follows in the paper is no pruning and is left out.
"""

import numpy as np

from backdoor_gym.envs.defender import Defender
from backdoor_gym.graph.features import observe

from .rule import Rule


class FinePruning(Rule):
    """Minus the mean activation (of its positive part) on the clean images, in the last layer of neurons alone."""

    def scores(self, defender: Defender) -> np.ndarray:
        scores = np.full(len(defender.neurons), -np.inf)
        observed = observe(defender.neurons, defender.images, defender.labels)[-1]
        scores[defender.neurons.layers[-1].neurons] = -observed["activation"].cpu().numpy()
        return scores


prune = FinePruning.prune
