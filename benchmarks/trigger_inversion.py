"""How near the inverted trigger is to the real one, and whether it tells infected from clean networks.

    backdoor-gym zoo build 'digits-val/*' --most 40
    python benchmarks/trigger_inversion.py
    python benchmarks/trigger_inversion.py benchmarks/models/*.safetensors --out trigger_inversion_cifar10

*Pull* is the correlation, over a network's neurons, of the derivative of the target's margin under the inverted trigger
with that under the real one on test images. *Fall* is the correlation, over the 30 neurons that pull most and 30 others, of
how far the danger falls when one is pruned, under the inverted trigger and under the real one. The defender has clean
images alone. The record goes to ``results/trigger_inversion.json`` and ``.md``.
"""

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

import backdoor_gym
from backdoor_gym.analysis.features import pull
from backdoor_gym.metrics import target_margin
from backdoor_gym.session.masked_model import MaskedVictim
from backdoor_gym.session.prepared_model import Victim, VictimOptions

RESULTS = Path(__file__).parent / "results"
NEURONS = 30
#: What may tell infected networks, and in which direction.
SIGNS = (("evidence", 1), ("error", -1))


def measure(name: str) -> dict[str, Any]:
    model = backdoor_gym.load_infected(name)
    victim = Victim(model, VictimOptions())
    found = victim.inverted
    assert found is not None
    row = {
        "model": model.name,
        "attack": model.facts["attack"],
        "named": found.target == model.target,
        "size": found.size,
        "error": found.error,
        "evidence": found.evidence,
    }
    if model.target is None:
        return row
    target, nothing = model.target, np.zeros(len(victim), dtype=bool)
    pulls = pull(victim.neurons, found).double().numpy()
    masked = MaskedVictim(victim, score_samples=200)
    true = victim.by_mask(
        victim.neurons,
        masked.triggered[0],
        lambda logits: target_margin(logits, target).mean(),
        victim.neuron_mask(nothing),
    )
    others = np.random.default_rng(0).permutation(np.argsort(-pulls)[NEURONS:])[:NEURONS]
    whole = masked.figures(nothing)
    masked.keep()
    falls = []
    for unit in (*np.argsort(-pulls)[:NEURONS], *others):
        pruned = nothing.copy()
        pruned[unit] = True
        figures = masked.figures(pruned)
        assert figures.danger is not None
        assert whole.danger is not None
        falls.append((whole.suspected_danger - figures.suspected_danger, whole.danger - figures.danger))
    row["pull"] = float(np.corrcoef(pulls, true)[0, 1])
    row["fall"] = float(np.corrcoef(np.array(falls).T)[0, 1])
    return row


def table(rows: list[dict[str, Any]]) -> str:
    text = ["| networks | number | label named | pull | fall | mean absolute change |", "|---|---|---|---|---|---|"]
    infected = [row for row in rows if row["attack"] != "clean"]
    for attack in ("all", *sorted({row["attack"] for row in infected})):
        mine = [row for row in infected if attack in ("all", row["attack"])]
        text.append(
            f"| {attack} | {len(mine)} | {sum(row['named'] for row in mine)} | {mean(row['pull'] for row in mine):.3f} "
            f"| {mean(row['fall'] for row in mine):.3f} | {mean(row['size'] for row in mine):.3f} |"
        )
    labels = [row["attack"] != "clean" for row in rows]
    if len(set(labels)) == 2:
        evidence, error = (roc_auc_score(labels, [sign * row[key] for row in rows]) for key, sign in SIGNS)
        text.append(
            f"\n{len(rows) - len(infected)} clean networks; AUROC of the evidence {evidence:.3f}, of minus the error {error:.3f}."
        )
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=[f"digits-val/{seed}" for seed in range(40)])
    parser.add_argument("--out", default="trigger_inversion")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models:
        rows.append(measure(name))
        print(json.dumps(rows[-1]), flush=True)
    (RESULTS / f"{arguments.out}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{arguments.out}.md").write_text(table(rows), encoding="utf-8")


torch.set_num_threads(1)
if __name__ == "__main__":
    main()
