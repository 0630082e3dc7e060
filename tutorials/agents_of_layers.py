"""One agent a layer: play the PettingZoo environment by hand, then let all agents learn one policy.

    python tutorials/agents_of_layers.py            # two minutes on two cores
    python tutorials/agents_of_layers.py --short    # seconds: shows that it runs, and learns next to nothing

An agent sees the neurons of its own layer and a few figures of the whole network; all of them get the same reward.
"""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from backdoor_gym import parallel_env, repair
from backdoor_gym.agents import ONP
from backdoor_gym.agents.layers import LAYER_ENCODER, PER_LAYER, LayerPolicy, LayersVecEnv
from backdoor_gym.envs.observation import NODE_FEATURES

MODEL = "digits-badnets"
ROUNDS = 20  # in each of them every layer may prune one neuron
PULL = NODE_FEATURES.index("pull_now")

Observations = Mapping[str, Mapping[str, Any]]


def by_hand(observations: Observations) -> dict[str, int]:
    """Each agent sees its own layer: prune the neuron that holds up the suspected label most, if it stands out; else stop."""
    actions = {}
    for agent, seen in observations.items():
        legal = seen["action_mask"][:-1] == 1
        pull = np.where(legal, seen["observation"]["nodes"][:, PULL], -np.inf)
        stop = len(pull)  # the last action
        actions[agent] = int(pull.argmax()) if pull.max() > 3 else stop
    return actions


def play(name: str, choose: Callable[[Observations], dict[str, int]]) -> None:
    """An episode, in PettingZoo's own loop."""
    env = parallel_env(infected=MODEL, accuracy_budget=0.02, max_steps=ROUNDS)
    observations, infos = env.reset(seed=0)
    earned = 0.0
    while env.agents:
        observations, rewards, _, _, infos = env.step(choose(observations))
        earned += next(iter(rewards.values()))  # the reward is shared: all agents get the same
    last = next(iter(infos.values()))
    print(f"{name:<8} return {earned:6.3f}  pruned {last['pruned']:3d}  ACC {last['acc']:.3f}  ASR {last['asr']:.3f}")
    env.close()


def learn(steps: int, rollout: int) -> ONP:
    """Parameter sharing: to PPO every agent is one more environment, and all of them have the same graph policy."""
    vector = LayersVecEnv([MODEL], seats=1, accuracy_budget=0.02, max_steps=ROUNDS, score_samples=0)
    print(f"{vector.num_envs} agents")
    vector.seed(0)
    ppo = {"n_steps": rollout, "learning_rate": 2e-3, "gamma": 0.5, "ent_coef": 0.03}  # arguments of MaskablePPO
    shared = ONP(vector, encoder=LAYER_ENCODER, seed=0, **ppo)
    shared.learn(steps)  # steps of agents: a round is one of each
    shared.facts[PER_LAYER] = True  # so that whoever loads the file knows what its policy sees
    vector.close()
    return shared


def main() -> None:
    """By hand, learned, and the learned one as a repair."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true")
    short = parser.parse_args().short
    play("by hand", by_hand)
    shared = learn(80 if short else 6_400, 4 if short else 16)
    play("learned", LayerPolicy(shared).actions)

    # The same file repairs networks of any number of layers: backdoor-gym repair MODEL --policy agents_of_layers.safetensors
    # A policy for networks it has not seen learns on many: LayersVecEnv takes their names.
    path = shared.save("agents_of_layers.safetensors")
    result = repair(MODEL, policy=str(path), accuracy_budget=0.02, max_steps=10 if short else None)
    print(f"repair pruned {len(result.pruned)} neurons: ACC {result.after.acc:.3f}, ASR {result.after.asr:.3f}")


if __name__ == "__main__":
    main()
