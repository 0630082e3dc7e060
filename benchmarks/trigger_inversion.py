"""How near the inverted trigger is to the real one, how often the label is named, and whether both tell infected networks.

    backdoor-gym zoo build 'digits-train/*' --most 300
    backdoor-gym zoo build 'digits-val/*' --most 40
    python benchmarks/trigger_inversion.py
    python benchmarks/trigger_inversion.py benchmarks/models/*.safetensors --out trigger_inversion_cifar10
    python benchmarks/trigger_inversion.py --label                    # the label alone, on all 340

*Pull* is the correlation, over a network's neurons, of the derivative of the target's margin under the inverted trigger with that
under the real one on test images. *Fall* is the correlation, over the 30 neurons that pull most and 30 others, of how far the
danger falls when one is pruned, under the inverted trigger and under the real one. The defender has clean images alone. Figures go
to ``results/trigger_inversion.json`` and ``.md``, those of ``--label`` to ``results/suspected_target.json``.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

import backdoor_gym
from backdoor_gym.analysis.features import pull
from backdoor_gym.analysis.suspected_target import suspect_target
from backdoor_gym.metrics import target_margin
from backdoor_gym.neurons.finding import find_neurons
from backdoor_gym.session.masked_model import MaskedModel
from backdoor_gym.session.prepared_model import Preparation, PreparedModel

RESULTS = Path(__file__).parent / "results"
NEURONS = 30
TRAINING, VALIDATION = (
    [f"digits-{split}/{seed}" for seed in range(count)] for split, count in (("train", 300), ("val", 40))
)


def measure(name: str) -> dict[str, Any]:
    """One network."""
    model = backdoor_gym.load_infected(name)
    prepared = PreparedModel(model, Preparation())
    inverted, target = prepared.inverted, model.target
    assert inverted is not None
    row = {"model": model.name, "attack": model.facts["attack"], "named": inverted.target == target}
    row |= {"size": inverted.size, "error": inverted.error, "evidence": inverted.evidence}
    if target is None:
        return row
    nothing = np.zeros(len(prepared), dtype=bool)
    pulls = pull(prepared.neurons, inverted).double().numpy()
    masked = MaskedModel(prepared, score_samples=200)
    true = prepared.by_mask(
        prepared.neurons,
        masked.triggered[0],
        lambda logits: target_margin(logits, target).mean(),
        prepared.neuron_mask(nothing),
    )
    others = np.random.default_rng(0).permutation(np.argsort(-pulls)[NEURONS:])[:NEURONS]
    whole = masked.figures(nothing)
    masked.keep()
    falls = []
    for unit in (*np.argsort(-pulls)[:NEURONS], *others):
        pruned = nothing.copy()
        pruned[unit] = True
        figures = masked.figures(pruned)
        falls.append((whole.suspected_danger - figures.suspected_danger, whole.danger - figures.danger))
    row["pull"] = float(np.corrcoef(pulls, true)[0, 1])
    row["fall"] = float(np.corrcoef(np.array(falls).T)[0, 1])
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Means by attack, and what tells infected networks."""
    text = ["| networks | number | label named | pull | fall | mean absolute change |", "|---|---|---|---|---|---|"]
    infected = [row for row in rows if row["attack"] != "clean"]
    for attack in ("all", *sorted({row["attack"] for row in infected})):
        own = [row for row in infected if attack in ("all", row["attack"])]
        pulls, falls, sizes = (mean(row[key] for row in own) for key in ("pull", "fall", "size"))
        named = sum(row["named"] for row in own)
        text.append(f"| {attack} | {len(own)} | {named} | {pulls:.3f} | {falls:.3f} | {sizes:.3f} |")
    labels = [row["attack"] != "clean" for row in rows]
    if len(set(labels)) == 2:
        evidence, error = (
            roc_auc_score(labels, [sign * row[key] for row in rows]) for key, sign in (("evidence", 1), ("error", -1))
        )
        clean = len(rows) - len(infected)
        text.append(f"\n{clean} clean networks; AUROC of the evidence {evidence:.3f}, of minus the error {error:.3f}.")
    return "\n".join(text) + "\n"


def name_labels(names: list[str]) -> dict[str, Any]:
    """How often the BN statistics alone name the label, and whether its rise tells infected networks."""
    named, infected, labels, rises = Counter[str](), Counter[str](), [], []
    for name in names:
        model = backdoor_gym.load_infected(name)
        suspected = suspect_target(find_neurons(model.network), model.clean.images, model.clean.labels)
        assert suspected is not None
        labels.append(model.facts["attack"] != "clean")
        rises.append(suspected.rise)
        if labels[-1]:
            for group in ("all", name.partition("/")[0], model.facts["attack"]):
                infected[group] += 1
                named[group] += suspected.target == model.target
    share = named.pop("all") / infected.pop("all") if infected else None
    auroc = float(roc_auc_score(labels, rises)) if len(set(labels)) == 2 else None
    figures = {"infected": dict(infected), "named": dict(named), "share named": share}
    return figures | {"clean": labels.count(False), "AUROC of the rise": auroc}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help=f"{VALIDATION[0]} to {VALIDATION[-1]} if none")
    parser.add_argument("--out", default="trigger_inversion")
    parser.add_argument("--label", action="store_true", help="only whether the BN statistics name the label")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.label:
        figures = name_labels(arguments.models or TRAINING + VALIDATION)
        (RESULTS / "suspected_target.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(figures))
        return
    rows = []
    for name in arguments.models or VALIDATION:
        rows.append(measure(name))
        print(json.dumps(rows[-1]), flush=True)
    (RESULTS / f"{arguments.out}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{arguments.out}.md").write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
