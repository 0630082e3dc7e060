"""How often the BN statistics name the attacker's label, and whether its rise tells infected from clean networks.

    backdoor-gym zoo build 'digits-train/*' --most 300
    backdoor-gym zoo build 'digits-val/*' --most 40
    python benchmarks/suspected_target.py

On the networks that everything is chosen with; half of their defenders' images are compressed or made brighter or darker.
The figures go to ``benchmarks/results/suspected_target.json``.
"""

import json
from collections import Counter
from pathlib import Path

import torch
from sklearn.metrics import roc_auc_score

import backdoor_gym
from backdoor_gym.analysis.suspected_target import suspect_target
from backdoor_gym.neurons.finding import find_neurons

RESULT = Path(__file__).parent / "results" / "suspected_target.json"
MODELS = {"digits-train": 300, "digits-val": 40}


def main() -> None:
    torch.set_num_threads(1)
    named: Counter[str] = Counter()
    infected: Counter[str] = Counter()
    labels, rises = [], []
    for split, count in MODELS.items():
        for seed in range(count):
            model = backdoor_gym.load_infected(f"{split}/{seed}")
            suspected = suspect_target(find_neurons(model.network), model.clean.images, model.clean.labels)
            assert suspected is not None
            labels.append(model.facts["attack"] != "clean")
            rises.append(suspected.rise)
            if labels[-1]:
                for group in (split, model.facts["attack"]):
                    infected[group] += 1
                    named[group] += suspected.target == model.target
    figures = {
        "infected": dict(infected),
        "named": dict(named),
        "share named": sum(named[split] for split in MODELS) / sum(infected[split] for split in MODELS),
        "clean": labels.count(False),
        "AUROC of the rise": float(roc_auc_score(labels, rises)),
    }
    RESULT.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
