"""CLP on networks of the procedural family that nothing was chosen with.

    backdoor-gym zoo build 'digits-test/*' --most 20
    python benchmarks/clp_digits.py --models 20

ACC, ASR and DER on the test images, before and after CLP at the published u = 3 and at ``auto`` (budget of two points on
the defender's 200 clean images). The result goes to ``benchmarks/results/clp_digits.json`` and ``.md``.
"""

import argparse
import json
from pathlib import Path
from statistics import mean

import torch

import backdoor_gym

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in range(arguments.models):
        model = backdoor_gym.load_infected(f"digits-test/{seed}")
        for u in (3.0, "auto"):
            result = backdoor_gym.repair(model, "clp", u=u)
            report = result.report()
            rows.append(
                {
                    "model": model.name,
                    "attack": model.facts["attack"],
                    "shape": model.architecture["shape"],
                    "neurons": report["neurons"],
                    "u": u,
                    "pruned": len(result.pruned),
                    "before": report["before"],
                    "after": report["after"],
                    "der": report["der"],
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "clp_digits.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    lines = ["| attack | models | CLP | pruned | ACC lost (points) | ASR | DER |", "|---|---|---|---|---|---|---|"]
    for attack in ("badnets", "blended", "sig", "wanet", "clean"):
        for u in (3.0, "auto"):
            mine = [row for row in rows if row["attack"] == attack and row["u"] == u]
            if not mine:
                continue
            lost = mean(100 * (row["before"]["acc"] - row["after"]["acc"]) for row in mine)
            pruned = mean(row["pruned"] for row in mine)
            rates = ("", "")
            if attack != "clean":
                rates = (f"{mean(row['after']['asr'] for row in mine):.3f}", f"{mean(row['der'] for row in mine):.3f}")
            lines.append(f"| {attack} | {len(mine)} | u = {u} | {pruned:.1f} | {lost:.1f} | {rates[0]} | {rates[1]} |")
    (RESULTS / "clp_digits.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
