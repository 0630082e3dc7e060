"""Every family of architectures on the digits: a small network trained with a backdoor, then repaired by CLP and by ONP.

    python benchmarks/architectures.py
    python benchmarks/architectures.py residual

It shows that all of them go through ``repair``, and what that does to networks that are as small as this; it is no
comparison of the policies. ONP takes 60 steps at most. One line a network in ``results/architectures.jsonl``, which are not made
again; the table goes to ``results/architectures.md``.

*residual*: whether neurons that share a residual sum are better pruned together (``residual="group"``) or each alone. The first 20
infected models from ``digits-val/200`` on that have such sums, CLP (up to the budget) and ONP, with a budget of two points; same
network and policy in pairs. Nothing was chosen with them. ``results/residual.jsonl`` and ``.md``.
"""

import argparse
import time
from itertools import count, islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from backdoor_gym import infect, repair
from backdoor_gym.benchmarking.cells import Conditions, Result
from backdoor_gym.benchmarking.resuming import RowFile, run_tasks
from backdoor_gym.benchmarking.running import make_ready, run_cell
from backdoor_gym.models.digits_family import recipe
from backdoor_gym.models.training import Schedule
from backdoor_gym.neurons.layers import RESIDUAL_MODES

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
SUMS = RowFile(RESULTS / "residual.jsonl", ("model", "residual"))
FIRST, MODELS_WITH_SUMS = 200, 20
POLICIES, BUDGET = ("clp", "onp"), 0.02
#: Figures of a repair, and what they are multiplied by in the table.
FIGURES = {"acc_lost": 100, "asr": 1, "der": 1, "pruned": 1}
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


def with_sums() -> list[str]:
    """The models of the ablation: infected, and of a shape with residual sums."""
    recipes = ((seed, recipe("digits-val", seed)) for seed in count(FIRST))
    names = (f"digits-val/{seed}" for seed, drawn in recipes if drawn.shape != "plain" and drawn.attack != "clean")
    return list(islice(names, MODELS_WITH_SUMS))


def measure_residual(model: str, residual: str, file: RowFile) -> None:
    """All repairs of one model in one mode."""
    conditions = Conditions(residual=residual)
    ready = make_ready(model, conditions)
    repairs = {}
    for policy in POLICIES:
        result = run_cell(Result(model, policy, BUDGET, 0, "", {}), policy, ready, conditions)
        repairs[policy] = {figure: getattr(result, figure) for figure in FIGURES}
    file.add(model=model, residual=residual, units=len(ready.env.session.prepared.units), **repairs)


def residual_table(rows: list[dict[str, Any]]) -> str:
    """Means of both modes and of their differences within a network, with the standard error, as Markdown."""
    heads = ("policy", "", "networks", "ACC lost (points)", "ASR", "DER", "pruned")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    modes = {mode: {row["model"]: row for row in rows if row["residual"] == mode} for mode in RESIDUAL_MODES}
    networks = [name for name in modes["channel"] if name in modes["group"]]
    for policy in POLICIES:
        for mode, of_network in modes.items():
            means = [mean(by * of_network[name][policy][figure] for name in networks) for figure, by in FIGURES.items()]
            lines.append(f"| {policy} | {mode} | {len(networks)} | {' | '.join(f'{value:.3f}' for value in means)} |")
        cells = []
        for figure, by in FIGURES.items():
            channel, group = ([by * modes[mode][name][policy][figure] for name in networks] for mode in RESIDUAL_MODES)
            differences = [after - before for before, after in zip(channel, group, strict=True)]
            cells.append(f"{mean(differences):+.3f} ± {stdev(differences) / len(differences) ** 0.5:.3f}")
        lines.append(f"| {policy} | group less channel | {len(networks)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def compare_residual() -> None:
    """Measure what is missing of the ablation, and write its table."""
    names = with_sums()
    run_tasks(measure_residual, SUMS.missing((name, mode) for name in names for mode in RESIDUAL_MODES), SUMS)
    text = residual_table([row for row in SUMS.rows() if row["model"] in names])
    SUMS.path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("families", "residual"), default="families")
    if parser.parse_args().what == "residual":
        compare_residual()
        return
    run_tasks(measure, ROWS.missing((name,) for name in MODELS), ROWS, progress=True)
    rows = {row["name"]: row for row in ROWS.rows()}
    TABLE.write_text(table([rows[name] for name in MODELS]), encoding="utf-8")


if __name__ == "__main__":
    main()
