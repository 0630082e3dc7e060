"""Masked evaluations in bfloat16 against float32: accuracies that differ, how far the rest does, and the time of a step.

    python benchmarks/precision.py

A digits network and four of ``models/`` (``BACKDOOR_GYM_DATA`` names the folder of CIFAR-10), three episodes of 24 random prunes
each, the same in both; after each prune one more is tried. Steps of both take turns, on one core. Writes
``results/precision.json``.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speed_rivals import seconds

from backdoor_gym.envs.prune import BackdoorPruneEnv

HERE = Path(__file__).parent
RESULT = HERE / "results" / "precision.json"
NETWORKS = ("resnet18-badnets", "resnet18-wanet", "vgg16-sig", "wrn16-badnets")
MODELS = ["digits-train/140", *(str(HERE / "models" / f"{name}.safetensors") for name in NETWORKS)]
EPISODES, PRUNES = 3, 24


def compare(model: str) -> dict[str, Any]:
    """One network."""
    exact, quick = pair = [
        BackdoorPruneEnv(model, accuracy_budget=None, score_samples=0, precision=one) for one in ("float32", "bfloat16")
    ]
    taken: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    differing, danger, loss, correlations = 0, 0.0, 0.0, []
    for seed in range(EPISODES):
        for env in pair:
            env.reset(seed=seed)
        random = np.random.default_rng(seed)
        for unit in random.permutation(len(exact.victim))[:PRUNES]:
            other = [int(random.integers(len(exact.victim)))]
            for env in pair:
                taken[env.precision].append(seconds(lambda env=env, unit=unit: env.step(int(unit))))
            accuracies = [(env.figures.acc, *(env.clean_also(other) or ())[:1]) for env in pair]
            differing += sum(one != another for one, another in zip(*accuracies, strict=True))
            danger = max(danger, abs(exact.figures.suspected_danger - quick.figures.suspected_danger))
            loss = max(loss, abs(exact.figures.loss - quick.figures.loss))
        found = [env.masked_victim.slopes(env.pruned) for env in pair]
        correlations += [
            float(np.corrcoef(*(getattr(slopes, name) for slopes in found))[0, 1])
            for name in ("pull", "harm", "clean_pull")
        ]
    return {
        "model": Path(model).stem if model.endswith(".safetensors") else model,
        "accuracies": 2 * EPISODES * PRUNES,
        "differing": differing,
        "danger_off_by": danger,
        "loss_off_by": loss,
        "derivatives_correlate": min(correlations),
        "step_s": {name: float(np.mean(one)) for name, one in taken.items()},
        "ratio": sum(taken["float32"]) / sum(taken["bfloat16"]),
    }


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for model in MODELS:
        rows.append(compare(model))
        print(json.dumps(rows[-1]), flush=True)
    RESULT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
