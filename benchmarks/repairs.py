"""Whether the policy that comes with the package still prunes the same neurons: what must hold after work on speed.

    python benchmarks/repairs.py            # compare with results/repairs.json
    python benchmarks/repairs.py --record   # write it anew

Two embedded networks and those in ``models/``, each repaired with the defaults (``BACKDOOR_GYM_DATA`` names the folder of
CIFAR-10); called with names, only those.
"""

import argparse
import json
from pathlib import Path

from backdoor_gym import repair

HERE = Path(__file__).parent
RESULT = HERE / "results" / "repairs.json"
MODELS = ("resnet18-badnets", "vgg16-blended", "vgg16-clean", "resnet18-wanet", "preact_resnet18-sig")
NETWORKS = {
    "digits-badnets": "digits-badnets",
    "digits-blended": "digits-blended",
    **{name: str(HERE / "models" / f"{name}.safetensors") for name in MODELS},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}; all if none")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
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


if __name__ == "__main__":
    main()
