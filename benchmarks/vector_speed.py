"""The vector environment against ``SyncVectorEnv`` of the same single environments: seconds, in turn, in one run.

    python benchmarks/vector_speed.py
    python benchmarks/vector_speed.py --infected benchmarks/models/resnet18-badnets.safetensors --steps 6

Both get the same legal random actions from the same states, and what they return is compared to the last bit. The single
environments are made without Gymnasium's passive checker, which would be a cost of theirs alone. One JSON line a network in
``results/vector_speed.jsonl``.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.utils.env_checker import data_equivalence

from backdoor_gym.envs.prune import BackdoorPruneEnv
from backdoor_gym.envs.vector import BackdoorPruneVectorEnv

RESULTS = Path(__file__).parent / "results"
NETWORKS = ("digits-badnets", "digits-val/0", "digits-val/1", "digits-val/2")


def run(env: gym.vector.VectorEnv[Any, Any, Any], steps: int) -> tuple[float, list[Any]]:
    """Seconds of so many steps, and what they returned."""
    env.reset(seed=0)
    random = np.random.default_rng(0)
    masks = np.stack(env.call("action_masks"))
    seconds, returned = 0.0, []
    for _ in range(steps):
        actions = np.array([random.choice(np.flatnonzero(mask[:-1])) for mask in masks])
        start = time.perf_counter()
        found = env.step(actions)
        seconds += time.perf_counter() - start
        masks = found[0]["action_mask"].astype(bool)
        returned.append((found[1:4], found[0]["nodes"], found[0]["globals"]))
    return seconds, returned


def compare(infected: str, num_envs: int, steps: int, rounds: int, options: dict[str, Any]) -> dict[str, Any]:
    options = {"infected": infected, **options}
    sync = gym.vector.SyncVectorEnv([lambda: BackdoorPruneEnv(**options)] * num_envs)
    vector = BackdoorPruneVectorEnv(num_envs, **options)
    for env in (sync, vector):
        env.reset(seed=0)
    seconds: list[tuple[float, float]] = []
    for _ in range(rounds):
        (slow, one), (fast, other) = run(sync, steps), run(vector, steps)
        assert data_equivalence(one, other, exact=True), "the two returned something else"
        seconds.append((slow, fast))
    sync.close()
    vector.close()
    return {
        "infected": infected,
        "neurons": int(sync.single_action_space.n) - 1,
        "num_envs": num_envs,
        "threads": torch.get_num_threads(),
        "step_sync_s": median(slow for slow, _ in seconds) / steps,
        "step_vector_s": median(fast for _, fast in seconds) / steps,
        "ratio": median(slow / fast for slow, fast in seconds),
        "ratios": [round(slow / fast, 3) for slow, fast in seconds],
        **{key: value for key, value in options.items() if key != "infected"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--infected", nargs="+", default=list(NETWORKS))
    parser.add_argument("--num-envs", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--score-samples", type=int, default=0, help="0: the reward needs none")
    arguments = parser.parse_args()
    for infected in arguments.infected:
        found = compare(
            infected,
            arguments.num_envs,
            arguments.steps,
            arguments.rounds,
            {"score_samples": arguments.score_samples},
        )
        with (RESULTS / "vector_speed.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
