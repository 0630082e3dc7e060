"""What message passing is worth: how well policies with and without it imitate the true derivatives on models not fitted to.

    backdoor-gym zoo build 'digits-train/*' --most 300
    backdoor-gym zoo build 'digits-val/*' --most 60
    python benchmarks/message_passing.py --jobs 2

Each is fitted to the warm start's examples of ``digits-train/0`` to ``299`` and judged on those of ``digits-val/0`` to ``59``: by
the cross-entropy of its choices, and by the AUROC of its verdict. *Derivatives* are the features that have passed through
the whole network already (``saliency``, ``pull``, ``pull_now``, ``harm_now``, ``clean_pull_now``). Killed and called again it
goes on: one line a fit in ``results/message_passing.jsonl``; the table goes to ``results/message_passing.md``.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from train_policies import MLP, POLICIES, guide

from backdoor_gym.agents import ONP, EncoderOptions
from backdoor_gym.agents.warm_start import Example, padded, warm_start
from backdoor_gym.analysis.neuron_graph import EDGE_FEATURES
from backdoor_gym.processes import one_core_each

RESULTS = Path(__file__).parent / "results"
ROWS = RESULTS / "message_passing.jsonl"
JUDGES = [f"digits-val/{seed}" for seed in range(60)]
DERIVATIVES = ("saliency", "pull", "pull_now", "harm_now", "clean_pull_now")
SEEN = {"all": (), "no derivatives": DERIVATIVES}
#: Name -> shape, and the one kind of edges that is kept (of ``similarity``), None for both.
SHAPES: dict[str, tuple[EncoderOptions, int | None]] = {
    "each neuron alone": (MLP, None),
    "2 hops": (EncoderOptions(), None),
    "1 hop": (EncoderOptions(hops=1), None),
    "3 hops": (EncoderOptions(hops=3), None),
    "2 hops, connections alone": (EncoderOptions(), 0),
    "2 hops, similarity alone": (EncoderOptions(), 1),
}
#: Fits: shape, features and seed.
WANTED = [
    *((shape, seen, seed) for seen in SEEN for shape in ("each neuron alone", "2 hops") for seed in range(3)),
    *((shape, "all", 0) for shape in list(SHAPES)[2:]),
]


def fit_one(shape: str, seen: str, seed: int) -> dict[str, Any]:
    """Fit one policy, and judge it."""
    options, kind = SHAPES[shape]
    onp = ONP(encoder=replace(options, ignore=(*options.ignore, *SEEN[seen])), seed=seed)
    warm_start(onp.network, _edges_of(guide(), kind), seed=seed)
    onp.network.eval()
    losses, verdicts, infected = [], [], []
    for example in _edges_of(_judges(), kind):
        observation, preference = padded([example])
        with torch.no_grad():
            likelihood = torch.log_softmax(onp.network(observation)[0], 1).clamp(min=-30)
        losses.append(-(preference * likelihood).sum(1).mean().item())
        verdicts.append(1 - likelihood[0, -1].exp().item())
        infected.append(preference[0, -1].item() < 0.5)
    auroc = float(roc_auc_score(infected, verdicts))
    return {"shape": shape, "seen": seen, "seed": seed, "cross_entropy": mean(losses), "auroc": auroc}


def _judges() -> list[Example]:
    return guide(JUDGES, POLICIES / "guide-val.npz")


def _edges_of(school: Sequence[Example], kind: int | None) -> list[Example]:
    """The same examples with edges of one kind alone."""
    if kind is None:
        return list(school)
    left = []
    for example in school:
        kept = example.observation["edges"][:, EDGE_FEATURES.index("similarity")] == kind
        graph = {key: example.observation[key][kept] for key in ("edges", "edge_links")}
        left.append(replace(example, observation=example.observation | graph))
    return left


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Means over seeds."""
    text = ["| features | shape | seeds | cross-entropy | AUROC of the verdict |", "|---|---|---|---|---|"]
    for seen in SEEN:
        for shape in SHAPES:
            mine = [row for row in rows if (row["seen"], row["shape"]) == (seen, shape)]
            if mine:
                cells = [_spread([row[key] for row in mine]) for key in ("cross_entropy", "auroc")]
                text.append(f"| {seen} | {shape} | {len(mine)} | {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    guide()
    _judges()
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()] if ROWS.is_file() else []
    done = {(row["shape"], row["seen"], row["seed"]) for row in rows}
    left = [one for one in WANTED if one not in done]
    with one_core_each(arguments.jobs) as pool, ROWS.open("a", encoding="utf-8") as records:
        for row in pool.map(fit_one, *zip(*left, strict=True)) if left else ():
            rows.append(row)
            records.write(json.dumps(row) + "\n")
            records.flush()
            print(row, flush=True)
    (RESULTS / "message_passing.md").write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
