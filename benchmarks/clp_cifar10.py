"""CLP at several thresholds on an infected CIFAR-10 network.

    backdoor-gym infect --data uoft-cs/cifar10 --arch resnet18 --width 16 --epochs 15 --out infected/resnet18.safetensors
    python benchmarks/clp_cifar10.py infected/resnet18.safetensors

ACC, ASR and RA are taken on all test images; ``auto`` chooses u with the defender's 500 clean images (budget of two
points). The table goes to ``benchmarks/results/clp_cifar10.json`` and ``.md``.
"""

import argparse
import json
from pathlib import Path

import backdoor_gym

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", help="data set to read the images from, instead of the one the model names")
    arguments = parser.parse_args()
    model = backdoor_gym.load_infected(arguments.model, arguments.data)
    rows = []
    for u in (2.0, 2.5, 3.0, "auto"):
        result = backdoor_gym.repair(model, "clp", u=u)
        rows.append({"u": u, **result.report()})
        del rows[-1]["pruned"]
        rows[-1]["pruned"] = len(result.pruned)
        print(json.dumps(rows[-1]), flush=True)
    RESULTS.mkdir(exist_ok=True)
    content = {"facts": model.facts, "architecture": model.architecture, "rows": rows}
    (RESULTS / "clp_cifar10.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    lines = [
        "| CLP | pruned | ACC | ACC lost (points) | ASR | RA | DER | seconds |",
        "|---|---|---|---|---|---|---|---|",
        "| none | 0 | {acc:.4f} | | {asr:.4f} | {ra:.4f} | | |".format(**rows[0]["before"]),
    ]
    for row in rows:
        lost = 100 * (row["before"]["acc"] - row["after"]["acc"])
        after = row["after"]
        lines.append(
            f"| u = {row['u']} | {row['pruned']} | {after['acc']:.4f} | {lost:.1f} | {after['asr']:.4f} "
            f"| {after['ra']:.4f} | {row['der']:.3f} | {row['seconds']:.1f} |"
        )
    (RESULTS / "clp_cifar10.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
