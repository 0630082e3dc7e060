"""MaskablePPO, unchanged, against RandomPolicy on the embedded model.

    python benchmarks/maskable_ppo.py [--steps 6000] [--seeds 3]

Both act in the same environment: default reward (no trigger anywhere), accuracy budget of two points, at most 40
steps. Returns are means over episodes; ACC and ASR are those of ``repair`` on the test images. The result goes to
``benchmarks/results/maskable_ppo.json``.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import mean, stdev

import gymnasium as gym
import torch
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.evaluation import evaluate_policy as evaluate_maskable
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv

import backdoor_gym
from backdoor_gym.baselines import RandomPolicy

RESULT = Path(__file__).parent / "results" / "maskable_ppo.json"
MAX_STEPS = 40
EPISODES = 20


def make_env():
    return gym.make("BackdoorPrune-v0", max_steps=MAX_STEPS, score_samples=0)


def train(seed: int, steps: int) -> MaskablePPO:
    model = MaskablePPO(
        "MultiInputPolicy",
        DummyVecEnv([make_env] * 4),
        n_steps=128,
        batch_size=128,
        n_epochs=8,
        learning_rate=1e-3,
        gamma=0.5,  # a prune is paid at once; with gamma=1 the same number of steps only teaches to stop early
        gae_lambda=0.9,
        ent_coef=0.01,
        seed=seed,
    )
    return model.learn(steps)


def figures(policy, returns: list[float]) -> dict:
    result = backdoor_gym.repair("digits-badnets", policy, accuracy_budget=0.02, max_steps=MAX_STEPS)
    return {
        "return": mean(returns),
        "acc": result.after.acc,
        "asr": result.after.asr,
        "der": result.der,
        "pruned": len(result.pruned),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6_000)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in range(arguments.seeds):
        start = time.perf_counter()
        model = train(seed, arguments.steps)
        seconds = time.perf_counter() - start
        learned, _ = evaluate_maskable(
            model, make_env(), EPISODES, deterministic=False, return_episode_rewards=True, warn=False
        )
        random, _ = evaluate_policy(RandomPolicy(seed), make_env(), EPISODES, return_episode_rewards=True, warn=False)
        rows.append({"seed": seed, "policy": "MaskablePPO", "seconds": seconds, **figures(model, learned)})
        rows.append({"seed": seed, "policy": "RandomPolicy", **figures(RandomPolicy(seed), random)})
        for row in rows[-2:]:
            print(json.dumps(row), flush=True)
    summary = {}
    for policy in ("MaskablePPO", "RandomPolicy"):
        mine = [row for row in rows if row["policy"] == policy]
        summary[policy] = {
            key: {
                "mean": mean(row[key] for row in mine),
                "std": stdev(row[key] for row in mine) if len(mine) > 1 else None,
            }
            for key in ("return", "acc", "asr", "der", "pruned")
        }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(
        json.dumps({"steps": arguments.steps, "summary": summary, "runs": rows}, indent=2) + "\n", encoding="utf-8"
    )
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
