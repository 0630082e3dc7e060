"""Whether the policy that comes with the package still prunes the same neurons: what must hold after work on speed.

    python benchmarks/repairs.py            # compare with results/repairs.json
    python benchmarks/repairs.py --record   # write it anew
    python benchmarks/repairs.py --cases FILE.py --budget 0.01   # networks that others published: results/published.jsonl

Two embedded networks and those in ``models/``, each repaired with the defaults (``BACKDOOR_GYM_DATA`` names the folder of
CIFAR-10); called with names, only those.
``FILE.py`` has a function ``cases(names, count)`` whose cases have ``name, network, images, labels, trigger, target`` and
``infected``; the first 500 images repair, the rest score. It is run: take one of your own.
"""

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path

from backdoor_gym import InfectedModel, repair

HERE = Path(__file__).parent
RESULT = HERE / "results" / "repairs.json"
PUBLISHED = HERE / "results" / "published.jsonl"
#: Images that repair a published network, and all of them.
CLEAN, IMAGES = 500, 1500
MODELS = ("resnet18-badnets", "vgg16-blended", "vgg16-clean", "resnet18-wanet", "preact_resnet18-sig")
NETWORKS = {
    "digits-badnets": "digits-badnets",
    "digits-blended": "digits-blended",
    **{name: str(HERE / "models" / f"{name}.safetensors") for name in MODELS},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}, or of --cases; all if none"
    )
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--cases", type=Path, help="Python file of published networks")
    parser.add_argument("--budget", type=float, default=0.01, help="of the published networks")
    arguments = parser.parse_args()
    if arguments.cases:
        published(arguments.cases, arguments.networks, arguments.budget)
        return
    known = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    changed = []
    for name in arguments.networks or NETWORKS:
        result = repair(NETWORKS[name])
        measured = {"pruned": result.pruned, "clean_acc": [result.clean_acc_before, result.clean_acc_after]}
        same = measured == known.get(name)
        print(f"{name}: {len(result.pruned)} pruned, {'the same' if same else 'not what is recorded'}", flush=True)
        if arguments.record:
            known[name] = measured
            RESULT.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        elif not same:
            changed.append(name)
    if changed:
        raise SystemExit(f"other repairs than recorded: {', '.join(changed)}")


def published(file: Path, names: list[str], budget: float) -> None:
    """Repair networks of others with the defaults; a line of figures each, and none twice."""
    sys.path.insert(0, str(file.parent))
    lines = PUBLISHED.read_text(encoding="utf-8").splitlines() if PUBLISHED.is_file() else []
    done = {(row["name"], row["budget"]) for row in map(json.loads, lines)}
    for case in import_module(file.stem).cases(names or None, count=IMAGES):
        if (case.name, budget) in done:
            continue
        images, labels = case.images, case.labels
        target = "all-to-all" if isinstance(case.target, str) else case.target
        model = InfectedModel.from_module(
            case.network,
            clean=(images[:CLEAN], labels[:CLEAN]),
            test=(images[CLEAN:], labels[CLEAN:]),
            name=case.name,
            **({"trigger": case.trigger, "target": target} if case.infected else {}),
        )
        result = repair(model, accuracy_budget=budget)
        row = {
            "name": case.name,
            "budget": budget,
            "infected": case.infected,
            "target": target,
            "outcome": result.outcome,
            "verdict": result.verdict,
            "suspected_target": result.suspected_target,
            "signs": dict(result.evidence.signs),
            "pruned": len(result.pruned),
            "before": result.before.as_dict(),
            "after": result.after.as_dict(),
            "probability_lost": result.lost.mean,
            "seconds": round(result.seconds, 1),
        }
        print(json.dumps(row), flush=True)
        with PUBLISHED.open("a", encoding="utf-8") as results:
            results.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
