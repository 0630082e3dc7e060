"""One agent a layer: play the PettingZoo environment by hand, then let all agents learn one policy that they share.

    python tutorials/agents_of_layers.py            # two minutes on two cores
    python tutorials/agents_of_layers.py --short    # seconds: shows that it runs, and learns next to nothing

An agent sees the neurons of its own layer and a few figures of the whole network; all of them get the same reward.
"""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from backdoor_gym import parallel_env
from backdoor_gym.envs.observation import GLOBAL_FEATURES, NODE_FEATURES

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


class SharedPolicy(nn.Module):
    """Parameter sharing (Gupta et al., 2017): the same small network scores each neuron of each layer, and stopping."""

    def __init__(self) -> None:
        super().__init__()
        self.neuron = nn.Sequential(
            nn.Linear(len(NODE_FEATURES) + len(GLOBAL_FEATURES), 32), nn.Tanh(), nn.Linear(32, 1)
        )
        self.stop = nn.Linear(len(GLOBAL_FEATURES), 1)

    def forward(self, seen: Mapping[str, Any]) -> Categorical:
        """What one agent does, from what it sees of its own layer."""
        nodes, figures = (torch.from_numpy(seen["observation"][key]) for key in ("nodes", "globals"))
        both = torch.cat([nodes, figures.expand(len(nodes), -1)], dim=1)
        logits = torch.cat([self.neuron(both).squeeze(1), self.stop(figures)])
        return Categorical(logits=logits.masked_fill(torch.from_numpy(seen["action_mask"]) == 0, -torch.inf))


def play(env: Any, choose: Callable[[Observations], dict[str, int]]) -> tuple[list[float], dict[str, Any]]:
    """An episode, in PettingZoo's own loop: the reward of each round, and the last info."""
    observations, infos = env.reset(seed=0)
    rewards = []
    while env.agents:
        observations, reward, _, _, infos = env.step(choose(observations))
        rewards.append(next(iter(reward.values())))  # the reward is shared: all agents get the same
    return rewards, next(iter(infos.values()))


def learn(env: Any, episodes: int) -> SharedPolicy:
    """REINFORCE (Williams, 1992): what was followed by more reward than usual becomes more likely."""
    torch.manual_seed(0)
    policy = SharedPolicy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-3)
    usual = 0.0
    for _ in range(episodes):
        likelihoods: list[Tensor] = []  # one a round, of what all agents did in it

        def act(observations: Observations, likelihoods: list[Tensor] = likelihoods) -> dict[str, int]:
            chances = {agent: policy(seen) for agent, seen in observations.items()}
            actions = {agent: chance.sample() for agent, chance in chances.items()}
            likelihoods.append(torch.stack([chances[agent].log_prob(actions[agent]) for agent in actions]).sum())
            return {agent: int(action) for agent, action in actions.items()}

        rewards, _ = play(env, act)
        still_to_come = torch.tensor(rewards).flip(0).cumsum(0).flip(0)
        usual = 0.9 * usual + 0.1 * sum(rewards)
        optimizer.zero_grad()
        (-(still_to_come - usual) * torch.stack(likelihoods)).mean().backward()
        optimizer.step()
    return policy


def main() -> None:
    """By hand, and learned."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true")
    env = parallel_env(infected=MODEL, accuracy_budget=0.02, max_steps=ROUNDS)
    policy = learn(env, 2 if parser.parse_args().short else 60)

    def best(observations: Observations) -> dict[str, int]:
        return {agent: int(policy(seen).probs.argmax()) for agent, seen in observations.items()}

    for name, choose in (("by hand", by_hand), ("learned", best)):
        rewards, info = play(env, choose)
        print(
            f"{name:<8} return {sum(rewards):6.3f}  pruned {info['pruned']:3d}  ACC {info['acc']:.3f}  ASR {info['asr']:.3f}"
        )
    env.close()


if __name__ == "__main__":
    main()
