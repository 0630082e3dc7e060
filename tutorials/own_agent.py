"""Train an agent of your own, with Stable-Baselines3.

    python tutorials/own_agent.py            # two minutes on two cores
    python tutorials/own_agent.py --short    # seconds: shows that it runs, and learns next to nothing

The agent learns on one infected network, from its clean images alone: no trigger, no test image, no attacker's label.
"""

import argparse

import gymnasium as gym
from sb3_contrib import MaskablePPO

import backdoor_gym
from backdoor_gym.agents import GraphPolicy, GraphRolloutBuffer
from backdoor_gym.agents.vec_env import ThreadedVecEnv
from backdoor_gym.baselines import RandomPolicy

MODEL = "digits-badnets"
MAX_STEPS = 40


def make_env() -> gym.Env:
    """An episode is a repair of the network: up to 40 prunes, of which none may bring the accuracy down by two points."""
    return gym.make("BackdoorPrune-v0", infected=MODEL, accuracy_budget=0.02, max_steps=MAX_STEPS, score_samples=0)


def train(steps: int, rollout: int) -> MaskablePPO:
    """Any algorithm that takes Dict observations learns here; MaskablePPO also never tries what is pruned already.

    ``"MultiInputPolicy"`` would do as a policy, and be tied to networks of 600 neurons. ``GraphPolicy`` gives each neuron a
    logit, whatever their number.
    """
    # The four environments share the network and everything that is known of it before a prune.
    environments = ThreadedVecEnv([make_env] * 4)
    agent = MaskablePPO(
        GraphPolicy,
        environments,
        policy_kwargs={"message_passing": False},  # each neuron alone; True lets neurons see their neighbours
        rollout_buffer_class=GraphRolloutBuffer,  # keeps edges once an episode instead of once a step
        n_steps=rollout,
        batch_size=128,
        n_epochs=8,
        learning_rate=2e-3,
        gamma=0.5,  # a prune is paid at once, so the far future need not be learned
        gae_lambda=0.9,
        ent_coef=0.03,  # what keeps it from stopping at once for good, before it has learned what to prune
        seed=0,
    )
    agent.learn(steps)
    environments.close()
    return agent


def main() -> None:
    """Train, compare with chance, and go to a network that the agent never saw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true")
    short = parser.parse_args().short
    agent = train(64 if short else 2_560, 16 if short else 64)

    # repair() takes any object with Stable-Baselines3's predict. Test images and trigger only score what it did.
    print("policy   network         neurons pruned    ACC    ASR")
    for model in (MODEL,) if short else (MODEL, "digits-blended"):
        for name, policy in (("mine", agent), ("random", RandomPolicy(seed=0))):
            result = backdoor_gym.repair(model, policy, accuracy_budget=0.02, max_steps=MAX_STEPS)
            acc, asr = result.after.acc, result.after.asr
            print(f"{name:<8} {model:<15} {len(result.pruned):>14} {acc:>6.3f} {asr:>6.3f}")

    # SB3's zip files hold pickles: load none that you did not write. ONP(env).learn(...) is this training in one line, and
    # ONP.save writes weights and JSON, which `backdoor-gym repair --policy FILE` takes.
    agent.save("own_agent")


if __name__ == "__main__":
    main()
