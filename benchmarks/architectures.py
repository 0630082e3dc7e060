"""Every family of architectures on the digits: a small network trained with a backdoor, then repaired by CLP and by ONP.

    python benchmarks/architectures.py

It shows that all of them go through ``repair``, and what that does to networks that are as small as this; it is no
comparison of the policies. ONP takes 60 steps at most. One line a network in ``results/architectures.jsonl``, which are not made
again; the table goes to ``results/architectures.md``.
"""

import time
from pathlib import Path
from typing import Any

from backdoor_gym import infect, repair
from backdoor_gym.benchmarking.resuming import RowFile, run_tasks
from backdoor_gym.models.training import Schedule

RESULTS = Path(__file__).parent / "results"
ROWS, TABLE = RowFile(RESULTS / "architectures.jsonl", ("name",)), RESULTS / "architectures.md"
NORMALISED = Schedule(epochs=6, batch_size=64, learning_rate=0.05, augment=False)
#: For those that learn slowly at this size.
SLOW = Schedule(epochs=30, batch_size=32, learning_rate=0.05, augment=False)
GENTLE = Schedule(epochs=40, batch_size=32, learning_rate=0.01, augment=False)
BARE = Schedule(epochs=25, batch_size=64, learning_rate=0.05, augment=False)
#: Of each row: the architecture, its options and its schedule.
MODELS: dict[str, tuple[str, dict[str, Any], Schedule]] = {
    "MLP": ("mlp", {"width": 64, "image_size": 8}, BARE),
    "LeNet": ("lenet", {"width": 8, "image_size": 8}, BARE),
    "VGG-11 without BN": ("vgg11", {"width": 8, "halvings": 3, "batch_norm": False}, BARE),
    "VGG-11": ("vgg11", {"width": 8, "halvings": 3}, NORMALISED),
    "DenseNet": ("densenet", {"width": 16, "layers": 2}, NORMALISED),
    "MobileNetV2": ("mobilenet_v2", {"width": 4, "halvings": 2}, SLOW),
    "MobileNetV3-Small": ("mobilenet_v3_small", {"width": 4, "halvings": 2}, SLOW),
    "EfficientNet-B0": ("efficientnet_b0", {"width": 4, "halvings": 2}, SLOW),
    "ConvNeXt": ("convnext", {"width": 16, "depth": 1, "patch": 2}, GENTLE),
    "ViT": ("vit", {"width": 24, "heads": 2, "depth": 2, "patch": 2, "image_size": 8}, GENTLE),
    "ResNet-34": ("resnet34", {"width": 4}, SLOW),
    "ResNet-50": ("resnet50", {"width": 4}, SLOW),
    "ResNet-18": ("resnet18", {"width": 8}, NORMALISED),
    "PreAct-ResNet-18": ("preact_resnet18", {"width": 8}, NORMALISED),
    "WRN-16": ("wrn16", {"width": 8}, NORMALISED),
    "VGG-11 with hidden layers": ("vgg11", {"width": 8, "halvings": 3, "hidden": 64}, GENTLE),
    "ResNet-18, ImageNet layout": ("resnet18_imagenet", {"width": 8, "halvings": 2}, NORMALISED),
}
MOST_STEPS = 60
COLUMNS = ("", "neurons", "ACC", "ASR", "CLP: pruned", "ACC", "ASR", "ONP: pruned", "ACC", "ASR", "label")


def measure(name: str, file: RowFile) -> None:
    """Train one network and repair it twice."""
    architecture, options, schedule = MODELS[name]
    start = time.perf_counter()
    model = infect(
        "digits",
        architecture,
        "badnets",
        target=3,
        schedule=schedule,
        architecture_options=options,
        clean_images=100,
    )
    row: dict[str, Any] = {
        "name": name,
        "architecture": architecture,
        "options": options,
        "acc": model.facts["acc"],
        "asr": model.facts["asr"],
        "target": model.target,
        "train_seconds": round(time.perf_counter() - start, 1),
    }
    for policy, steps in (("clp", None), ("onp", MOST_STEPS)):
        result = repair(model, policy, max_steps=steps)
        row["neurons"] = len(result.neurons)
        row[policy] = {
            "pruned": len(result.pruned),
            "acc": result.after.acc,
            "asr": result.after.asr,
            "suspected_target": result.suspected_target,
            "seconds": round(result.seconds, 1),
        }
    file.add(**row)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        cells: list[Any] = [row["name"], row["neurons"], f"{row['acc']:.3f}", f"{row['asr']:.3f}"]
        for policy in ("clp", "onp"):
            after = row[policy]
            cells += [after["pruned"], f"{after['acc']:.3f}", f"{after['asr']:.3f}"]
        cells.append("right" if row["onp"]["suspected_target"] == row["target"] else "wrong")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    run_tasks(measure, ROWS.missing((name,) for name in MODELS), ROWS, progress=True)
    rows = {row["name"]: row for row in ROWS.rows()}
    TABLE.write_text(table([rows[name] for name in MODELS]), encoding="utf-8")


if __name__ == "__main__":
    main()
