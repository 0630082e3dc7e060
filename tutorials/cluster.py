"""Train on a Ray cluster with RLlib: the same graph network, played on every machine, learned on one.

    python tutorials/cluster.py --address HOST:PORT   # "auto" on a machine of a cluster; default: this machine alone
    python tutorials/cluster.py --short               # a minute: shows that it runs, and learns next to nothing

RLlib asks for the Gymnasium of its own release, so the extra ``ray`` goes into an environment of its own; and every machine
of the cluster needs this package.
"""

import argparse

from backdoor_gym import repair
from backdoor_gym.on_ray.rllib import train_on_cluster

UNSEEN = "digits-badnets"


def main() -> None:
    """Train on some networks, choose on others, repair one that was in neither."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--address", default="local")
    parser.add_argument("--short", action="store_true")
    arguments = parser.parse_args()
    short = arguments.short

    # Reinforcement on a cluster needs the triggers of the networks that it learns from, as its reward is the oracle's: so
    # these are networks that we infected ourselves. The one to be repaired stays out, and its trigger unknown.
    learn_from = ["digits-blended"] if short else [f"digits-train/{seed}" for seed in range(40)]
    choose_by = ["digits-blended"] if short else [f"digits-val/{seed}" for seed in range(10)]
    policy = train_on_cluster(
        learn_from,
        choose_by,
        16 if short else 3_072,  # environment steps
        "cluster.safetensors",  # the best policy; interrupted and called again, it goes on from the checkpoint beside it
        arguments.address,
        runners=1 if short else 4,  # processes that play, one core each; they divide the networks
        envs=1 if short else 4,  # environments of each
        epochs=1 if short else 50,  # of the warm start from derivatives, before any reinforcement
        report=print,
        # Whatever else is named goes to RLlib's AlgorithmConfig.training().
        **({"n_steps": 8, "minibatch_size": 8, "num_epochs": 1} if short else {}),
    )
    print(f"the best was found after {policy.num_timesteps} steps")

    # It needs Ray no longer: backdoor-gym repair MODEL --policy cluster.safetensors
    result = repair(UNSEEN, policy="cluster.safetensors", max_steps=5 if short else None)
    print(f"{UNSEEN}: pruned {len(result.pruned)}, ACC {result.after.acc:.3f}, ASR {result.after.asr:.3f}")


if __name__ == "__main__":
    main()
